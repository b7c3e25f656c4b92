"""How far components go towards their constants: the least strength that does what whole ablations do."""

from collections.abc import Sequence

import numpy as np

from coar.editing.evaluator import GatedEvaluator
from coar.editing.objective import Objective

CLEAR = 0.2  # margin beyond which a target counts as changed for sure, in units of the trade-off's scale
ROUNDS = 6  # of looking between a strength that is too little and one that is enough


def least_strengths(
    trials: GatedEvaluator, objective: Objective, sets: Sequence[tuple[int, ...]], constants: np.ndarray
) -> np.ndarray:
    """Return the (sets,) least strengths at which sets of components have the effect on targets of whole ablations.

    That is, as many targets are as wanted, and clearly so. The strength is looked for between none and whole by
    regula falsi (the Illinois rule), which supposes that the effect grows with the strength; what is returned is one
    that was tried and is enough, or 1 where the whole ablation changes no more targets than are as wanted already.

    Args:
        trials: Where strengths are tried, on targets alone.
        objective: The trade-off.
        sets: Components that are ablated together.
        constants: (components.width,) constants in their place.
    """
    if not sets:
        return np.ones(0)
    rows, scales = objective.targets, objective.scales[objective.targets]

    def tried(strengths: np.ndarray) -> np.ndarray:
        """Return (sets, targets) margins in units of the scale, negative where a target is as wanted."""
        gates = np.stack([trials.gates(one, strength) for one, strength in zip(sets, strengths, strict=True)])
        return np.asarray(trials.margins(gates, rows, constants=constants) / scales)

    none, whole = objective.base[rows] / scales, tried(np.ones(len(sets)))
    wanted = (whole < 0).sum(1)
    low, high = np.zeros(len(sets)), np.ones(len(sets))
    at_low, at_high = (_lacking(levels, wanted) for levels in (np.broadcast_to(none, whole.shape), whole))
    partly = (wanted > (none < 0).sum()) & (at_high <= 0)
    raised = lowered = np.zeros(len(sets), dtype=bool)  # which end the last round moved
    for _ in range(ROUNDS):
        between = high + (high - low) * at_high / np.where(partly, at_low - at_high, 1)
        middle = np.where(partly, between, 1)
        found = _lacking(tried(middle), wanted)
        enough = found <= 0
        # an end that stays for a second time weighs half, or the other would creep towards what is looked for
        at_low = np.where(enough, np.where(lowered, at_low / 2, at_low), found)
        at_high = np.where(enough, found, np.where(raised, at_high / 2, at_high))
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        raised, lowered = ~enough, enough
    return np.where(partly, high, 1.0)


def _lacking(levels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return (sets,) by how much the last of the wanted targets falls short, from (sets, targets) margins in scales."""
    last = np.take_along_axis(np.sort(levels, axis=1), np.maximum(wanted, 1)[:, None] - 1, axis=1)
    return np.asarray(last[:, 0] + CLEAR)
