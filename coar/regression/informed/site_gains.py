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
MOST_SITES = 200  # with gains of their own; more are joined, each with the ones before it in the table
TABLE_NUMBERS = 8 * 2**20  # entries of a table, at most, where several rounds or mask groups are together
FLOOR = 1e-9  # ridge on the common gains, in units of each feature's own sum of squares


def gains_by_site(moments: "Sequence[SiteMoments]", features: int) -> Tensor:
    """Return (features, sites) gains that all components of a site share.

    Args:
        moments: Those of each round; rounds are independent, and judge each other's gains.
        features: Number of features.
    """
    whole = SiteMoments.stacked(moments).total()
    if len(moments) < 2:
        return whole.gains(features, SPREADS[:1])[0].view(features, -1)
    together = max(TABLE_NUMBERS // (len(SPREADS) * whole.gram.numel()), 1)  # rounds left out at a time
    errors = whole.square.new_zeros(len(SPREADS))
    for start in range(0, len(moments), together):
        left_out = SiteMoments.stacked(moments[start : start + together])
        errors += left_out.errors(whole.minus(left_out).gains(features, SPREADS)).sum(0)
    best = SPREADS[int(errors.argmin())]
    return whole.gains(features, (best,))[0].view(features, -1)


def table_bytes(sites: int, features: int, rounds: int) -> int:
    """Return the bytes of the tables that `gains_by_site` has at once, which are four of float64."""
    of_round = len(SPREADS) * (features * min(sites, MOST_SITES)) ** 2
    return 4 * 8 * of_round * min(max(TABLE_NUMBERS // of_round, 1), rounds)


def by_site(values: Tensor, sites: Tensor) -> Tensor:
    """Replace (..., components) values by their sums over the components of each site."""
    sums = values.new_zeros(*values.shape[:-1], int(sites.max()) + 1).index_add_(-1, sites, values)
    return sums[..., sites]


def members_of(sites: Tensor) -> dict[int, Tensor | slice]:
    """Return the numbers of the components of each site; a slice, which copies nothing, where they are in a row."""
    found, sites = dict[int, Tensor | slice](), sites.cpu()
    for site in sorted(set(sites.tolist())):
        group = (sites == site).nonzero()[:, 0]
        first, last = int(group[0]), int(group[-1])
        found[site] = slice(first, last + 1) if last - first + 1 == len(group) else group
    return found


@dataclass(frozen=True)
class SiteMoments:
    """Sums over rows and examples that say how well any gains predict, in float64.

    Attributes:
        gram: (..., factors, factors) products of what features predict with gains of 1; a factor for each feature and
            site.
        moment: (..., factors) their products with the outputs.
        square: (...) sums of the outputs' squares.
        count: (...) numbers of outputs.
    """

    gram: Tensor
    moment: Tensor
    square: Tensor
    count: Tensor

    @classmethod
    def stacked(cls, parts: "Sequence[SiteMoments]") -> "SiteMoments":
        """Return the moments of different rows along a new first axis."""
        gram, moment = torch.stack([part.gram for part in parts]), torch.stack([part.moment for part in parts])
        return cls(gram, moment, torch.stack([p.square for p in parts]), torch.stack([p.count for p in parts]))

    def total(self) -> "SiteMoments":
        """Add up the moments along the first axis."""
        return SiteMoments(self.gram.sum(0), self.moment.sum(0), self.square.sum(0), self.count.sum(0))

    def minus(self, other: "SiteMoments") -> "SiteMoments":
        """Return the moments without those of some of the rows."""
        return SiteMoments(
            self.gram - other.gram, self.moment - other.moment, self.square - other.square, self.count - other.count
        )

    def leading(self, factors: int) -> "SiteMoments":
        """Return the moments of the first factors."""
        return SiteMoments(self.gram[..., :factors, :factors], self.moment[..., :factors], self.square, self.count)

    def errors(self, gain: Tensor) -> Tensor:
        """Return the (..., sets) sums of squares that (..., sets, factors) gains leave."""
        explained = 2 * (gain @ self.moment[..., None])[..., 0] - ((gain @ self.gram) * gain).sum(-1)
        return self.square[..., None] - explained

    def gains(self, features: int, spreads: tuple[float, ...]) -> Tensor:
        """Return (..., spreads, factors) gains: common ones of each feature, and deviations of each relative spread.

        This is the mean of the posterior where outputs have the residual variance of the common gains alone.
        """
        sites = self.moment.shape[-1] // features
        common = torch.eye(features, dtype=torch.float64, device=self.gram.device).repeat_interleave(sites, dim=0)
        image = self.gram @ common  # (..., factors, features)
        gram, moment = common.T @ image, common.T @ self.moment[..., None]
        floor = torch.diag_embed((FLOOR * gram.diagonal(dim1=-2, dim2=-1)).clamp_min(1e-30))
        shared = torch.linalg.solve(gram + floor, moment).mT @ common.T  # (..., 1, factors)
        noise = (self.errors(shared) / self.count.clamp_min(1)[..., None]).clamp_min(1e-30)
        # A gain is small or large by what it takes for its feature to vary as much as the outputs.
        precision = self.gram.new_tensor(spreads) ** -2
        scale = noise * precision / self.square.clamp_min(1e-30)[..., None]  # (..., spreads)
        ridge = (gram + floor).diagonal(dim1=-2, dim2=-1).repeat_interleave(sites, dim=-1)
        deviations = self.gram[..., None, :, :] + torch.diag_embed(scale[..., None] * ridge[..., None, :])
        # Eliminating the deviations first leaves the common gains a small system of their own.
        right = torch.cat([image, self.moment[..., None]], dim=-1)[..., None, :, :]
        left = torch.linalg.solve(deviations, right.expand(*deviations.shape[:-1], features + 1))
        rest = common.T @ (right - self.gram[..., None, :, :] @ left)  # (..., spreads, features, features + 1)
        shared = torch.linalg.solve(rest[..., :-1] + floor[..., None, :, :], rest[..., -1:])
        gain: Tensor = (left[..., -1:] + (common - left[..., :-1]) @ shared)[..., 0]
        return gain


def moments_by_round(rows: Rows, features: Sequence[Tensor], sites: Tensor) -> dict[int, SiteMoments]:
    """Return the moments of each round's rows, by the round's number.

    Args:
        rows: Outputs under masks.
        features: (folds, examples, components) each, whose weighted sum is to be the weights.
        sites: (components,) number of each component's site.
    """
    first, found = rows.blocks[0], dict[int, list[SiteMoments]]()
    members = [members_of(sites[first.components(tile)]) for tile in range(len(first.masks))]
    for block in rows.blocks:
        for number, part in _moments_of(block, features, members, int(sites.max()) + 1):
            found.setdefault(number, []).append(part)
    return {number: SiteMoments.stacked(found[number]).total() for number in sorted(found)}


def _moments_of(
    block: RowBlock, features: Sequence[Tensor], members: Sequence[dict[int, Tensor | slice]], sites: int
) -> Iterator[tuple[int, SiteMoments]]:
    """Yield moments of each round from the table of what each factor predicts, some mask groups at a time."""
    y, factors = block.outputs, len(features) * sites
    step = max(TABLE_NUMBERS // (factors * y[0].numel()), 1)
    for start in range(0, len(y), step):
        some = slice(start, start + step)
        outputs = y[some]
        table = y.new_zeros(sites, len(outputs), len(features) * y.shape[1], y.shape[2])
        for tile, groups in enumerate(members):
            design = block.design(tile, some)
            at = (block.fold, block.examples, block.components(tile))
            own = torch.cat([block.by_group(feature[at])[some] for feature in features], dim=1)
            for site, group in groups.items():
                table[site].baddbmm_(own[..., group], design[..., group].mT)
        table = table.view(sites, len(outputs), len(features), *y.shape[1:]).permute(2, 0, 1, 3, 4)
        for number, rows in block.rounds.items():
            predicted = table[..., rows].reshape(factors, -1).double()  # (features x sites, outputs)
            seen = outputs[..., rows].flatten().double()
            count = seen.new_tensor(len(seen))
            yield number, SiteMoments(predicted @ predicted.T, predicted @ seen, seen @ seen, count)
