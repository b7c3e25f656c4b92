"""Rankings of components by their attributions alone: Welch's t, as published, and its paired form."""

import numpy as np

from coar.attributions import BLOCK, Attributions
from coar.editing.goal import EditGoal
from coar.errors import GoalError

NUMBERS = 2**24  # attributions held at a time


def welch_t(attributions: Attributions, goal: EditGoal) -> np.ndarray:
    """Return (components,) t statistics of the targets' attributions against the references' (COAR-Edit).

    This is Welch's t, (mean_T - mean_R) / sqrt(var_T / n_T + var_R / n_R), as published (Shah et al. 2024, section 5),
    or the t of the differences where the goal has pairs. A single target has no variance; its share of the standard
    error is taken as zero, so the score is its distance from the references' mean in standard errors of that mean.

    Raises:
        GoalError: When there are fewer than two references.
    """
    targets, references = goal.resolve(attributions.metadata)
    if len(references) < 2:
        raise GoalError("there is one reference, and a variance needs two; give two or more references")
    if goal.pairs is not None:
        mean, variance = attribution_moments(attributions, targets, references[: len(targets)])
        difference, error = mean, np.sqrt(variance / len(targets))
    else:
        (mean, variance), (other_mean, other_variance) = (
            attribution_moments(attributions, rows) for rows in (targets, references)
        )
        difference = mean - other_mean
        error = np.sqrt(variance / len(targets) + other_variance / len(references))
    return difference / np.maximum(error, np.finfo(np.float64).tiny)


def ranking(scores: np.ndarray, goal: EditGoal) -> np.ndarray:
    """Return component indices, the first to ablate first: largest t to decrease an output, smallest to increase it."""
    return np.argsort(-scores if goal.direction == "decrease" else scores, kind="stable")


def candidates(attributions: Attributions, goal: EditGoal, count: int) -> np.ndarray:
    """Return about `count` components worth a search, the best first.

    They are taken in turn from three rankings: by t, which finds components specific to the targets; by the targets'
    mean attribution less its noise, which finds strong components; and by the difference of means less its noise. Noise
    is the mean standard error of the fit's weights, where it has any, see `noise`.
    """
    if count >= len(attributions.components):
        return ranking(welch_t(attributions, goal), goal)
    targets, references = goal.resolve(attributions.metadata)
    sign = 1.0 if goal.direction == "decrease" else -1.0
    mean = sign * attribution_moments(attributions, targets)[0]
    difference = mean - sign * attribution_moments(attributions, references)[0]
    error = noise(attributions, targets)
    orders = (ranking(welch_t(attributions, goal), goal), np.argsort(error - mean), np.argsort(error - difference))
    in_turn = np.stack(orders, axis=1).ravel()
    _, first = np.unique(in_turn, return_index=True)
    return in_turn[np.sort(first)[:count]]


def noise(attributions: Attributions, rows: np.ndarray) -> np.ndarray:
    """Return (components,) mean standard errors of these examples' attributions, zeros where the fit has none.

    The errors of one component are correlated between similar examples, so they are not reduced by averaging.
    """
    total = np.zeros(len(attributions.components))
    if attributions.has_standard_errors:
        for part in _parts(attributions, rows):
            total += attributions.standard_errors(part).sum(0, dtype=np.float64)
    return total / len(rows)


def group_means(attributions: Attributions, rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return (groups, components) mean attributions of each group, in the order of `np.unique`."""
    names, of, counts = np.unique(groups, return_inverse=True, return_counts=True)
    sums = np.zeros((len(names), len(attributions.components)))
    for part, here in zip(_parts(attributions, rows), _parts(attributions, of), strict=True):
        sums += np.equal.outer(np.arange(len(names)), here).astype(np.float32) @ attributions.weights(part)
    return sums / counts[:, None]


def _parts(attributions: Attributions, rows: np.ndarray) -> list[np.ndarray]:
    """Split rows into parts of at most `NUMBERS` attributions each."""
    step = min(BLOCK, max(NUMBERS // len(attributions.components), 1))
    return [rows[at : at + step] for at in range(0, len(rows), step)]


def attribution_moments(
    attributions: Attributions, rows: np.ndarray, others: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (components,) mean and unbiased variance over examples, or over differences, one block at a time."""
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
