"""Ready tasks: a goal, the examples and the bound that go with it, chosen on some examples and judged on others."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, cast

import numpy as np
from torch import nn

from coar.attributions import Attributions
from coar.editing.context import SelectionContext, columns
from coar.editing.edit import Edit
from coar.editing.goal import EditGoal
from coar.editing.judge import effect_curve, judge_edit, margins
from coar.editing.objective import Bound, TradeOff
from coar.editing.select import Selection, choose, select
from coar.editing.select import SelectionOptions as Choice
from coar.errors import BoundError, GoalError
from coar.examples import Examples
from coar.forward.execution_plan import Precision
from coar.outputs.base import Output
from coar.progress import progress_bar

if TYPE_CHECKING:
    import pandas as pd

PRESETS: dict[str, Choice] = {
    # half of the mean for the standard error, as with some 3,000 references; trained constants harm no less here
    "forget": {"bound": Bound(mean=0.006, group=0.03), "constants": "run"},
    # one target needs few mask gradients, and moves few references that are far from the edge; that it is moved no
    # further than it must, and that references keep their margins too, is what spares examples that the choice has not
    # seen
    "fix": {
        "bound": Bound(mean=0.005, group=0.05),
        "strength": "minimal",
        "tradeoff": TradeOff(target_scale=0.5, reference_scale=3.0),
        "steps": 40,
        "n_boundary_references": 600,
    },
    "group": {"bound": Bound(mean=0.01, group=0.05)},
    # what was put in shares its components with what it was put into, and comes out of many of them in part
    "backdoor": {
        "bound": Bound(mean=0.005, group=0.05),
        "strength": "per_component",
        "tradeoff": TradeOff(harm=4.0, reference_scale=4.0),
        "steps": 600,
    },
    # reading is spread over many components, each of them of use to seeing
    "typographic": {
        "bound": Bound(mean=0.005, group=0.05),
        "strength": "per_component",
        "tradeoff": TradeOff(harm=16.0, reference_scale=4.0),
    },
}


class TaskOptions(Choice, total=False):
    """What every task passes on to `select`, see there."""

    choosing: Examples | None
    device: str
    precision: Precision
    output: Output | None


class _Judging(TypedDict):
    device: str
    output: Output | None


@dataclass(frozen=True)
class TaskResult:
    """What a task did.

    Attributes:
        name: Name of the task, such as `forget-3`.
        edits: The edits it chose; one per corrected example for `fix`.
        table: Before and after, on examples that no choice has seen.
        curve: Accuracy of each group (`group`, `accuracy`) against the number of ablated components (`components`).
        selections: How the edits were chosen, one each.
    """

    name: str
    edits: tuple[Edit, ...]
    table: "pd.DataFrame"
    curve: "pd.DataFrame"
    selections: tuple[Selection, ...] = ()


def reach_goal(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    judge: Examples,
    *,
    goal: EditGoal,
    name: str,
    **options: Unpack[TaskOptions],
) -> TaskResult:
    """Edit the model for a goal, and judge it on other examples.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples, used to choose.
        judge: Other examples, used to judge.
        goal: Targets and references, as conditions that both sets of examples can answer.
        name: Name of the result.
        options: Any of the options of `select`.

    Raises:
        GoalError: When the studied or judging examples have no targets or no references, or see `select`.
        SettingsError: When the budget is out of range.
    """
    targets, references = goal.resolve(columns(judge))
    chosen = select(attributions, model, studied, goal, **options)
    judging = _judging(options)
    table = judge_edit(chosen.edit, model, judge, **judging)
    seen = _along(chosen.edit, attributions, model, judge, judging)
    curve = _curve(seen, {"targets": targets, "references": references})
    return TaskResult(name, (chosen.edit,), table, curve, (chosen,))


def forget_class(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    judge: Examples,
    *,
    label: int,
    **options: Unpack[TaskOptions],
) -> TaskResult:
    """Make the model fail on one class and leave the others as they are: `reach_goal` with the class as targets.

    The other classes may lose 0.6 points on average on the choosing examples, standard error included, and none 3,
    and components are replaced by the run's constants, unless `bound` and `constants` say other.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples, used to choose.
        judge: Other examples, used to judge.
        label: The class to forget.
        options: Any of the options of `select`.

    Raises:
        GoalError: When the studied or judging examples have none of the class or none of the others, or see `select`.
    """
    goal = EditGoal(targets=f"label == {label}", references=f"label != {label}", direction="decrease")
    settings = preset("forget", options)
    return reach_goal(attributions, model, studied, judge, goal=goal, name=f"forget-{label}", **settings)


def strengthen_group(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    judge: Examples,
    *,
    group: str | int | None = None,
    goal: EditGoal | None = None,
    **options: Unpack[TaskOptions],
) -> TaskResult:
    """Raise a subpopulation's accuracy: the values of the metadata column `group`, by default the worst of them.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples, used to choose.
        judge: Other examples, used to judge.
        group: The group to strengthen; by default the one with the lowest accuracy among the studied examples.
        goal: A goal to take instead.
        options: Any of the options of `select`.

    Raises:
        GoalError: When there is no column `group` or no such group in it, or see `select`.
    """
    if goal is None:
        if "group" not in studied.metadata:
            raise GoalError("the examples have no metadata column 'group'; add one, or give a goal")
        of = np.asarray(studied.metadata["group"])
        if group is None:
            right = margins(model, studied, **_judging(options)) > 0
            group = min(np.unique(of), key=lambda one: right[of == one].mean()).item()
        conditions = {"targets": f"group == {group!r}", "references": f"group != {group!r}"}
        goal = EditGoal(**conditions, direction="increase", groups="group")
    return reach_goal(attributions, model, studied, judge, goal=goal, name="group", **preset("group", options))


def remove_backdoor(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    judge: Examples,
    *,
    goal: EditGoal | None = None,
    **options: Unpack[TaskOptions],
) -> TaskResult:
    """Get triggered examples right: those with 1 in the column `triggered`, each paired by `pair` with a clean one.

    Components are ablated in part, each at a strength of its own, unless `strength` says other. Give clean examples of
    the class that the attacker wants among the further choosing ones: they have no pair, and without them the model
    might forget that class.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples, used to choose.
        judge: Other examples, used to judge.
        goal: A goal to take instead.
        options: Any of the options of `select`.

    Raises:
        GoalError: When a column is missing or pairs do not match, or see `select`.
    """
    goal = goal or _pairs("triggered", studied)
    return reach_goal(attributions, model, studied, judge, goal=goal, name="backdoor", **preset("backdoor", options))


def resist_typographic(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    judge: Examples,
    *,
    goal: EditGoal | None = None,
    **options: Unpack[TaskOptions],
) -> TaskResult:
    """Get attacked examples right: those with 1 in the column `attacked`, each paired by `pair` with a clean one.

    Components are ablated in part, each at a strength of its own, unless `strength` says other.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples, used to choose.
        judge: Other examples, used to judge.
        goal: A goal to take instead.
        options: Any of the options of `select`.

    Raises:
        GoalError: When a column is missing or pairs do not match, or see `select`.
    """
    goal = goal or _pairs("attacked", studied)
    settings = preset("typographic", options)
    return reach_goal(attributions, model, studied, judge, goal=goal, name="typographic", **settings)


def fix_errors(
    attributions: Attributions, model: nn.Module, studied: Examples, judge: Examples, **options: Unpack[TaskOptions]
) -> TaskResult:
    """Correct each misclassified studied example in turn, each by an edit of its own, if the bound allows one.

    The references are the studied examples that are classified correctly, and all further choosing examples. One
    target says little of others like it, so what is sought is the least harm with a small margin for the target:
    components are ablated in part, at the least strength that corrects it, unless `strength` says other.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples.
        judge: Other examples, on which the harm is judged.
        options: Any of the options of `select`.

    Raises:
        GoalError: When no studied example is misclassified.
        SettingsError: When the budget is out of range.
    """
    import pandas as pd

    settings: dict[str, Any] = {**preset("fix", options)}
    where = {name: settings.pop(name) for name in ("choosing", "device", "precision", "output") if name in settings}
    shown, judging = settings.get("progress", True), _judging(options)
    before, judged = margins(model, studied, **judging), margins(model, judge, **judging)
    wrong, right = np.flatnonzero(before <= 0), np.flatnonzero(before > 0)
    if not len(wrong):
        raise GoalError(f"the model classifies all {len(studied)} studied examples correctly; there is nothing to fix")
    settings["progress"] = False  # one bar is enough
    ground = SelectionContext.of(attributions, model, studied, **where)
    rows, chosen, curves = [], [], []
    for i in progress_bar(wrong.tolist(), desc="fix", unit="error", shown=shown):
        goal = EditGoal(targets=(i,), references=tuple(right.tolist()), direction="increase")
        own, others = before[i : i + 1, None], judged[None]
        found = _reached(ground, goal, **settings)
        if found is not None:
            chosen.append(found)
            own = _along(found.edit, attributions, model, studied.subset([i]), judging)
            others = _along(found.edit, attributions, model, judge, judging)
        identity = {name: np.asarray(column)[i] for name, column in studied.metadata.items()}
        strength = found.edit.strengths[0] if found else 0.0
        rows.append({**identity, **_before_and_after(own[:, 0], others, strength)})
        curves.append((own, others))
    return TaskResult("fix", tuple(one.edit for one in chosen), pd.DataFrame(rows), _overview(curves), tuple(chosen))


TASKS: dict[str, Callable[..., TaskResult]] = {
    "forget": forget_class,
    "fix": fix_errors,
    "group": strengthen_group,
    "backdoor": remove_backdoor,
    "typographic": resist_typographic,
}


def _reached(ground: SelectionContext, goal: EditGoal, **settings: Unpack[Choice]) -> Selection | None:
    """Return a choice that gets all targets right, None where there is none within the bound."""
    try:
        found = choose(ground, goal, **settings)
    except BoundError:
        return None
    return found if found.after.targets == 1 else None


def _pairs(column: str, studied: Examples) -> EditGoal:
    missing = [name for name in (column, "pair") if name not in studied.metadata]
    if missing:
        raise GoalError(f"the examples have no metadata column {missing[0]!r}; add it, or give a goal")
    return EditGoal(targets=f"{column} == 1", references=f"{column} == 0", direction="increase", pairs="pair")


def preset(task: str, options: TaskOptions) -> TaskOptions:
    """Return the options of a task, with its own settings for those that are missing or None.

    The published ranking ablates wholly, unless the options say other.
    """
    given = {name: value for name, value in options.items() if value is not None}
    published = {"strength": "full"} if given.get("rule") == "welch" else {}
    return cast(TaskOptions, {**PRESETS[task], **published, **given})


def _judging(options: TaskOptions) -> _Judging:
    return {"device": options.get("device", "auto"), "output": options.get("output")}


def _along(
    edit: Edit, attributions: Attributions, model: nn.Module, examples: Examples, judging: _Judging
) -> np.ndarray:
    """Return (components + 1, examples) margins as an edit's components are ablated one after another."""
    order = [attributions.components.index(component.name) for component in edit.components]
    counts, constants = range(len(order) + 1), edit.constants(attributions)
    seen = (model, attributions, order, examples)
    return effect_curve(*seen, counts=counts, constants=constants, strengths=edit.strengths, **judging)


