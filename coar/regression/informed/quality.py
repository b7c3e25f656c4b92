"""Quality of the weights from mask gradients, judged on outputs that they were not learned from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coar.regression.informed.learning import Trial
from coar.regression.informed.rows import sum_of_squares


@dataclass(frozen=True)
class PriorQuality:
    """How good weights are that were learned without the rows they are judged on.

    Attributes:
        explained: Share of the outputs' variance that they explain.
        error: Estimated share that their errors cost: the variance over masks of (weights - best weights) . mask.
        deviation: Standard error of `error`.
    """

    explained: float
    error: float
    deviation: float

    @property
    def reachable(self) -> float:
        """Estimated correlation of the best linear model."""
        return math.sqrt(min(max(self.explained + self.error, 0.0), 1.0))


def judge(trials: Sequence[Trial], halves: Sequence[Trial]) -> PriorQuality:
    """Judge weights by trials, and by weights from half of the mask gradients, whose error pairs of rows give.

    Only rows of different rounds are independent, and a fold of four has but one round where mask gradients are few; a
    half has two. The share of the variance that the better weights explain in addition is subtracted from the error.

    Args:
        trials: Those of the folds, from most of the mask gradients.
        halves: Those of two folds, each from half of the mask gradients, with the same refinements.
    """
    explained = _explained(trials)
    sums = torch.cat([_pairs(trial) for trial in halves]).double()  # (mask groups, 2)
    total, pairs = sums.sum(0).tolist()
    deviation = float((sums[:, 1] - pairs / len(sums)).square().sum().sqrt()) / total
    return PriorQuality(explained, pairs / total - (explained - _explained(halves)), deviation)


def _explained(trials: Sequence[Trial]) -> float:
    """Return the share of the outputs' variance that weights explain in rows that they never saw."""
    total = sum(sum_of_squares(trial.held.outputs()) for trial in trials)
    return 1 - sum(trial.error() for trial in trials) / total


def _pairs(trial: Trial) -> Tensor:
    """Return (mask groups, 2): sums of squared outputs, and the estimated sum that errors cost.

    The product of two rows' residuals with the product of their centred masks has the product of the errors for its
    mean, free of the residuals' own variance, so sums over pairs of independent rows estimate the squared errors.
    """
    held, found = trial.held, []
    deviation = math.sqrt(held.variance())
    parts = list(zip(held.blocks, trial.held_left, strict=True))
    for start in sorted({block.examples.start for block in held.blocks}):  # blocks of the same mask groups
        own = [(block, left) for block, left in parts if block.examples.start == start]
        total, alone, squares, counts = torch.zeros(()), torch.zeros(()), torch.zeros(()), []
        for block, left in own:
            # Rows of one round share out ablations, so masks are centred by the share that any mask keeps.
            offset, design = (block.mean - held.kept)[:, None], block.design()
            for rows in block.rounds.values():
                part = left[..., rows]
                adjoint = (part @ design[:, rows] + part.sum(2, keepdim=True) * offset) / deviation
                total = total + adjoint  # (groups, members, components)
                alone = alone + adjoint.square().sum((1, 2))
                counts.append(part.shape[2])
            squares = squares + block.outputs.square().sum((1, 2))
        pairs = sum(counts) ** 2 - sum(count**2 for count in counts)
        error = (total.square().sum((1, 2)) - alone) * sum(counts) / max(pairs, 1)
        found.append(torch.stack([squares, error], dim=1))
    return torch.cat(found)
