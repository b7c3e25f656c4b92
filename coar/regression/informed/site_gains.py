"""Gains that all components of a site share: factors on features of theirs, such that masks' outputs are predicted.

Every site has gains of its own, but outputs are few and each gain learned from them costs accuracy. The gains of a site
are therefore shrunk towards those of all sites together, as far as this predicts held-out rounds best.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coar.regression.informed.rows import RowBlock, Rows

SPREADS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)  # standard deviations of a site's gains round the common ones that are tried
FLOOR = 1e-9  # ridge on the common gains, in units of each feature's own sum of squares
TABLE_NUMBERS = 8 * 2**20  # entries of a table of predictions, at most, where it has several mask groups


def gains_by_site(moments: "Sequence[SiteMoments]", features: int) -> Tensor:
    """Return (features, sites) gains that all components of a site share.

    Args:
        moments: Those of each round; rounds are independent, and judge each other's gains.
        features: Number of features.
    """
    whole = SiteMoments.total(moments)
    if len(moments) < 2:
        return whole.gains(features, SPREADS[:1])[0].view(features, -1)
    errors = torch.zeros(len(SPREADS), dtype=torch.float64)
    for part in moments:
        errors += part.errors(whole.minus(part).gains(features, SPREADS))
    best = SPREADS[int(errors.argmin())]
    return whole.gains(features, (best,))[0].view(features, -1)


def by_site(values: Tensor, sites: Tensor) -> Tensor:
    """Replace (..., components) values by their sums over the components of each site."""
    sums = torch.zeros(*values.shape[:-1], int(sites.max()) + 1).index_add_(-1, sites, values)
    return sums[..., sites]


def members_of(sites: Tensor) -> list[Tensor | slice]:
    """Return the numbers of the components of each site; a slice, which copies nothing, where they are in a row."""
    found: list[Tensor | slice] = []
    for site in range(int(sites.max()) + 1):
        group = (sites == site).nonzero()[:, 0]
        first, last = int(group[0]), int(group[-1])
        found.append(slice(first, last + 1) if last - first + 1 == len(group) else group)
    return found


@dataclass(frozen=True)
class SiteMoments:
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
    def total(cls, parts: "Sequence[SiteMoments]") -> "SiteMoments":
        """Add up the moments of different rows."""
        gram = torch.stack([part.gram for part in parts]).sum(0)
        moment = torch.stack([part.moment for part in parts]).sum(0)
        return cls(gram, moment, sum(part.square for part in parts), sum(part.count for part in parts))

    def minus(self, other: "SiteMoments") -> "SiteMoments":
        """Return the moments without those of some of the rows."""
        return SiteMoments(
            self.gram - other.gram, self.moment - other.moment, self.square - other.square, self.count - other.count
        )

    def leading(self, factors: int) -> "SiteMoments":
        """Return the moments of the first factors."""
        return SiteMoments(self.gram[:factors, :factors], self.moment[:factors], self.square, self.count)

    def errors(self, gain: Tensor) -> Tensor:
        """Return the (...,) sums of squares that (..., factors) gains leave."""
        return self.square - 2 * gain @ self.moment + ((gain @ self.gram) * gain).sum(-1)

    def gains(self, features: int, spreads: tuple[float, ...]) -> Tensor:
        """Return (spreads, factors) gains: common ones of each feature, and deviations of each relative spread.

        This is the mean of the posterior where outputs have the residual variance of the common gains alone.
        """
        common = torch.eye(features, dtype=torch.float64).repeat_interleave(len(self.gram) // features, dim=0)
        gram, moment = common.T @ self.gram @ common, common.T @ self.moment
        floor = torch.diag((FLOOR * gram.diagonal()).clamp_min(1e-30))
        shared = common @ torch.linalg.solve(gram + floor, moment)
        noise = max(float(self.errors(shared)) / max(self.count, 1), 1e-30)
        # A gain is small or large by what it takes for its feature to vary as much as the outputs.
        scale = torch.tensor([noise / spread**2 / max(self.square, 1e-30) for spread in spreads], dtype=torch.float64)
        ridge = common @ (gram + floor).diagonal()
        deviations = self.gram + torch.diag_embed(scale[:, None] * ridge)  # (spreads, factors, factors)
        # Eliminating the deviations first leaves the common gains a small system of their own.
        right = torch.cat([self.gram @ common, self.moment[:, None]], dim=1)
        left = torch.linalg.solve(deviations, right.expand(len(spreads), *right.shape))
        own = self.gram @ left
        gram = common.T @ (self.gram @ common - own[..., :-1])
        moment = common.T @ (self.moment[:, None] - own[..., -1:])
        shared = torch.linalg.solve(gram + floor, moment)
        gain: Tensor = (left[..., -1:] + (common - left[..., :-1]) @ shared)[..., 0]
        return gain


def moments_by_round(rows: Rows, features: Tensor, sites: Tensor) -> dict[int, SiteMoments]:
    """Return the moments of each round's rows, by the round's number.

    Args:
        rows: Outputs under masks.
        features: (features, folds, examples, components) whose weighted sum is to be the weights.
        sites: (components,) number of each component's site.
    """
    members, found = members_of(sites), dict[int, list[SiteMoments]]()
    for block in rows.blocks:
        for number, part in _moments_of(block, features, members):
            found.setdefault(number, []).append(part)
    return {number: SiteMoments.total(found[number]) for number in sorted(found)}


def _moments_of(block: RowBlock, features: Tensor, members: list[Tensor | slice]) -> Iterator[tuple[int, SiteMoments]]:
    """Yield moments of each round from the table of what each factor predicts, some mask groups at a time."""
    factors, design = len(features) * len(members), block.design()
    groups = max(TABLE_NUMBERS // (factors * block.outputs[0].numel()), 1)
    own = block.by_group(features[:, block.fold, block.examples])  # (features, groups, members, components)
    for start in range(0, len(design), groups):
        some = slice(start, start + groups)
        x, part, y = design[some], own[:, some], block.outputs[some]
        stacked = part.transpose(0, 1).flatten(1, 2)  # (groups, features x members, components)
        table = torch.stack([stacked[..., group] @ x[..., group].mT for group in members])
        table = table.view(len(members), len(x), len(features), *y.shape[1:]).permute(2, 0, 1, 3, 4)
        for number, rows in block.rounds.items():
            predicted = table[..., rows].reshape(factors, -1).double()  # (features x sites, outputs)
            outputs = y[..., rows].flatten().double()
            moment, square = predicted @ outputs, float(outputs @ outputs)
            yield number, SiteMoments(predicted @ predicted.T, moment, square, len(outputs))
