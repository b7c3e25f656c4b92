"""Ready tasks: a goal with the options that suit it, chosen on some examples and judged on others."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from coar.attributions import Attributions
from coar.editing.edit import Edit
from coar.editing.evaluate import SelectionContext, columns
from coar.editing.goal import Bound, Columns, EditGoal, TradeOff
from coar.editing.intervals import change_interval
from coar.editing.judge import effect_curve, judge_edit, margins
from coar.editing.result import Judging, TaskResult
from coar.editing.select import Selection, SelectionOptions, select_by, select_in
from coar.errors import BoundError, GoalError
from coar.examples import Examples
from coar.forward.execution_plan import Precision
from coar.outputs.base import Output
from coar.progress import progress_bar

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import pandas as pd

PRESETS = {
    # half of the mean for the standard error, as with some 3,000 references; trained constants harm no less here
    "forget": SelectionOptions(bound=Bound(mean=0.006, group=0.03), constants="run"),
    # one target needs few training steps, and moves few references that have large margins; the minimal strength, and
    # references that keep their margins too, are what spares examples outside the choice
    "fix": SelectionOptions(
        bound=Bound(mean=0.005, group=0.05),
        strength="minimal",
        tradeoff=TradeOff(target_scale=0.5, reference_scale=3.0),
        steps=40,
        n_boundary_references=600,
    ),
    "group": SelectionOptions(bound=Bound(mean=0.01, group=0.05)),
    # a backdoor shares its components with other functions, and is removed by changing many of them in part
    "backdoor": SelectionOptions(
        bound=Bound(mean=0.005, group=0.05),
        strength="per_component",
        tradeoff=TradeOff(harm_weight=4.0, reference_scale=4.0),
        steps=600,
    ),
    # reading is spread over many components, each of them also used for seeing
    "typographic": SelectionOptions(
        bound=Bound(mean=0.005, group=0.05),
        strength="per_component",
        tradeoff=TradeOff(harm_weight=16.0, reference_scale=4.0),
    ),
}


@dataclass(frozen=True)
class _Setup:
    """What a task chooses by and where it computes.

    Attributes:
        selection: How components are chosen.
        choosing: Further examples to choose on.
        device: Where to compute.
        precision: Precision of the search.
        output: The margin by which correctness is judged.
    """

    selection: SelectionOptions
    choosing: Examples | None = None
    device: str = "auto"
    precision: Precision = "float32"
    output: Output | None = None

    @classmethod
    def of(cls, task: str | None, options: dict[str, Any]) -> "_Setup":
        """Return the setup of a task from the options of `select`; `task` names a preset."""
        execution = {name: options[name] for name in ("choosing", "device", "precision", "output") if name in options}
        given = {name: value for name, value in options.items() if name not in execution}
        return cls(preset(task, given) if task else SelectionOptions(**_set(given)), **execution)

    def select(self, attributions: Attributions, model: nn.Module, studied: Examples, goal: EditGoal) -> Selection:
        """Choose components for a goal."""
        return select_by(
            self.selection,
            attributions,
            model,
            studied,
            goal,
            choosing=self.choosing,
            device=self.device,
            precision=self.precision,
            output=self.output,
        )

    def judging(self, attributions: Attributions, model: nn.Module, studied: Examples, judge: Examples) -> Judging:
        """Return what a result is judged on, and warn of examples that were seen before."""
        _warn_of_seen(judge, [studied, *([self.choosing] if self.choosing is not None else [])])
        return Judging(attributions, model, studied, self.choosing, judge, self.output, self.device)

    def margins(self, model: nn.Module, examples: Examples) -> np.ndarray:
        """Return (examples,) margins."""
        return margins(model, examples, device=self.device, output=self.output)

    def margins_along(self, edit: Edit, attributions: Attributions, model: nn.Module, examples: Examples) -> np.ndarray:
        """Return (components + 1, examples) margins as an edit's components are ablated one after another."""
        order = [attributions.components.index(component.name) for component in edit.components]
        return effect_curve(
            model,
            attributions,
            order,
            examples,
            counts=range(len(order) + 1),
            constants=edit.constants(attributions),
            strengths=edit.strengths,
            device=self.device,
            output=self.output,
        )


