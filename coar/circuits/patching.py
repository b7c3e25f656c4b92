"""Scores from real passes: one component ablated at a time, and greedy removal (ACDC)."""

from typing import ClassVar

import numpy as np
import torch
from pydantic import field_validator
from torch import Tensor

from coar.circuits.evaluator import CircuitEvaluator, Loss, Measured
from coar.circuits.method import Report, Scored, ScoringMethod


def _loss(measured: Measured, loss: Loss) -> float:
    return float(np.mean(measured.kl if loss == "kl" else -measured.output))


class ExactPatching(ScoringMethod):
    """The increase of the mean loss when a component alone is ablated.

    It costs a forward pass of every example for every component, so it suits small models and coarse tables.

    Attributes:
        loss: `kl`, the divergence from the unablated model, or `output`, minus the study's output.
    """

    label: ClassVar[str] = "exact"

    loss: Loss = "kl"

    def steps_of(self, evaluator: CircuitEvaluator) -> int:
        """Return the number of components."""
        return evaluator.components

    def score(self, evaluator: CircuitEvaluator, report: Report) -> Scored:
        """Return the increases."""
        keep = evaluator.everything()
        full = _loss(evaluator.measure(keep), self.loss)
        found = torch.empty(evaluator.components, dtype=torch.float64)
        for i in range(evaluator.components):
            keep[i] = 0
            found[i] = _loss(evaluator.measure(keep), self.loss) - full
            keep[i] = 1
            report(1)
        return Scored(found)


class GreedyRemoval(ScoringMethod):
    """The largest threshold at which greedy removal keeps an edge: automated circuit discovery (ACDC).

    For each threshold, edges are visited from the last reader and writer to the first, and an edge is removed if that
    raises the mean KL divergence by less than the threshold (Conmy et al. 2023, "Towards automated circuit discovery
    for mechanistic interpretability"). Edges that lost their path to the end need no pass. It costs up to a forward
    pass of every example for every component and threshold.

    Attributes:
        thresholds: In nats, ascending.
    """

    label: ClassVar[str] = "acdc"

    thresholds: tuple[float, ...] = (0.0001, 0.001, 0.01, 0.1, 1.0)

    @field_validator("thresholds")
    @classmethod
    def _ascend(cls, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        if not thresholds or min(thresholds) < 0 or list(thresholds) != sorted(set(thresholds)):
            raise ValueError(f"{thresholds} are not ascending numbers, 0 or more")
        return thresholds

    def steps_of(self, evaluator: CircuitEvaluator) -> int:
        """Return the number of components times that of thresholds."""
        return evaluator.components * len(self.thresholds)

    def score(self, evaluator: CircuitEvaluator, report: Report) -> Scored:
        """Return thresholds; an edge that none keeps has the score 0."""
        found = torch.zeros(evaluator.components, dtype=torch.float64)
        for threshold in self.thresholds:
            kept = self._remove(evaluator, threshold, report)
            found[kept.cpu().bool()] = threshold
        return Scored(found)

    def _remove(self, evaluator: CircuitEvaluator, threshold: float, report: Report) -> Tensor:
        keep = evaluator.everything()
        present = _loss(evaluator.measure(keep), "kl")
        for i in reversed(range(evaluator.components)):  # tables list readers, and each one's writers, in order
            report(1)
            if not keep[i]:
                continue
            without = keep.clone()
            without[i] = 0
            loss = _loss(evaluator.measure(without), "kl")
            if loss - present < threshold:
                keep, present = evaluator.graph.reaching_end(without).float(), loss
        return keep
