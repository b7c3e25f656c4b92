"""Scores from keep probabilities that are learned by sampling masks: UGS and hard concrete gates (HCGS)."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from coar.circuits.constants import Draws, TrainedConstants
from coar.circuits.evaluator import CircuitEvaluator, Loss
from coar.circuits.method import Report, Scored, ScoringMethod, on_cpu
from coar.components.edges import ARROW

CLIP = 5.0  # largest norm of a gradient by all parameters
KEPT = 0.5  # keep probability of an edge that counts as kept
NODE_PENALTY = 2e-4  # of UGS, at most, in nats
LOW, HIGH, BETA = -0.1, 1.1, 2 / 3  # of hard concrete gates


class LearnedKeepRates(ScoringMethod):
    """Base of methods that learn a probability to keep each edge, on the mean loss plus a cost of every kept edge.

    One set of probabilities, with constants trained along where the ablation has any, goes down the gradient by AdamW.
    Edges that lead nowhere are removed from every sampled mask.

    Attributes:
        steps: Number of steps.
        examples: Examples per step.
        masks: Masks per example.
        penalty: Cost of one kept edge, in nats; it decides how many edges remain.
        rate: Learning rate of the parameters.
        constants_rate: Learning rate of constants, in standard deviations of a channel; 0 leaves the ablation's.
        loss: `kl` or `output`.
        seed: Seed of masks and of the order of the examples.
    """

    steps: int = Field(default=3000, ge=1)
    examples: int = Field(default=5, ge=1)
    masks: int = Field(default=12, ge=1)
    penalty: float = Field(default=1e-3, ge=0)
    rate: float = Field(default=0.1, gt=0)
    constants_rate: float = Field(default=0.02, ge=0)
    loss: Loss = "kl"
    seed: int = Field(default=0, ge=0, lt=2**63)

    def steps_of(self, evaluator: CircuitEvaluator) -> int:  # noqa: ARG002
        """Return the number of steps."""
        return self.steps

    def score(self, evaluator: CircuitEvaluator, report: Report) -> Scored:
        """Return the probabilities, as parameters that rise with them, and the constants."""
        draw, rows = torch.Generator().manual_seed(self.seed), Draws(len(evaluator), self.seed)
        theta = torch.full((evaluator.components,), self.initial())
        adam = torch.optim.AdamW([theta], lr=self.rate, betas=(0.9, 0.995), weight_decay=0.0)
        trained, writers = None, writers_of(evaluator.study.components.names)
        if evaluator.by_constants and self.constants_rate:
            trained = TrainedConstants(evaluator, evaluator.constants, self.constants_rate)
        for _ in range(self.steps):
            chosen = rows(self.examples).repeat(self.masks)
            uniform = torch.rand(len(chosen), evaluator.components, generator=draw)
            masks = self.sampled(theta, uniform)
            masks = masks * evaluator.graph.connected(masks)
            found = evaluator.gradients(
                masks.to(evaluator.device),
                loss=self.loss,
                constants=trained.present() if trained else None,
                rows=chosen,
            )
            slopes = self.slopes(theta, uniform, found.by_keep.cpu() / len(chosen)) + self.cost(theta, writers)
            theta.grad = slopes * min(1.0, CLIP / float(slopes.norm().clamp_min(1e-12)))
            adam.step()
            if trained:
                trained.step(found.by_constants / len(chosen), 1.0)
            report(1)
        kept = torch.sigmoid(theta)
        return Scored(on_cpu(kept), {int((kept > KEPT).sum()): trained.present().cpu()} if trained else {})

    @abstractmethod
    def initial(self) -> float:
        """Return the initial parameter of every edge."""

    @abstractmethod
    def sampled(self, theta: Tensor, uniform: Tensor) -> Tensor:
        """Return (rows, components) masks from (components,) parameters and (rows, components) uniform numbers."""

    @abstractmethod
    def slopes(self, theta: Tensor, uniform: Tensor, by_mask: Tensor) -> Tensor:
        """Return the (components,) gradient of the mean loss by the parameters.

        Args:
            theta: (components,) parameters.
            uniform: (rows, components) uniform numbers that the masks were made of.
            by_mask: (rows, components) gradient of the mean loss by the masks.
        """

    @abstractmethod
    def cost(self, theta: Tensor, writers: Tensor) -> Tensor:
        """Return the (components,) gradient, by the parameters, of what kept edges cost.

        Args:
            theta: (components,) parameters.
            writers: (components,) the number of the writer of each edge.
        """


class UniformGradientSampling(LearnedKeepRates):
    """Keep probabilities p = sigmoid(theta), learned from gradients at uniformly drawn gates (UGS).

    With a uniform number u and the window v = p (1 - p), a gate is 1 where u < p - v / 2, 0 where u > p + v / 2 and
    linear between. A gate inside the window is uniform between 0 and 1, so the mean gradient there is an unbiased
    estimate of the change of the loss from 0 to 1 (Li and Janson 2024, "Optimal ablation for interpretability"). The
    mean is over the masks in the window. In addition to edges, writers cost: one is kept unless all of its edges are
    ablated, so with probability 1 - product over its edges of (1 - p).

    Attributes:
        node_penalty: Cost of one kept writer, in nats; by default half of `penalty`, and at most 0.0002.
    """

    label: ClassVar[str] = "ugs"

    node_penalty: float | None = Field(default=None, ge=0)

    def initial(self) -> float:
        """Return 1."""
        return 1.0

    def sampled(self, theta: Tensor, uniform: Tensor) -> Tensor:
        """Return masks that are linear within the window."""
        p = torch.sigmoid(theta)
        window = p * (1 - p)
        return ((p + window / 2 - uniform) / window.clamp_min(1e-6)).clamp(0, 1)

    def slopes(self, theta: Tensor, uniform: Tensor, by_mask: Tensor) -> Tensor:
        """Return the mean gradient of the masks in the window, times dp / dtheta."""
        p = torch.sigmoid(theta)
        window = p * (1 - p)
        inside = (uniform - p).abs() < window / 2
        total = (by_mask * inside).sum(0) * len(uniform)
        return total / inside.sum(0).clamp_min(1) * window

    def cost(self, theta: Tensor, writers: Tensor) -> Tensor:
        """Return dp / dtheta, times the penalty and what the probability of the writer adds to it."""
        p = torch.sigmoid(theta)
        node = min(self.penalty / 2, NODE_PENALTY) if self.node_penalty is None else self.node_penalty
        absent = torch.nn.functional.logsigmoid(-theta)  # log(1 - p)
        all_absent = torch.zeros(int(writers.max()) + 1).index_add(0, writers, absent)
        return (self.penalty + node * (all_absent[writers] - absent).exp()) * p * (1 - p)


class HardConcrete(LearnedKeepRates):
    """Hard concrete gates on (-0.1, 1.1) with temperature 2/3 (HCGS).

    With a uniform number u, a gate is clip(1.2 sigmoid((log u - log(1 - u) + theta) / beta) - 0.1, 0, 1), and gradients
    go through it (Louizos, Welling and Kingma 2018, "Learning sparse neural networks through L0 regularization"). The
    cost counts the probabilities of gates that are not 0.
    """

    label: ClassVar[str] = "hcgs"

    def initial(self) -> float:
        """Return 2."""
        return 2.0

    def sampled(self, theta: Tensor, uniform: Tensor) -> Tensor:
        """Return clipped hard concrete gates."""
        return (self._soft(theta, uniform) * (HIGH - LOW) + LOW).clamp(0, 1)

    def slopes(self, theta: Tensor, uniform: Tensor, by_mask: Tensor) -> Tensor:
        """Return the gradient through the gates; it is 0 where they are clipped."""
        soft = self._soft(theta, uniform)
        stretched = soft * (HIGH - LOW) + LOW
        inside = (stretched > 0) & (stretched < 1)
        return (by_mask * inside * soft * (1 - soft) * (HIGH - LOW) / BETA).sum(0)

    def cost(self, theta: Tensor, writers: Tensor) -> Tensor:  # noqa: ARG002
        """Return the gradient of the probability that a gate is not 0, times the penalty."""
        p = torch.sigmoid(theta - BETA * torch.tensor(-LOW / HIGH).log())
        return self.penalty * p * (1 - p)

    def _soft(self, theta: Tensor, uniform: Tensor) -> Tensor:
        u = uniform.clamp(1e-6, 1 - 1e-6)
        return torch.sigmoid((u.log() - (1 - u).log() + theta) / BETA)


def writers_of(names: Sequence[str]) -> Tensor:
    """Return (components,) numbers: edges with one writer have the same number."""
    labels = [name.partition(ARROW)[0] for name in names]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([numbers[label] for label in labels])
