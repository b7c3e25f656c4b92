"""Constants made for a goal: what ablated components become is trained, so that the trade-off is best."""

import numpy as np

from coar.editing.descent import Adam, ExampleDraws
from coar.editing.evaluator import GatedEvaluator
from coar.editing.objective import Objective

STEPS = 40
RATE = 0.2  # of the first steps, in standard deviations of a channel; the last are a tenth as long
PULL = 0.01  # towards where the constants started: slope of the trade-off per standard deviation away from there


def train(
    trials: GatedEvaluator,
    objective: Objective,
    ablated: tuple[int, ...],
    *,
    start: np.ndarray,
    strengths: float | np.ndarray = 1.0,
    among: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Return (components.width,) constants for which ablating these components has the best trade-off.

    This is optimal ablation (Li and Janson 2024) with the goal's trade-off in the place of the expected loss, and one
    set of ablated components in the place of random ones. Adam takes steps in units of each channel's standard
    deviation; constants are drawn back to where they started, and those of the last half of the steps are averaged.
    Experts of a mixture keep theirs, since weights without biases could not hold others.

    Args:
        trials: Where gradients are taken.
        objective: The trade-off.
        ablated: The components.
        start: (components.width,) constants to begin with; those of components that are kept stay.
        strengths: How far the components go towards their constants.
        among: From which examples references are drawn; by default from all.
        seed: Which examples are drawn.
    """
    open_to_it = [i for i in ablated if trials.table[i].side != "expert"]
    if not open_to_it:
        return start.copy()
    draw = ExampleDraws(objective, seed, among)
    channels = trials.table.channels_of(open_to_it)
    spread = trials.spread[channels]
    moved, total = np.zeros(len(channels)), np.zeros(len(channels))  # in standard deviations
    adam = Adam(np.zeros(len(channels)), np.zeros(len(channels)))
    constants: np.ndarray = start.copy()
    gates = trials.gates(ablated, strengths)
    for step in range(STEPS):
        rows, shares = draw()

        def slopes(margins: np.ndarray, rows: np.ndarray = rows, shares: np.ndarray = shares) -> np.ndarray:
            return np.asarray(shares * objective.slopes(margins, rows))

        gradient = trials.weighted_gradients(gates, rows, constants=constants, slopes=slopes)[0][channels]
        moved += RATE * (1 - 0.9 * step / STEPS) * adam.step(spread * gradient + PULL * moved)
        constants[channels] = start[channels] + spread * moved
        if step >= STEPS // 2:
            total += moved
    constants[channels] = start[channels] + spread * total / (STEPS - STEPS // 2)
    return constants
