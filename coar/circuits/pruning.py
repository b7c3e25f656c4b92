"""Scores from gradual pruning: the circuit shrinks in steps while constants are trained for what remains."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from coar.circuits.constants import Draws, TrainedConstants
from coar.circuits.evaluator import CircuitEvaluator
from coar.circuits.method import Report, Scored, ScoringMethod, on_cpu


class GradualPruning(ScoringMethod):
    """How long an edge remains while a circuit shrinks, with constants trained for what remains.

    The first circuit has the edges with the largest gradients at the full model, as by EAP. Every step takes the
    gradient of the KL divergence by all gates and constants under the present circuit, on some examples. Constants go
    down their gradient. The next circuit, which is smaller by a constant factor, has the edges with the largest size of
    a running mean of gradients; an edge that was dropped comes back if its gradient is large again. The score is the
    last step at which the edge was in the circuit, ties by the running mean.

    Attributes:
        steps: Number of steps, each a gradient on `examples` examples.
        examples: Examples per step.
        largest: Size of the first circuit, as a share of all edges.
        smallest: Size of the last circuit.
        memory: Weight of the past in the running mean, per step.
        constants_rate: Learning rate of constants, in standard deviations of a channel; 0 leaves the ablation's.
        seed: Seed of the order of the examples.
    """

    label: ClassVar[str] = "gradual"

    steps: int = Field(default=40, ge=2)
    examples: int = Field(default=16, ge=1)
    largest: float = Field(default=0.8, gt=0, lt=1)
    smallest: float = Field(default=0.001, gt=0, lt=1)
    memory: float = Field(default=0.8, ge=0, lt=1)
    constants_rate: float = Field(default=0.1, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**63)

    def steps_of(self, evaluator: CircuitEvaluator) -> int:  # noqa: ARG002
        """Return the number of steps, and one for the gradient at the full model."""
        return self.steps + 1

    def score(self, evaluator: CircuitEvaluator, report: Report) -> Scored:
        """Return the last step of every edge, and the constants of the last step."""
        value = evaluator.gradients(evaluator.everything(), loss="output").by_keep.abs()
        report(1)
        draw, trained = Draws(len(evaluator), self.seed), None
        if evaluator.by_constants and self.constants_rate:
            trained = TrainedConstants(evaluator, evaluator.constants, self.constants_rate)
        mean, last = torch.zeros_like(value), torch.zeros_like(value)
        for step in range(self.steps):
            keep = evaluator.graph.connected(_largest(value, self._size(step, len(value)))).float()
            last[keep > 0] = step + 1
            rows = draw(self.examples)
            found = evaluator.gradients(keep, constants=trained.present() if trained else None, rows=rows)
            unit = found.by_keep / found.by_keep.square().mean().sqrt().clamp_min(1e-30)
            mean = self.memory * mean + (1 - self.memory) * unit
            value = mean.abs()
            if trained:
                trained.step(found.by_constants / len(rows), 1 - 0.9 * step / self.steps)
            report(1)
        ties = value / (2 * value.max().clamp_min(1e-30))
        return Scored(on_cpu(last) + on_cpu(ties), trained.present().cpu() if trained else None)

    def _size(self, step: int, edges: int) -> int:
        """Return the number of edges at a step, counted from 0; sizes are a geometric series."""
        share: float = self.largest * (self.smallest / self.largest) ** (step / (self.steps - 1))
        return max(round(share * edges), 1)


def _largest(values: Tensor, count: int) -> Tensor:
    """Return the mask of the largest values."""
    keep = torch.zeros_like(values)
    keep[values.topk(count).indices] = 1
    return keep
