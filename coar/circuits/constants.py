"""Constants of writers trained for one circuit: those under which it diverges least from the model."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from coar.circuits.evaluator import CircuitEvaluator, Loss

BATCH = 8  # examples per step
RATE = 0.03  # of Adam, in standard deviations of a channel; it falls linearly to a fifth
WARM = 3  # first steps, in which the rate rises: Adam moves every channel by the whole rate at once
BETAS = (0.9, 0.98)
AVERAGED = 0.25  # share of the steps, the last ones, whose constants are averaged


class Draws:
    """Draws the examples of a step: all in a random order, then again in another.

    Args:
        count: Number of examples.
        seed: Seed of the order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._rng = count, np.random.default_rng(seed)
        self._order = np.zeros(0, dtype=np.int64)

    def __call__(self, size: int) -> np.ndarray:
        """Return the positions of the next examples, all different where there are as many."""
        size = min(size, self._count)
        if len(self._order) < size:
            self._order = self._rng.permutation(self._count)
        found, self._order = self._order[:size], self._order[size:]
        return found


class TrainedConstants:
    """Constants on their way from initial ones, by Adam in units of each channel's standard deviation.

    Args:
        evaluator: Gives the spread of every channel.
        start: (components.width,) initial constants.
        rate: Learning rate of the first steps, in standard deviations.
    """

    def __init__(self, evaluator: CircuitEvaluator, start: Tensor, rate: float = RATE) -> None:
        self._start, self._spread, self._rate = start, evaluator.spread, rate
        self._moved, self._steps = torch.zeros_like(start), 0
        self._adam = torch.optim.Adam([self._moved], lr=rate, betas=BETAS)

    def present(self) -> Tensor:
        """Return the (components.width,) constants as they are now."""
        return self._start + self._spread * self._moved

    def step(self, slopes: Tensor, share: float) -> None:
        """Go down (components.width,) slopes of the mean loss; `share` of the learning rate is used."""
        self._moved.grad = slopes * self._spread
        self._steps += 1
        self._adam.param_groups[0]["lr"] = self._rate * share * min(1.0, self._steps / WARM)
        self._adam.step()


def train_constants(
    evaluator: CircuitEvaluator,
    keep: Tensor,
    *,
    start: Tensor | None = None,
    steps: int = 100,
    loss: Loss = "kl",
    seed: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Return the (components.width,) constants with the smallest mean loss of the examples under one mask.

    This is optimal ablation of one circuit (Li and Janson 2024, "Optimal ablation for interpretability"). Constants of
    the last quarter of the steps are averaged.

    Args:
        evaluator: Runs the learning examples.
        keep: (components,) mask.
        start: (components.width,) initial constants; by default the ablation's.
        steps: Number of steps, each a gradient on 8 examples.
        loss: `kl` or `output`, see `CircuitEvaluator.gradients`.
        seed: Seed of the order of the examples.
        on_step: Called after each step.
    """
    trained = TrainedConstants(evaluator, evaluator.constants if start is None else start)
    draw, last = Draws(len(evaluator), seed), max(round(AVERAGED * steps), 1)
    total = torch.zeros_like(evaluator.constants)
    for step in range(steps):
        rows = draw(BATCH)
        slopes = evaluator.constant_gradients(keep, loss=loss, constants=trained.present(), rows=rows)[1]
        trained.step(slopes / len(rows), 1 - 0.8 * step / steps)
        if step >= steps - last:
            total += trained.present()
        on_step()
    return total / last
