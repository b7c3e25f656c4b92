"""Ready tasks: forget a class, and fix single errors, chosen on some examples and judged on others."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from coar.attributions import Attributions
from coar.editing.edits import Edit, check_budget, edit_of, ranking, welch_t
from coar.editing.goals import EditGoal
from coar.editing.judging import effect_curve, judge_edit, margins
from coar.errors import GoalError
from coar.examples import Examples

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

MOST = 40  # components that are tried without a budget
HARM = 6.0  # how much a point of accuracy lost on references weighs against a point taken from the targets


@dataclass(frozen=True)
class TaskResult:
    """What a task did.

    Attributes:
        name: Name of the task, such as `forget-3`.
        edits: The edits it chose; one per corrected example for `fix`.
        table: Before and after, on examples that no choice has seen.
        curve: Accuracy of each group (`group`, `accuracy`) against the number of ablated components (`components`).
    """

    name: str
    edits: tuple[Edit, ...]
    table: "pd.DataFrame"
    curve: "pd.DataFrame"


def reach_goal(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    judge: Examples,
    *,
    goal: EditGoal,
    name: str,
    budget: int | None = None,
    device: str = "auto",
) -> TaskResult:
    """Edit the model for a goal, and judge it on other examples.

    Components are ranked by Welch's t. Without a budget, the number (1 to 40) is the one with the best trade-off on the
    studied examples: accuracy of the targets, to be lowered or raised, plus six times the accuracy lost on references.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples, used to choose.
        judge: Other examples, used to judge.
        goal: Targets and references, as conditions that both sets of examples can answer.
        name: Name of the result.
        budget: How many components to ablate.
        device: Where to compute.

    Raises:
        GoalError: When the studied or judging examples have no targets or no references.
        SettingsError: When the budget is out of range.
    """
    _check_studied(attributions, studied)
    scores = welch_t(attributions, goal)
    order = ranking(scores, goal)
    counts = _counts(budget, len(order))
    groups = dict(zip(("targets", "references"), goal.resolve(_columns(judge)), strict=True))
    if budget is None:
        targets, references = goal.resolve(attributions.metadata)
        correct = effect_curve(model, attributions, order, studied, counts=counts, device=device) > 0
        reached, kept = correct[:, targets].mean(1), correct[:, references].mean(1)
        missed = reached if goal.direction == "decrease" else 1 - reached
        budget = int((missed + HARM * (kept[0] - kept))[1:].argmin()) + 1
        if budget == counts[-1]:
            log.warning("the best trade-off is at %d components, the most that are tried; try a larger budget", budget)
    edit = edit_of(attributions, goal, order[: check_budget(budget, len(order))], scores)
    table = judge_edit(edit, model, judge, device=device)
    seen = effect_curve(model, attributions, order, judge, counts=counts, device=device)
    return TaskResult(name, (edit,), table, _curve(seen, counts, groups))


def forget_class(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    judge: Examples,
    *,
    label: int,
    budget: int | None = None,
    device: str = "auto",
) -> TaskResult:
    """Make the model fail on one class and leave the others as they are: `reach_goal` with the class as targets.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples, used to choose.
        judge: Other examples, used to judge.
        label: The class to forget.
        budget: How many components to ablate; by default the best trade-off, 40 at most.
        device: Where to compute.

    Raises:
        GoalError: When the studied or judging examples have none of the class or none of the others.
    """
    goal = EditGoal(targets=f"label == {label}", references=f"label != {label}", direction="decrease")
    return reach_goal(
        attributions, model, studied, judge, goal=goal, name=f"forget-{label}", budget=budget, device=device
    )


def fix_errors(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    judge: Examples,
    *,
    budget: int | None = None,
    device: str = "auto",
) -> TaskResult:
    """Correct each misclassified studied example in turn, each by an edit of its own.

    The references are the studied examples that are classified correctly. Components are ranked by Welch's t (bottom t
    first). Without a budget, the fewest are taken that correct the example, 40 at most.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples.
        judge: Other examples, on which the harm is judged.
        budget: How many components to ablate for every example.
        device: Where to compute.

    Raises:
        GoalError: When no studied example is misclassified.
        SettingsError: When the budget is out of range.
    """
    import pandas as pd

    _check_studied(attributions, studied)
    if budget is not None:
        check_budget(budget, len(attributions.components))
    before = margins(model, studied, device=device)
    wrong, right = np.flatnonzero(before <= 0), np.flatnonzero(before > 0)
    if not len(wrong):
        raise GoalError(f"the model classifies all {len(studied)} studied examples correctly; there is nothing to fix")
    counts = _counts(budget, len(attributions.components))
    rows, edits, curves = [], [], []
    for i in wrong.tolist():
        goal = EditGoal(targets=(i,), references=tuple(right.tolist()), direction="increase")
        scores = welch_t(attributions, goal)
        order = ranking(scores, goal)
        own = effect_curve(model, attributions, order, studied.subset([i]), counts=counts, device=device)[:, 0]
        others = effect_curve(model, attributions, order, judge, counts=counts, device=device)
        fewest = int((own > 0).argmax()) if (own > 0).any() else int(own.argmax())
        count = budget or fewest  # counts are 0, 1, 2, ..., so that a count is its own row
        identity = {name: np.asarray(column)[i] for name, column in studied.metadata.items()}
        rows.append({**identity, **_before_and_after(own, others, count)})
        edits.append(edit_of(attributions, goal, order[:count], scores))
        curves.append((own, others))
    own = np.stack([own for own, _ in curves], axis=1)  # (counts, errors)
    others = np.concatenate([curve for _, curve in curves], axis=1)  # (counts, errors * judged examples)
    overview = [
        _curve(own, counts, {"errors": np.arange(own.shape[1])}),
        _curve(others, counts, {"judged examples": np.arange(others.shape[1])}),
    ]
    return TaskResult("fix", tuple(edits), pd.DataFrame(rows), pd.concat(overview, ignore_index=True))


def _before_and_after(own: np.ndarray, others: np.ndarray, count: int) -> dict[str, Any]:
    """Return what ablating `count` components does, from (counts,) margins of the error and (counts, n) of others."""
    accuracy = (others > 0).mean(1)
    return {
        "components": count,
        "corrected": bool(own[count] > 0),
        "margin_before": float(own[0]),
        "margin_after": float(own[count]),
        "judge_before": float(accuracy[0]),
        "judge_after": float(accuracy[count]),
        "points": 100 * float(accuracy[count] - accuracy[0]),
    }


def _check_studied(attributions: Attributions, studied: Examples) -> None:
    if not np.array_equal(attributions.metadata["id"], np.asarray(studied.metadata["id"])):
        raise GoalError(
            f"the {len(studied)} studied examples are not the {len(attributions)} that have attributions by their ids; "
            f"give the examples of the study"
        )


def _counts(budget: int | None, components: int) -> list[int]:
    most = max(MOST, budget or 0)
    return list(range(min(most, components) + 1))


def _columns(examples: Examples) -> dict[str, np.ndarray]:
    return {name: np.asarray(column) for name, column in examples.metadata.items()}


def _curve(margins_by_count: np.ndarray, counts: Sequence[int], groups: dict[str, np.ndarray]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(
        {"components": count, "group": group, "accuracy": float((row[chosen] > 0).mean())}
        for group, chosen in groups.items()
        for count, row in zip(counts, margins_by_count, strict=True)
    )
