"""Quality of the weights from mask gradients, judged on outputs that they were not learned from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coar.regression.informed.learning import Trial
from coar.regression.informed.rows import RowBlock, sum_of_squares


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
    total = sum(sum_of_squares([block.outputs for block, _ in trial.held_out()]) for trial in trials)
    return 1 - sum(trial.error() for trial in trials) / total


def _pairs(trial: Trial) -> Tensor:
    """Return (mask groups, 2): sums of squared outputs, and the estimated sum that errors cost.

    The product of two rows' residuals with the product of their centred masks has the product of the errors for its
    mean, free of the residuals' own variance, so sums over pairs of independent rows estimate the squared errors.
    """
    rows, held, found = trial.rows, trial.held_out(), []
    for start in sorted({block.examples.start for block, _ in held}):
        own = [(block, left) for block, left in held if block.examples.start == start]  # of the same mask groups
        squares = torch.stack([block.outputs.square().sum((1, 2)) for block, _ in own]).sum(0)
        counts = [part.stop - part.start for block, _ in own for part in block.rounds.values()]
        pairs = sum(counts) ** 2 - sum(count**2 for count in counts)
        tiles = range(len(own[0][0].masks))
        products = torch.stack([_products(own, tile, rows.kept) for tile in tiles]).sum(0)
        found.append(torch.stack([squares, products / rows.variance() * sum(counts) / max(pairs, 1)], dim=1))
    return torch.cat(found)


def _products(own: Sequence[tuple[RowBlock, Tensor]], tile: int, kept: float) -> Tensor:
    """Return (mask groups,) sums over a tile's components of products of residuals times masks of two rounds."""
    rounds = []
    for block, left in own:
        # Rows of one round share out ablations, so masks are centred by the share that any mask keeps.
        offset, design = block.mean[:, None, block.components(tile)] - kept, block.design(tile)
        for rows in block.rounds.values():
            part = left[..., rows]
            rounds.append(part @ design[:, rows] + part.sum(2, keepdim=True) * offset)  # (groups, members, components)
    alone = torch.stack([adjoint.square().sum((1, 2)) for adjoint in rounds]).sum(0)
    return torch.stack(rounds).sum(0).square().sum((1, 2)) - alone
