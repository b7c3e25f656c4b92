"""95 % intervals of accuracies, and of their changes on the same examples.

The intervals cover the choice of examples. They hold for small numbers and for shares of 0 and 1. Where several
examples belong to one cluster, such as versions of one picture, the number of examples is divided by the design effect,
the ratio of the cluster-robust variance to that of independent examples, if that is above 1 (Korn and Graubard 1998).
"""

import math

import numpy as np

Z = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
Interval = tuple[float, float]


def share_interval(right: np.ndarray, clusters: np.ndarray) -> Interval:
    """Return Wilson's interval (Wilson 1927) of the share of True in (examples,) booleans."""
    share = float(right.mean())
    return _wilson(share, len(right) / _design_effect(right.astype(float), clusters))


def change_interval(before: np.ndarray, after: np.ndarray, clusters: np.ndarray) -> Interval:
    """Return the interval of the change of the share of True on the same examples.

    It combines Wilson's intervals of both shares by their correlation (Newcombe 1998, method 10).

    Args:
        before: (examples,) booleans.
        after: (examples,) booleans of the same examples.
        clusters: (examples,) numbers of their clusters.
    """
    change = after.astype(float) - before
    size = len(before) / _design_effect(change, clusters)
    old, new = float(before.mean()), float(after.mean())
    (old_low, old_high), (new_low, new_high) = _wilson(old, size), _wilson(new, size)
    varies = old not in (0.0, 1.0) and new not in (0.0, 1.0)
    together = float(np.corrcoef(before, after)[0, 1]) if varies else 0.0
    below = _distance(new - new_low, old_high - old, together)
    above = _distance(new_high - new, old - old_low, together)
    return max(new - old - below, -1.0), min(new - old + above, 1.0)


def mean_interval(means: np.ndarray, intervals: np.ndarray) -> Interval:
    """Return the interval of the average of independent means, from theirs (Zou and Donner 2008).

    Args:
        means: (groups,) means.
        intervals: (groups, 2) lower and upper ends of their intervals.
    """
    below, above = np.sqrt(((intervals - means[:, None]) ** 2).sum(0)) / len(means)
    return float(means.mean() - below), float(means.mean() + above)


def _wilson(share: float, size: float) -> Interval:
    centre = (share + Z**2 / (2 * size)) / (1 + Z**2 / size)
    half = Z / (1 + Z**2 / size) * math.sqrt(share * (1 - share) / size + Z**2 / (4 * size**2))
    return (0.0 if share == 0 else max(centre - half, 0.0)), (1.0 if share == 1 else min(centre + half, 1.0))


def _distance(one: float, other: float, correlation: float) -> float:
    return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))


def _design_effect(values: np.ndarray, clusters: np.ndarray) -> float:
    """Return by how much clusters enlarge the variance of a mean; their mean size if the values do not vary."""
    apart = values - values.mean()
    numbers = np.unique(clusters, return_inverse=True)[1]
    independent = float((apart**2).sum())
    if independent == 0:
        return len(values) / (int(numbers.max()) + 1)
    return max(float((np.bincount(numbers, apart) ** 2).sum()) / independent, 1.0)
