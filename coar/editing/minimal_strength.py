"""The minimal strength: the smallest at which a set of components does to targets what full ablation does."""

from collections.abc import Sequence

import numpy as np

from coar.editing.evaluator import GatedEvaluator
from coar.editing.objective import Objective

CLEAR_MARGIN = 0.2  # beyond which a target counts as clearly changed, in units of the trade-off's scale
ROUNDS = 6  # of regula falsi between a strength that is too small and one that suffices


def minimal_strengths(
    evaluator: GatedEvaluator, objective: Objective, sets: Sequence[tuple[int, ...]], constants: np.ndarray
) -> np.ndarray:
    """Return the (sets,) smallest strengths at which sets of components change as many targets as full ablation does.

    Each of these targets must be changed by `CLEAR_MARGIN`. The strength is found between 0 and 1 by regula falsi (the
    Illinois rule), which assumes that the effect grows with the strength. The result is a strength that was tried and
    suffices, or 1 where full ablation changes no more targets than are changed already.

    Args:
        evaluator: Where strengths are tried, on targets alone.
        objective: The trade-off.
        sets: Components that are ablated together.
        constants: (components.width,) constants in their place.
    """
    if not sets:
        return np.ones(0)
    rows, scales = objective.targets, objective.scales[objective.targets]

    def levels_at(strengths: np.ndarray) -> np.ndarray:
        """Return (sets, targets) margins in units of the scale, negative where a target is changed."""
        gates = np.stack([evaluator.gates(one, strength) for one, strength in zip(sets, strengths, strict=True)])
        return np.asarray(evaluator.margins(gates, rows, constants=constants) / scales)

    unablated, full = objective.base[rows] / scales, levels_at(np.ones(len(sets)))
    required = (full < 0).sum(1)
    low, high = np.zeros(len(sets)), np.ones(len(sets))
    at_low, at_high = (_shortfall(levels, required) for levels in (np.broadcast_to(unablated, full.shape), full))
    partial = (required > (unablated < 0).sum()) & (at_high <= 0)
    raised = lowered = np.zeros(len(sets), dtype=bool)  # which end the last round moved
    for _ in range(ROUNDS):
        between = high + (high - low) * at_high / np.where(partial, at_low - at_high, 1)
        middle = np.where(partial, between, 1)
        found = _shortfall(levels_at(middle), required)
        enough = found <= 0
        # an end that stays for a second time weighs half, or the other would approach the root too slowly
        at_low = np.where(enough, np.where(lowered, at_low / 2, at_low), found)
        at_high = np.where(enough, found, np.where(raised, at_high / 2, at_high))
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        raised, lowered = ~enough, enough
    return np.where(partial, high, 1.0)


def _shortfall(levels: np.ndarray, required: np.ndarray) -> np.ndarray:
    """Return (sets,) by how much the last of the required targets falls short, from (sets, targets) scaled margins."""
    last = np.take_along_axis(np.sort(levels, axis=1), np.maximum(required, 1)[:, None] - 1, axis=1)
    return np.asarray(last[:, 0] + CLEAR_MARGIN)
