"""Scores from gradual pruning: the circuit shrinks in steps while constants are trained for what remains."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from coar.circuits.constants import Draws, TrainedConstants
from coar.circuits.evaluator import CircuitEvaluator
from coar.circuits.method import Report, Scored, ScoringMethod, on_cpu

FEWEST = 10  # edges of the last circuit at least
FLOOR = 0.1  # nats added to a divergence before gradients are divided by its root


class GradualPruning(ScoringMethod):
    """How long an edge remains while a circuit shrinks, with constants trained for what remains.

    An edge's importance is the root mean square, over examples, of the gradient by its gate. A mean would lose edges
    whose effect differs in sign between examples; their constant replaces the mean effect anyway. The first circuit has
    the edges with the largest importance for the output at the full model. Every step takes the gradient of the KL
    divergence by all gates and constants under the present circuit, on some examples. Constants go down their gradient.
    Squares of gradients, divided by each example's divergence, enter a running mean. The next circuit, which is smaller
    by a constant factor, has the edges with the largest mean; an edge that was dropped comes back if its gradient is
    large again. The score is the last step at which the edge was in the circuit, ties by the running mean.

    Attributes:
        steps: Number of steps, each a gradient on `examples` examples.
        examples: Examples per step.
        first: Examples of the gradient at the full model.
        largest: Size of the first circuit, as a share of all edges.
        smallest: Size of the last circuit, as a share of all edges; it has at least 10.
        memory: Weight of the past in the running mean, per step.
        constants_rate: Learning rate of constants, in standard deviations of a channel; 0 leaves the ablation's.
        seed: Seed of the order of the examples.
    """

    label: ClassVar[str] = "gradual"

    steps: int = Field(default=40, ge=2)
    examples: int = Field(default=8, ge=1)
    first: int = Field(default=64, ge=1)
    largest: float = Field(default=0.8, gt=0, lt=1)
    smallest: float = Field(default=0.001, gt=0, lt=1)
    memory: float = Field(default=0.8, ge=0, lt=1)
    constants_rate: float = Field(default=0.03, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**63)

    def steps_of(self, evaluator: CircuitEvaluator) -> int:  # noqa: ARG002
        """Return the number of steps, and one for the gradient at the full model."""
        return self.steps + 1

    def score(self, evaluator: CircuitEvaluator, report: Report) -> Scored:
        """Return the last step of every edge, and the constants of each step."""
        draw, trained = Draws(len(evaluator), self.seed), None
        if evaluator.by_constants and self.constants_rate:
            trained = TrainedConstants(evaluator, evaluator.constants, self.constants_rate)
        rows = Draws(len(evaluator), self.seed)(self.first)
        everything = evaluator.everything().expand(len(rows), -1)
        value = _mean_square(evaluator.gradients(everything, loss="output", rows=rows).by_keep)
        report(1)
        last, constants = torch.zeros_like(value), {}
        for step in range(self.steps):
            size = self._size(step, len(value))
            keep = evaluator.graph.connected(_largest(value, size)).float()
            last[keep > 0] = step + 1
            rows = draw(self.examples)
            found = evaluator.gradients(
                keep.expand(len(rows), -1), constants=trained.present() if trained else None, rows=rows
            )
            unit = found.by_keep / (found.losses[:, None] + FLOOR).sqrt()
            value = self.memory * value + (1 - self.memory) * _mean_square(unit)
            if trained:
                trained.step(found.by_constants / len(rows), 1.0)
                constants[size] = trained.present().cpu()
            report(1)
        ties = value / (2 * value.max().clamp_min(1e-30))
        return Scored(on_cpu(last) + on_cpu(ties), constants)

    def _size(self, step: int, edges: int) -> int:
        """Return the number of edges at a step, counted from 0; sizes are a geometric series."""
        first = max(round(self.largest * edges), 1)
        last = min(max(round(self.smallest * edges), FEWEST), first)
        size: float = first * (last / first) ** (step / (self.steps - 1))
        return round(size)


def _mean_square(slopes: Tensor) -> Tensor:
    """Return (components,) mean squares over examples, as multiples of their own mean."""
    squares = slopes.square().mean(0)
    return squares / squares.mean().clamp_min(1e-30)


def _largest(values: Tensor, count: int) -> Tensor:
    """Return the mask of the largest values."""
    keep = torch.zeros_like(values)
    keep[values.topk(count).indices] = 1
    return keep
