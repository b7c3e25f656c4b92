"""A descent over gates between open and closed: candidates for an edit, all of them moved at once by mask gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from coar.editing.evaluator import GatedEvaluator
from coar.editing.objective import Objective

STEPS = 120
BATCH = (48, 112)  # targets and references per mask gradient
RATE = 0.05  # of the first steps; the last are a tenth as long
COST = 0.002  # of each closed gate, in units of the trade-off, unless another cost is given
PUSH = 0.02  # towards open or closed at the last steps; nothing in the first quarter
DECAY = (0.8, 0.99)  # of the running means of slopes and of their squares (Adam, Kingma and Ba 2015)


@dataclass
class Adam:
    """Running means of slopes, and steps of even size from them."""

    slope: np.ndarray
    square: np.ndarray
    count: int = 0

    def step(self, slopes: np.ndarray) -> np.ndarray:
        """Return the step for these slopes, about one in size while they agree."""
        first, second = DECAY
        self.count += 1
        self.slope = first * self.slope + (1 - first) * slopes
        self.square = second * self.square + (1 - second) * slopes**2
        mean, square = self.slope / (1 - first**self.count), self.square / (1 - second**self.count)
        return -mean / (np.sqrt(square) + 1e-8)


def descend(
    trials: GatedEvaluator,
    objective: Objective,
    free: np.ndarray,
    *,
    budget: int | None = None,
    steps: int = STEPS,
    cost: float = COST,
    seed: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Return (components,) gates, near 0 for those that an edit should ablate and 1 for those it should keep.

    Each step is one mask gradient of a few examples at the present gates: its gradient says at once for every component
    how the trade-off would move. Gates may stand in between on the way, so that components are tried together, given up
    and taken back; towards the end they are pushed to either side.

    Args:
        trials: Where mask gradients are made.
        objective: The trade-off.
        free: Components whose gates may move.
        budget: How many may be closed; gates become dearer while there are more.
        steps: Number of mask gradients.
        cost: What a closed gate costs, in units of the trade-off.
        seed: Which examples are drawn.
        on_step: Called after each step.
    """
    draw = ExampleDraws(objective, seed)
    gates, adam = np.ones(trials.components), Adam(np.zeros(len(free)), np.zeros(len(free)))
    least = cost
    for step in range(steps):
        rows, shares = draw()
        margins, by_gate = trials.slopes(gates, rows)
        slopes = (shares * objective.slopes(margins, rows)) @ by_gate[:, free]
        now = gates[free]
        push = PUSH * max(0.0, (step / steps - 0.25) / 0.75)
        if budget is not None and step > steps // 5:
            cost *= 1.05 if (now < 0.5).sum() > budget else 0.98
            cost = max(cost, least)
        moved = adam.step(slopes - cost + push * (1 - 2 * now))
        gates[free] = np.clip(now + RATE * (1 - 0.9 * step / steps) * moved, 0, 1)
        on_step()
    return gates


class ExampleDraws:
    """Draws targets and references for one step after another, each with the share of the trade-off it stands for.

    Args:
        objective: The trade-off.
        seed: Which examples are drawn.
        among: From which references; by default from all.
    """

    def __init__(self, objective: Objective, seed: int, among: np.ndarray | None = None) -> None:
        references = objective.references if among is None else np.intersect1d(among, objective.references)
        rng = np.random.default_rng(seed)
        self._drawn = [_Draw(rows, objective.weights, rng) for rows in (objective.targets, references)]

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the next (examples,) rows and their shares."""
        parts = [draw(count) for draw, count in zip(self._drawn, BATCH, strict=True)]
        rows, shares = (np.concatenate(part) for part in zip(*parts, strict=True))
        return rows, shares


class _Draw:
    """Draws examples evenly over groups, with the share of the trade-off that each stands for."""

    def __init__(self, rows: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> None:
        self._rows, self._total, self._rng = rows, weights[rows].sum(), rng
        self._chances = weights[rows] / self._total

    def __call__(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return so many examples, or all there are, and their shares."""
        if count >= len(self._rows):
            return self._rows, self._total * self._chances
        chosen = self._rng.choice(self._rows, count, replace=False, p=self._chances)
        return chosen, np.full(count, self._total / count)
