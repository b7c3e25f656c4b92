"""How far components go towards their constants: the least strength that does what whole ablations do."""

from collections.abc import Sequence

import numpy as np

from coar.editing.tradeoff import Objective
from coar.editing.trials import Trials

CLEAR = 0.2  # margin beyond which a target counts as changed for sure, in units of the trade-off's scale
ROUNDS = 6  # of looking between a strength that is too little and one that is enough


def least_strengths(
    trials: Trials, objective: Objective, sets: Sequence[tuple[int, ...]], constants: np.ndarray
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
    rows = objective.targets
    levels = objective.base[rows] / objective.scales[rows]
    if not sets:
        return np.ones(0)

    def tried(strengths: np.ndarray) -> np.ndarray:
        gates = np.stack([trials.gates(one, strength) for one, strength in zip(sets, strengths, strict=True)])
        return np.asarray(trials.margins(gates, rows, constants=constants) / objective.scales[rows])

    whole = tried(np.ones(len(sets)))
    wanted = (whole < 0).sum(1)
    low, high = np.zeros(len(sets)), np.ones(len(sets))
    at_low, at_high = _lacking(np.repeat(levels[None], len(sets), axis=0), wanted), _lacking(whole, wanted)
    weaker = (wanted > (levels < 0).sum()) & (at_high <= 0)
    side = np.zeros(len(sets))
    for _ in range(ROUNDS):
        with np.errstate(divide="ignore", invalid="ignore"):
            between = high - (high - low) * at_high / (at_high - at_low)
        middle = np.where(weaker, between, 1.0)
        found = _lacking(tried(middle), wanted)
        enough = found <= 0
        again = np.where(enough, side == 1, side == -1)  # the same end moved twice, so the other one weighs half
        at_low = np.where(enough, np.where(again, at_low / 2, at_low), found)
        at_high = np.where(enough, found, np.where(again, at_high / 2, at_high))
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        side = np.where(enough, 1, -1)
    return np.where(weaker, high, 1.0)


def _lacking(levels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return (sets,) by how much the last of the wanted targets falls short, from (sets, targets) margins in scales."""
    last = np.take_along_axis(np.sort(levels, axis=1), np.maximum(wanted, 1)[:, None] - 1, axis=1)
    return np.asarray(last[:, 0] + CLEAR)
