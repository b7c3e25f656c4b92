"""Components ranked by their attributions alone: Welch's t, as published, and its paired form."""

import numpy as np

from coar.attributions import BLOCK, Attributions
from coar.editing.goal import EditGoal
from coar.errors import GoalError

NUMBERS = 2**24  # attributions held at a time


def welch_t(attributions: Attributions, goal: EditGoal) -> np.ndarray:
    """Return (components,) t statistics of the targets' attributions against the references' (COAR-Edit).

    This is Welch's t, as published, or the t of the differences where the goal has pairs. A single target has no
    variance of its own; its share of the standard error is then taken as zero, so that the score is its distance from
    the references' mean in units of that mean's standard error.

    Raises:
        GoalError: When there are fewer than two references.
    """
    targets, references = goal.resolve(attributions.metadata)
    if len(references) < 2:
        raise GoalError("there is one reference, which tells nothing of the spread; give two or more")
    if goal.pairs is not None:
        mean, variance = attribution_moments(attributions, targets, references[: len(targets)])
        difference, error = mean, np.sqrt(variance / len(targets))
    else:
        near, far = attribution_moments(attributions, targets), attribution_moments(attributions, references)
        difference, error = near[0] - far[0], np.sqrt(near[1] / len(targets) + far[1] / len(references))
    return difference / np.maximum(error, np.finfo(np.float64).tiny)


def ranking(scores: np.ndarray, goal: EditGoal) -> np.ndarray:
    """Return component indices, the ones to ablate first in front: top t to decrease an output, bottom to increase."""
    return np.argsort(-scores if goal.direction == "decrease" else scores, kind="stable")


def candidates(attributions: Attributions, goal: EditGoal, count: int) -> np.ndarray:
    """Return about `count` components worth a search, the best first.

    They are taken in turn from three rankings: by t, which finds what is specific to the targets; by the targets' mean
    attribution less its noise, which finds what is strong; and by the difference of means less its noise. Noise is the
    mean standard error of the fit's weights, where it has any, since errors of one component go together in examples.
    """
    if count >= len(attributions.components):
        return ranking(welch_t(attributions, goal), goal)
    targets, references = goal.resolve(attributions.metadata)
    sign = 1.0 if goal.direction == "decrease" else -1.0
    near = sign * attribution_moments(attributions, targets)[0]
    gap = near - sign * attribution_moments(attributions, references)[0]
    unsure = noise(attributions, targets)
    orders = (ranking(welch_t(attributions, goal), goal), np.argsort(unsure - near), np.argsort(unsure - gap))
    in_turn = np.stack(orders, axis=1).ravel()
    _, first = np.unique(in_turn, return_index=True)
    return in_turn[np.sort(first)[:count]]


def noise(attributions: Attributions, rows: np.ndarray) -> np.ndarray:
    """Return (components,) mean standard errors of these examples' attributions, zeros where the fit has none.

    The mean, not the error of a mean: errors of one component go together in examples that are alike.
    """
    total = np.zeros(len(attributions.components))
    if attributions.has_standard_errors:
        for part in _parts(attributions, rows):
            total += attributions.standard_errors(part).sum(0, dtype=np.float64)
    return total / len(rows)


def group_means(attributions: Attributions, rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return (groups, components) mean attributions of each group, in the order of `np.unique`, in one reading."""
    names, of, counts = np.unique(groups, return_inverse=True, return_counts=True)
    sums = np.zeros((len(names), len(attributions.components)))
    for part, here in zip(_parts(attributions, rows), _parts(attributions, of), strict=True):
        sums += np.equal.outer(np.arange(len(names)), here).astype(np.float32) @ attributions.weights(part)
    return sums / counts[:, None]


def _parts(attributions: Attributions, rows: np.ndarray) -> list[np.ndarray]:
    """Cut rows into parts whose attributions fit the memory easily, however many components there are."""
    step = min(BLOCK, max(NUMBERS // len(attributions.components), 1))
    return [rows[at : at + step] for at in range(0, len(rows), step)]


def attribution_moments(
    attributions: Attributions, rows: np.ndarray, others: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (components,) mean and unbiased variance over examples, or over differences, read a block at a time."""
    count, mean, squares = 0, np.zeros(len(attributions.components)), np.zeros(len(attributions.components))
    both = (_parts(attributions, side) for side in (rows, rows if others is None else others))
    for part, other in zip(*both, strict=True):
        weights = attributions.weights(part).astype(np.float64)
        if others is not None:
            weights -= attributions.weights(other)
        here = weights.mean(0)
        gap, total = here - mean, count + len(weights)
        squares += ((weights - here) ** 2).sum(0) + gap**2 * count * len(weights) / total
        mean, count = mean + gap * len(weights) / total, total
    return mean, squares / max(count - 1, 1)