def preset(task: str, options: dict[str, Any]) -> SelectionOptions:
    """Return the options of a task, with its own settings for those that are missing or None.

    Rules that only rank components ablate them fully, unless the options say otherwise.
    """
    given = _set(options)
    ranked = {"strength": "full"} if given.get("rule", "verified") != "verified" else {}
    return PRESETS[task].updated(**{**ranked, **given})


def _set(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _warn_of_seen(judge: Examples, before: list[Examples]) -> None:
    """Warn when examples to judge on are studied or choosing examples too."""
    seen = {digest for examples in before for digest in examples.input_hashes()}
    count = sum(digest in seen for digest in judge.input_hashes())
    if count:
        log.warning(
            "%d of %d examples to judge on were studied, or used to choose, too, so the judgement is too favourable; "
            "give other examples",
            count,
            len(judge),
        )


def reach_goal(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    judge: Examples,
    *,
    goal: EditGoal,
    name: str,
    **options: Any,
) -> TaskResult:
    """Edit the model for a goal, and judge it on other examples.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples, used to choose.
        judge: Other examples, used to judge.
        goal: Targets and references, as conditions over metadata columns that both sets of examples have.
        name: Name of the result.
        options: Options of `select`.

    Raises:
        GoalError: When the studied or judging examples have no targets or no references, or see `select`.
        SettingsError: When an option is unknown or out of range.
    """
    return _reach(_Setup.of(None, options), attributions, model, studied, judge, goal=goal, name=name)


def forget_class(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    judge: Examples,
    *,
    label: int,
    **options: Any,
) -> TaskResult:
    """Make the model fail on one class and leave the others as they are: `reach_goal` with the class as targets.

    On the choosing examples the other classes may lose 0.6 points on average, standard error included, and 3 each.
    Components are replaced by the run's constants. `bound` and `constants` change that.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples, used to choose.
        judge: Other examples, used to judge.
        label: The class to forget.
        options: Options of `select`.

    Raises:
        GoalError: When the studied or judging examples have none of the class or none of the others, or see `select`.
    """
    goal = EditGoal(targets=f"label == {label}", references=f"label != {label}", direction="decrease")
    return _reach(_Setup.of("forget", options), attributions, model, studied, judge, goal=goal, name=f"forget-{label}")


def strengthen_group(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    judge: Examples,
    *,
    group: str | int | None = None,
    column: str | None = None,
    goal: EditGoal | None = None,
    **options: Any,
) -> TaskResult:
    """Raise the accuracy of a subpopulation: of one value of a metadata column, by default the worst of them.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples, used to choose.
        judge: Other examples, used to judge.
        group: The value to strengthen; by default the one with the lowest accuracy among the studied examples.
        column: The metadata column of the groups. By default `group`; without such a column, the only column, except
            for `id`, with the value `group`.
        goal: A goal to use instead.
        options: Options of `select`.

    Raises:
        GoalError: When there is no such column or no such value in it, when several columns have the value, or see
            `select`.
    """
    setup = _Setup.of("group", options)
    if goal is None:
        name = column or _column_with(group, columns(studied))
        if name not in studied.metadata:
            raise GoalError(
                f"the examples have no metadata column {name!r}; there are {', '.join(sorted(studied.metadata))}: name "
                f"one by column=, or give a goal"
            )
        groups = np.asarray(studied.metadata[name])
        if group is None:
            right = setup.margins(model, studied) > 0
            group = min(np.unique(groups), key=lambda one: right[groups == one].mean()).item()
        conditions = {"targets": f"{name} == {group!r}", "references": f"{name} != {group!r}"}
        goal = EditGoal(**conditions, direction="increase", groups=name)
    return _reach(setup, attributions, model, studied, judge, goal=goal, name="group")


def remove_backdoor(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    judge: Examples,
    *,
    goal: EditGoal | None = None,
    **options: Any,
) -> TaskResult:
    """Get triggered examples right: those with 1 in the column `triggered`, each paired by `pair` with a clean one.

    A strength is trained for each component; `strength` changes that. Include clean examples of the attacker's class
    among the further choosing examples: they have no pair, and without them the model might forget that class.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples, used to choose.
        judge: Other examples, used to judge.
        goal: A goal to use instead.
        options: Options of `select`.

    Raises:
        GoalError: When a column is missing or pairs do not match, or see `select`.
    """
    goal = goal or _pairs("triggered", studied)
    return _reach(_Setup.of("backdoor", options), attributions, model, studied, judge, goal=goal, name="backdoor")


def resist_typographic(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    judge: Examples,
    *,
    goal: EditGoal | None = None,
    **options: Any,
) -> TaskResult:
    """Get attacked examples right: those with 1 in the column `attacked`, each paired by `pair` with a clean one.

    A strength is trained for each component; `strength` changes that.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples, used to choose.
        judge: Other examples, used to judge.
        goal: A goal to use instead.
        options: Options of `select`.

    Raises:
        GoalError: When a column is missing or pairs do not match, or see `select`.
    """
    goal = goal or _pairs("attacked", studied)
    setup = _Setup.of("typographic", options)
    return _reach(setup, attributions, model, studied, judge, goal=goal, name="typographic")


def fix_errors(
    attributions: Attributions, model: nn.Module, studied: Examples, judge: Examples, **options: Any
) -> TaskResult:
    """Correct each misclassified studied example in turn, each by a separate edit, if the bound allows one.

    The references are the studied examples that are classified correctly, and all further choosing examples. One target
    is weak evidence about others like it, so the choice seeks the least harm with a small margin for the target:
    components are ablated at the minimal strength that corrects it; `strength` changes that.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples.
        judge: Other examples, on which the harm is judged.
        options: Options of `select`.

    Raises:
        GoalError: When no studied example is misclassified.
        SettingsError: When the budget is out of range.
    """
    import pandas as pd

    setup = _Setup.of("fix", options)
    before, judged = setup.margins(model, studied), setup.margins(model, judge)
    wrong, right = np.flatnonzero(before <= 0), np.flatnonzero(before > 0)
    if not len(wrong):
        raise GoalError(f"the model classifies all {len(studied)} studied examples correctly; there is nothing to fix")
    context = SelectionContext.of(
        attributions,
        model,
        studied,
        choosing=setup.choosing,
        device=setup.device,
        precision=setup.precision,
        output=setup.output,
    )
    each = setup.selection.updated(progress=False)  # one bar for all errors
    rows, chosen, curves = [], [], []
    for i in progress_bar(wrong.tolist(), desc="fix", unit="error", shown=setup.selection.progress):
        goal = EditGoal(targets=(i,), references=tuple(right.tolist()), direction="increase")
        error, others = before[i : i + 1, None], judged[None]
        found = _correction(context, goal, each)
        if found is not None:
            chosen.append(found)
            error = setup.margins_along(found.edit, attributions, model, studied.subset([i]))
            others = setup.margins_along(found.edit, attributions, model, judge)
        identity = {name: np.asarray(column)[i] for name, column in studied.metadata.items()}
        strength = found.edit.strengths[0] if found else 0.0
        rows.append({**identity, **_before_and_after(error[:, 0], others, strength)})
        curves.append((error, others))
    judging = setup.judging(attributions, model, studied, judge)
    edits = tuple(one.edit for one in chosen)
    return TaskResult("fix", edits, pd.DataFrame(rows), _overview(curves), tuple(chosen), judging)


TASKS: dict[str, Callable[..., TaskResult]] = {
    "forget": forget_class,
    "fix": fix_errors,
    "group": strengthen_group,
    "backdoor": remove_backdoor,
    "typographic": resist_typographic,
}


def _reach(
    setup: _Setup,
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    judge: Examples,
    *,
    goal: EditGoal,
    name: str,
) -> TaskResult:
    """Edit the model for a goal by a setup, and judge it on other examples."""
    targets, references = goal.resolve(columns(judge))
    chosen = setup.select(attributions, model, studied, goal)
    table = judge_edit(chosen.edit, model, judge, device=setup.device, output=setup.output)
    seen = setup.margins_along(chosen.edit, attributions, model, judge)
    curve = _curve(seen, {"targets": targets, "references": references})
    judging = setup.judging(attributions, model, studied, judge)
    return TaskResult(name, (chosen.edit,), table, curve, (chosen,), judging)


def _correction(context: SelectionContext, goal: EditGoal, options: SelectionOptions) -> Selection | None:
    """Return a choice that gets all targets right, None where there is none within the bound."""
    try:
        found = select_in(context, goal, options)
    except BoundError:
        return None
    return found if found.after.targets == 1 else None


def _column_with(group: str | int | None, metadata: Columns) -> str:
    """Return the column of groups: `group`, or the only one with a value; raise `GoalError` when there are several."""
    if "group" in metadata or group is None:
        return "group"
    kinds = "U" if isinstance(group, str) else "biu"
    found = [
        name for name, values in metadata.items() if name != "id" and values.dtype.kind in kinds and group in values
    ]
    if len(found) != 1:
        raise GoalError(
            f"{len(found)} metadata columns have the value {group!r}{': ' if found else ''}{', '.join(found)}, of "
            f"{', '.join(sorted(metadata))}; name one by column="
        )
    return found[0]


def _pairs(column: str, studied: Examples) -> EditGoal:
    missing = [name for name in (column, "pair") if name not in studied.metadata]
    if missing:
        raise GoalError(f"the examples have no metadata column {missing[0]!r}; add it, or give a goal")
    return EditGoal(targets=f"{column} == 1", references=f"{column} == 0", direction="increase", pairs="pair")


def _before_and_after(error: np.ndarray, others: np.ndarray, strength: float) -> dict[str, Any]:
    """Return what an edit does, from (components + 1,) margins of the error and (components + 1, n) of others."""
    accuracy, right = (others > 0).mean(1), others[[0, -1]] > 0
    low, high = change_interval(right[0], right[1], np.arange(right.shape[1]))
    return {
        "components": len(error) - 1,
        "strength": strength,
        "corrected": bool(error[-1] > 0),
        "margin_before": float(error[0]),
        "margin_after": float(error[-1]),
        "judge_before": float(accuracy[0]),
        "judge_after": float(accuracy[-1]),
        "points": 100 * float(accuracy[-1] - accuracy[0]),
        "points_low": 100 * low,
        "points_high": 100 * high,
    }


def _curve(margins_by_count: np.ndarray, groups: dict[str, np.ndarray]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(
        {"components": count, "group": group, "accuracy": float((row[chosen] > 0).mean())}
        for group, chosen in groups.items()
        for count, row in enumerate(margins_by_count)
    )


def _overview(curves: list[tuple[np.ndarray, np.ndarray]]) -> "pd.DataFrame":
    """Return the curve over all errors; an edit with few components keeps its last margins where others have more."""
    longest = max(len(one) for one, _ in curves)
    errors, others = (
        np.concatenate([np.pad(part, ((0, longest - len(part)), (0, 0)), mode="edge") for part in parts], axis=1)
        for parts in zip(*curves, strict=True)
    )
    both = np.concatenate([errors, others], axis=1)
    return _curve(
        both, {"errors": np.arange(errors.shape[1]), "judged examples": np.arange(errors.shape[1], both.shape[1])}
    )
