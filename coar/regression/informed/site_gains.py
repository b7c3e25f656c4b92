"""Gains that all components of a site share: factors on features of theirs, such that masks' outputs are predicted.

Every site has gains of its own, but outputs are few and each gain that they teach costs accuracy; so the gains of a
site are drawn towards those of all sites together, as far as predicts rows best that had no part in them.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Self

import torch
from torch import Tensor

from coar.regression.informed.rows import Rows

SPREADS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)  # standard deviations of a site's gains round the common ones that are tried
FLOOR = 1e-9  # ridge on the common gains, in units of each feature's own sum of squares


def gains_by_site(rows: Rows, features: Tensor, sites: Tensor) -> Tensor:
    """Return (features, components) gains that all components of a site share.

    Args:
        rows: Outputs under masks; rows of different rounds are independent, and judge each other's gains.
        features: (features, folds, examples, components) whose weighted sum is to be the weights.
        sites: (components,) number of each component's site.
    """
    parts = _by_round(rows, features, sites)
    whole = reduce(_Moments.plus, parts)

    def held_out(spread: float) -> float:
        return sum(part.error(whole.minus(part).gains(len(features), spread)) for part in parts)

    spread = min(SPREADS, key=held_out) if len(parts) > 1 else SPREADS[0]
    return whole.gains(len(features), spread).float().view(len(features), -1)[:, sites]


def by_site(values: Tensor, sites: Tensor) -> Tensor:
    """Replace (..., components) values by their sums over the components of each site."""
    sums = torch.zeros(*values.shape[:-1], int(sites.max()) + 1).index_add_(-1, sites, values)
    return sums[..., sites]


@dataclass(frozen=True)
class _Moments:
    """Sums over rows and examples that say how well any gains predict.

    Attributes:
        gram: (factors, factors) products of what features predict with gains of 1; a factor for each feature and site.
        moment: (factors,) their products with the outputs.
        square: Sum of the outputs' squares.
        count: Number of outputs.
    """

    gram: Tensor
    moment: Tensor
    square: float
    count: int

    @classmethod
    def of(cls, table: Tensor, outputs: Tensor) -> Self:
        """Sum a (factors, outputs) table of predictions."""
        return cls(table @ table.T, table @ outputs, float(outputs @ outputs), len(outputs))

    def plus(self, other: Self) -> "_Moments":
        return _Moments(
            self.gram + other.gram, self.moment + other.moment, self.square + other.square, self.count + other.count
        )

    def minus(self, other: Self) -> "_Moments":
        return _Moments(
            self.gram - other.gram, self.moment - other.moment, self.square - other.square, self.count - other.count
        )

    def error(self, gain: Tensor) -> float:
        """Return the sum of squares that (factors,) gains leave."""
        return self.square - float(2 * gain @ self.moment - gain @ self.gram @ gain)

    def gains(self, features: int, spread: float) -> Tensor:
        """Return (factors,) gains: common ones of each feature, and deviations of the given relative spread.

        This is the mean of the posterior where outputs have the residual variance of the common gains alone.
        """
        common = torch.eye(features, dtype=torch.float64).repeat_interleave(len(self.gram) // features, dim=0)
        gram, moment = common.T @ self.gram @ common, common.T @ self.moment
        floor = torch.diag((FLOOR * gram.diagonal()).clamp_min(1e-30))
        shared = common @ torch.linalg.solve(gram + floor, moment)
        noise = max(self.error(shared) / max(self.count, 1), 1e-30)
        # A gain is small or large by what it takes for its feature to vary as much as the outputs.
        ridge = noise / spread**2 / max(self.square, 1e-30) * (gram + floor).diagonal()
        deviations = self.gram + torch.diag(common @ ridge)
        # Eliminating the deviations first leaves the common gains a small system of their own.
        left = torch.linalg.solve(deviations, torch.cat([self.gram @ common, self.moment[:, None]], dim=1))
        own = self.gram @ left
        gram = common.T @ (self.gram @ common - own[:, :-1])
        moment = common.T @ (self.moment - own[:, -1])
        shared = torch.linalg.solve(gram + floor, moment)
        gain: Tensor = left[:, -1] + (common - left[:, :-1]) @ shared
        return gain


def _by_round(rows: Rows, features: Tensor, sites: Tensor) -> list[_Moments]:
    """Return the moments of each round's rows."""
    groups = [(sites == site).nonzero()[:, 0] for site in range(int(sites.max()) + 1)]
    found: dict[tuple[int, int], _Moments] = {}
    for mask_group in rows.mask_groups:
        design = rows.design(mask_group)
        parts = [part[mask_group.fold, mask_group.examples] for part in features]
        table = torch.stack([design[:, group] @ part[:, group].T for part in parts for group in groups]).double()
        for number in sorted(set(mask_group.rounds.tolist())):
            own = mask_group.rounds == number
            new = _Moments.of(table[:, own].flatten(1), mask_group.outputs[own].flatten().double())
            key = (mask_group.fold, number)
            found[key] = found[key].plus(new) if key in found else new
    return list(found.values())
