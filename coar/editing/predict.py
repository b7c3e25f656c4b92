"""Choices by attributions alone, for those without the data: an integer programme, and how sure its prediction is."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from coar.attributions import Attributions
from coar.editing.edit import Edit, check_budget, edit_of
from coar.editing.goal import EditGoal
from coar.editing.rank import attribution_moments, group_means, noise, ranking, welch_t
from coar.errors import EditError, GoalError, SettingsError

CANDIDATES = 2_000  # components that the programme chooses from; it has one unknown for each
WITHIN = 1.96  # standard errors on either side of a 95 % interval
SECONDS = 5.0  # after which the best choice found so far is taken


@dataclass(frozen=True)
class Change:
    """A predicted change of a mean output, with its 95 % interval.

    Attributes:
        mean: The predicted change.
        low: Lower end of the interval.
        high: Its upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True)
class Prediction:
    """What attributions say an edit does.

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

    The prediction adds up weights, so it takes no notice of components that stand in for each other. Its interval
    covers the errors of the fitted weights, as if these went together in all examples and were independent between
    components; and, where the fit tells it, the scatter of outputs under random masks about the linear prediction,
    scaled to as many components as are ablated. Attributions know what happens when components become the constants of
    their run, so an edit with constants made for its goal is not predicted.

    Args:
        attributions: The attributions that the edit was chosen by.
        edit: The edit.
        goal: Targets and references; by default the edit's own.

    Raises:
        GoalError: When the edit has no goal and none is given.
        ComponentError: When the edit has a component that the attributions do not know.
        EditError: When the edit's constants are not those of the attributions' run, or it ablates in part.
    """
    if min(edit.strengths, default=1.0) < 1:
        raise EditError(
            f"this edit ablates in part, at a strength of {min(edit.strengths):.2f}, and attributions only predict "
            f"what whole ablations do; judge the edit on examples, or choose at full strength"
        )
    if not np.array_equal(edit.constants(attributions), np.float32(attributions.facts["replacements"])):
        raise EditError(
            "this edit has constants made for its goal, or of another run, and attributions only predict what the "
            "constants of their own run do; judge the edit on examples, or choose with constants='run'"
        )
    goal = goal or edit.goal
    if goal is None:
        raise GoalError("the edit has no goal of its own, since it joins edits with different ones; give goal=")
    chosen = np.array([attributions.components.index(component.name) for component in edit.components], dtype=np.int64)
    targets, references = goal.resolve(attributions.metadata)
    of = goal.groups_of(attributions.metadata, references)
    by_group = {name: _change(attributions, references[of == name], chosen) for name in np.unique(of).tolist()}
    worst = min(by_group, key=lambda name: by_group[name].mean)
    return Prediction(
        _change(attributions, targets, chosen), _change(attributions, references, chosen), by_group[worst], worst
    )


def predicted_edit(attributions: Attributions, goal: EditGoal, *, budget: int, harm: float = 0.5) -> Edit:
    """Choose the components that change the targets' mean output most, by prediction, within a bound on harm.

    An integer programme takes or leaves each component. What it gains on targets counts less its standard error, so
    that noise is not chosen. No group of references may lose more than `harm` in mean output, by prediction.

    Args:
        attributions: The attributions of the examples that the goal speaks of.
        goal: Targets, references and direction.
        budget: The most components to ablate.
        harm: The most that any group's mean output may fall, in units of the output.

    Raises:
        GoalError: When the goal does not fit the examples, or no component is predicted to help within the bound.
        SettingsError: When budget or harm is out of range.
    """
    most = check_budget(budget, len(attributions.components))
    if not (math.isfinite(harm) and harm >= 0):
        raise SettingsError(f"a harm of {harm} was given; give the output that a group may lose, 0 or more")
    scores = welch_t(attributions, goal)
    targets, references = goal.resolve(attributions.metadata)
    sign = 1.0 if goal.direction == "decrease" else -1.0
    sure = sign * attribution_moments(attributions, targets)[0] - noise(attributions, targets)
    of = goal.groups_of(attributions.metadata, references)
    loss = group_means(attributions, references, of)
    few = _worth_it(sure, loss, ranking(scores, goal), most)
    if not len(few):
        raise GoalError(
            f"no component is predicted to {goal.direction} the targets' outputs by more than its standard error; "
            f"collect more masks or mask gradients, or choose other targets"
        )
    bounds = LinearConstraint(np.vstack([loss[:, few], np.ones(len(few))]), ub=[*[harm] * len(loss), most])
    solved = milp(
        -sure[few],
        constraints=bounds,
        integrality=np.ones(len(few), dtype=np.int64),
        bounds=Bounds(0, 1),
        options={"time_limit": SECONDS, "mip_rel_gap": 1e-3},
    )
    taken = few[np.round(solved.x).astype(bool)] if solved.x is not None else few[:0]
    if not len(taken):
        raise GoalError(
            f"no component is predicted to {goal.direction} the targets' outputs at a loss of at most {harm:g} in any "
            f"group; widen harm"
        )
    order = taken[np.argsort(-sure[taken], kind="stable")]
    return edit_of(attributions, goal, order, scores)


def _worth_it(sure: np.ndarray, loss: np.ndarray, order: np.ndarray, budget: int) -> np.ndarray:
    """Return the components that help, or that give back to a group what others take, most promising first."""
    worth = sure - np.maximum(loss, 0).max(0)
    found = [np.argsort(-sure, kind="stable"), np.argsort(-worth, kind="stable"), order]
    few = np.unique(np.concatenate([part[: max(CANDIDATES // 3, budget)] for part in found]))
    return few[sure[few] > 0]  # type: ignore[no-any-return]


def _change(attributions: Attributions, rows: np.ndarray, chosen: np.ndarray) -> Change:
    """Return the predicted change of these examples' mean output when components are ablated."""
    mean = -float(attribution_moments(attributions, rows)[0][chosen].sum())
    error = noise(attributions, rows)[chosen]
    spread = WITHIN * math.sqrt(float((error**2).sum()) + _scatter(attributions, error, len(chosen)))
    return Change(mean, mean - spread, mean + spread)


def _scatter(attributions: Attributions, error: np.ndarray, ablated: int) -> float:
    """Return the variance about the linear prediction with so many components ablated, as far as the fit tells it.

    With m masks of ablated fraction p a weight's variance is about the residual's over m p (1 - p). Residuals under
    masks that ablate p d components are taken to grow in proportion to that number.
    """
    fitted = attributions.facts["fit"]
    masks, fraction = int(fitted.get("masks", 0)), float(fitted.get("ablated_fraction", 0))
    if not masks or not fraction or not len(error):
        return 0.0
    residual = float(np.mean(error**2)) * masks * fraction * (1 - fraction)
    return residual * min(ablated / (fraction * len(attributions.components)), 1.0)
