"""Strengths of their own: how far each component goes towards its constants is trained, and these with it."""

from collections.abc import Callable

import numpy as np

from coar.editing.descent import Adam, ExampleDraws
from coar.editing.evaluator import GatedEvaluator
from coar.editing.objective import Objective

STEPS = 300
RATE = 0.05  # of the first steps, in strength and in standard deviations of a channel; the last are a tenth as long
COST = 0.0003  # of strength, in units of the trade-off, so that components which do not matter are left as they are
PULL = 0.002  # towards where constants started, for what is ablated: slope of the trade-off per standard deviation
AVERAGED = 0.25  # of the steps, the last ones, are averaged
TOUCHED = 0.02  # least strength of a component that counts as part of the edit


def train_strengths(
    trials: GatedEvaluator,
    objective: Objective,
    free: np.ndarray,
    *,
    steps: int = STEPS,
    seed: int = 0,
    moves: bool = True,
    on_step: Callable[[], object] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (components,) gates and (components.width,) constants that have the best trade-off together.

    Gates are 1 less the strengths, and stay between 0, ablated, and 1. Each step is one mask gradient of a few
    examples, whose gradients by all gates and constants are followed at once. References count by how much margin they
    lose, and targets also by how much they lack of their partner's, see `Objective.losses`. Experts of a mixture keep
    their constants, since weights without biases could not hold others.

    Args:
        trials: Where mask gradients are made.
        objective: The trade-off.
        free: Components whose gates may move.
        steps: Number of mask gradients.
        seed: Which examples are drawn.
        moves: Whether constants move too.
        on_step: Called after each step.
    """
    draw, wanted = ExampleDraws(objective, seed), objective.wanted(trials.smooth_margins())
    open_to_it = [i for i in free if moves and trials.table[i].side != "expert"]
    channels = trials.table.channels_of(open_to_it)
    of = np.repeat(open_to_it, [trials.table[i].size for i in open_to_it]).astype(np.int64)  # component by channel
    spread, start = trials.spread[channels], trials.constants
    gates, constants, moved = np.ones(trials.components, dtype=np.float32), start.copy(), np.zeros(len(channels))
    by_gate, by_channel = (Adam(np.zeros(count), np.zeros(count)) for count in (len(free), len(channels)))
    total = np.zeros(len(free)), np.zeros(len(channels))
    last = max(round(AVERAGED * steps), 1)
    for step in range(steps):
        rows, shares = draw()

        def slopes(margins: np.ndarray, rows: np.ndarray = rows, shares: np.ndarray = shares) -> np.ndarray:
            return np.asarray(shares * objective.losses(margins, wanted[rows], rows))

        of_constants, of_gates = trials.weighted_gradients(gates, rows, constants=constants, slopes=slopes)
        rate = RATE * (1 - 0.9 * step / steps)
        back = PULL * moved * (1 - gates[of])
        moved += rate * by_channel.step(spread * of_constants[channels] + back)
        gates[free] = np.clip(gates[free] + rate * by_gate.step(of_gates[free] - COST), 0, 1)
        constants[channels] = start[channels] + spread * moved
        if step >= steps - last:
            total[0][:] += gates[free]
            total[1][:] += moved
        on_step()
    gates[free], constants[channels] = total[0] / last, start[channels] + spread * total[1] / last
    gates[gates > 1 - TOUCHED] = 1
    return gates, constants
