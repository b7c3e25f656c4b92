"""Predictions from attributions alone: what an edit does to mean outputs, and the set with the best effect."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from coar.attributions import Attributions, attribution_moments, group_means, mean_standard_errors
from coar.editing.edit import Edit
from coar.editing.goal import EditGoal
from coar.errors import EditError, GoalError

CANDIDATES = 2_000  # components that the programme chooses from; it has one unknown for each
WITHIN = 1.96  # standard errors on either side of a 95 % interval
SECONDS = 5.0  # after which the best choice found so far is taken


@dataclass(frozen=True)
class Change:
    """A predicted change of a mean output, with its 95 % interval.

    Attributes:
        mean: The predicted change.
        low: Lower end of the interval; NaN where the fit has no standard errors.
        high: Its upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:+.3f} (no interval, since the fit has no standard errors)"
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True)
class Prediction:
    """The predicted effect of an edit.

    Attributes:
        targets: Change of the targets' mean output.
        references: Change of the references' mean output.
        worst: Change of the mean output of the group of references whose output falls most.
        group: That group.
    """

    targets: Change
    references: Change
    worst: Change
    group: object


def predict_edit(attributions: Attributions, edit: Edit, *, goal: EditGoal | None = None) -> Prediction:
    """Predict what an edit does to targets and references, from the attributions alone.

    The prediction is a sum of weights, so it ignores interactions between components. Its interval covers the errors of
    the fitted weights, taken as fully correlated between examples and independent between components; and, where the
    fit states it, the scatter of outputs under random masks about the linear prediction, scaled to the number of
    ablated components. A fit without standard errors gives no interval. Attributions describe what the run's constants
    do, so an edit with constants trained for its goal is not predicted.

    Args:
        attributions: The attributions that the edit was chosen by.
        edit: The edit.
        goal: Targets and references; by default the edit's own.

    Raises:
        GoalError: When the edit has no goal and none is given.
        ComponentError: When the edit has a component that the attributions do not have.
        EditError: When the edit's constants are not those of the attributions' run, or it ablates in part.
    """
    if min(edit.strengths, default=1.0) < 1:
        raise EditError(
            f"this edit ablates in part, at a strength of {min(edit.strengths):.2f}, and attributions only predict "
            f"full ablation; judge the edit on examples, or choose at full strength"
        )
    if not np.array_equal(edit.constants(attributions), attributions.origin.constants):
        raise EditError(
            "this edit has constants trained for its goal, or of another run, and attributions only predict what the "
            "constants of their own run do; judge the edit on examples, or choose with constants='run'"
        )
    goal = goal or edit.goal
    if goal is None:
        raise GoalError("the edit has no goal of its own, since it joins edits with different ones; give goal=")
    chosen = np.array([attributions.components.index(component.name) for component in edit.components], dtype=np.int64)
    targets, references = goal.resolve(attributions.metadata)
    group = goal.groups_of(attributions.metadata, references)
    by_group = {name: _change(attributions, references[group == name], chosen) for name in np.unique(group).tolist()}
    worst = min(by_group, key=lambda name: by_group[name].mean)
    return Prediction(
        _change(attributions, targets, chosen), _change(attributions, references, chosen), by_group[worst], worst
    )


def best_predicted_set(
    attributions: Attributions, goal: EditGoal, ranking: np.ndarray, *, budget: int, max_loss: float
) -> np.ndarray:
    """Return the components that change the targets' mean output most, by prediction, within a limit on loss.

    An integer programme takes or leaves each component. A component's gain on targets is reduced by its standard error,
    so that noise is not chosen. No group of references may lose more than `max_loss` in mean output, by prediction.

    Args:
        attributions: The attributions of the examples that the goal names.
        goal: Targets, references and direction.
        ranking: (components,) indices by t, the first to ablate first, by which candidates are found too.
        budget: The most components.
        max_loss: The most that any group's mean output may fall, in units of the output.

    Returns:
        (components,) indices, the largest gain first.

    Raises:
        GoalError: When no component is predicted to help within the limit.
    """
    targets, references = goal.resolve(attributions.metadata)
    sign = 1.0 if goal.direction == "decrease" else -1.0
    gain = sign * attribution_moments(attributions, targets)[0] - mean_standard_errors(attributions, targets)
    group = goal.groups_of(attributions.metadata, references)
    loss = group_means(attributions, references, group)
    few = _promising(gain, loss, ranking, budget)
    if not len(few):
        raise GoalError(
            f"no component is predicted to {goal.direction} the targets' outputs by more than its standard error; "
            f"collect more masks or mask gradients, or choose other targets"
        )
    limits = LinearConstraint(np.vstack([loss[:, few], np.ones(len(few))]), ub=[*[max_loss] * len(loss), budget])
    solved = milp(
        -gain[few],
        constraints=limits,
        integrality=np.ones(len(few), dtype=np.int64),
        bounds=Bounds(0, 1),
        options={"time_limit": SECONDS, "mip_rel_gap": 1e-3},
    )
    taken = few[np.round(solved.x).astype(bool)] if solved.x is not None else few[:0]
    if not len(taken):
        raise GoalError(
            f"no component is predicted to {goal.direction} the targets' outputs at a loss of at most {max_loss:g} in "
            f"any group; raise max_loss"
        )
    return np.asarray(taken[np.argsort(-gain[taken], kind="stable")])


def _promising(gain: np.ndarray, loss: np.ndarray, order: np.ndarray, budget: int) -> np.ndarray:
    """Return the components that help by themselves, or that offset the losses of others, in ascending order."""
    worth = gain - np.maximum(loss, 0).max(0)
    found = [np.argsort(-gain, kind="stable"), np.argsort(-worth, kind="stable"), order]
    few = np.unique(np.concatenate([part[: max(CANDIDATES // 3, budget)] for part in found]))
    return few[gain[few] > 0]  # type: ignore[no-any-return]


def _change(attributions: Attributions, rows: np.ndarray, chosen: np.ndarray) -> Change:
    """Return the predicted change of these examples' mean output when components are ablated."""
    mean = -float(attribution_moments(attributions, rows)[0][chosen].sum())
    if not attributions.has_standard_errors:
        return Change(mean, math.nan, math.nan)
    error = mean_standard_errors(attributions, rows)[chosen]
    spread = WITHIN * math.sqrt(float((error**2).sum()) + _scatter(attributions, error, len(chosen)))
    return Change(mean, mean - spread, mean + spread)


def _scatter(attributions: Attributions, error: np.ndarray, ablated: int) -> float:
    """Return the variance about the linear prediction with so many components ablated, as far as the fit states it.

    With m masks of ablated fraction p a weight's variance is about the residual's over m p (1 - p). Residuals under
    masks that ablate p d components are taken to grow in proportion to that number.
    """
    masks, fraction = attributions.fit.masks, attributions.fit.ablated_fraction
    if not masks or not fraction or not len(error):
        return 0.0
    residual = float(np.mean(error**2)) * masks * fraction * (1 - fraction)
    return residual * min(ablated / (fraction * len(attributions.components)), 1.0)