def _before_and_after(own: np.ndarray, others: np.ndarray, strength: float) -> dict[str, Any]:
    """Return what an edit does, from (components + 1,) margins of the error and (components + 1, n) of others."""
    accuracy = (others > 0).mean(1)
    return {
        "components": len(own) - 1,
        "strength": strength,
        "corrected": bool(own[-1] > 0),
        "margin_before": float(own[0]),
        "margin_after": float(own[-1]),
        "judge_before": float(accuracy[0]),
        "judge_after": float(accuracy[-1]),
        "points": 100 * float(accuracy[-1] - accuracy[0]),
    }


def _curve(margins_by_count: np.ndarray, groups: dict[str, np.ndarray]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(
        {"components": count, "group": group, "accuracy": float((row[chosen] > 0).mean())}
        for group, chosen in groups.items()
        for count, row in enumerate(margins_by_count)
    )


def _overview(curves: list[tuple[np.ndarray, np.ndarray]]) -> "pd.DataFrame":
    """Average over errors; an edit with few components stays as it is while others go on."""
    longest = max(len(own) for own, _ in curves)
    own, others = (
        np.concatenate([np.pad(part, ((0, longest - len(part)), (0, 0)), mode="edge") for part in parts], axis=1)
        for parts in zip(*curves, strict=True)
    )
    both = np.concatenate([own, others], axis=1)
    return _curve(both, {"errors": np.arange(own.shape[1]), "judged examples": np.arange(own.shape[1], both.shape[1])})
