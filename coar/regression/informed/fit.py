"""Informed fits: weights from gate gradients by what examples share, then corrected example by example by masks."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from coar.errors import RegressionError
from coar.regression.informed.rows import MaskGroup, Rows
from coar.regression.informed.shared_model import SharedModel, apart, learn
from coar.regression.ridge import PENALTIES, LinearFit, Spectrum
from coar.regression.sums import FitBlock, Gram, batches
from coar.store.gradients import MaskGradients
from coar.store.run import Run

MIN_GRADIENTS = 8
FOLDS, HALVES = 4, 2  # that mask gradients are dealt into, round by round, to learn and to judge
LEARNING_NUMBERS = 16 * 2**20  # examples x components that the shared model is learned from, at most
COLUMN_FLOOR = 1e-2  # of the mean column: what a mask may correct where gradients saw nothing


@dataclass(frozen=True)
class Prior:
    """What mask gradients say before any mask is looked at.

    Attributes:
        rounds: How many of their rounds are used.
        shared: Turns gradients into weights.
        kept: (slots, components) share of the mask gradients that keep each component.
        column: (components,) root mean square of the weights over examples, relative to the mean component's.
        quality: How good the weights are.
    """

    rounds: int
    shared: SharedModel
    kept: Tensor
    column: Tensor
    quality: "Quality"

    def weights(self, mask_gradients: MaskGradients, examples: slice) -> tuple[Tensor, Tensor]:
        """Return (examples, components) weights and the (examples,) spread of the outputs."""
        means, counts = mask_gradients.means(range(self.rounds), examples)
        spread = _spread(mask_gradients, self.rounds, examples)
        return self.shared.weights(_ends(means * counts, counts) / spread[:, None]) * spread[:, None], spread


@dataclass(frozen=True)
class Informed:
    """What an informed fit learns of a run before any example is solved.

    Attributes:
        prior: What mask gradients say.
        masks: What masks correct; None without masks.
    """

    prior: Prior
    masks: "_Masks | None"

    @classmethod
    def of(cls, run: Run, rows: np.ndarray, rounds: int, *, gram: Gram | None = None) -> Self:
        """Learn from mask gradients and, where there are any, masks.

        Args:
            run: A complete run.
            rows: Row numbers of the training masks to use; may be empty.
            rounds: How many rounds of mask gradients to use.
            gram: The sums over these masks; only where there are more of them than components.

        Raises:
            RegressionError: When there are too few mask gradients, or their gradients are all zero.
        """
        prior = learn_prior(run, rounds)
        return cls(prior, _Masks.of(run, rows, prior, gram) if len(rows) >= 2 else None)

    def learned(self) -> dict[str, Any]:
        """Return what was learned for all examples, in plain numbers."""
        quality = self.prior.quality
        return {
            "stages": dict(self.prior.shared.stages),
            "mask_penalty": self.masks.penalty if self.masks else None,
            "prior_quality": {**dataclasses.asdict(quality), "reachable": quality.reachable},
        }

    def solve(self, block: FitBlock) -> LinearFit:
        """Fit a block of examples."""
        examples, masks = block.examples, len(block.rows)
        prior, mask_gradients = self.prior, MaskGradients(block.run)
        count = sum(mask_gradients.rounds[: prior.rounds])
        weights, spread = prior.weights(mask_gradients, examples)
        outputs = torch.from_numpy(mask_gradients.outputs(prior.rounds, examples)).double().mean(0)
        seen = prior.kept[torch.from_numpy(mask_gradients.group_of(examples))].double()  # (examples, components)
        if self.masks:
            weights, mean = self.masks.correct(block, weights)
            outputs = (outputs * count + mean * masks) / (count + masks)
            seen = (seen * count + self.masks.mean_mask() * masks) / (count + masks)
        intercept = outputs - (weights.double() * seen).sum(1)
        standard_error = self._error(block.run).sqrt() * spread[:, None]
        return LinearFit(weights, intercept, standard_error, torch.zeros(len(weights)))

    def _error(self, run: Run) -> Tensor:
        """Return the (components,) expected squared errors of weights, for outputs of a spread of 1."""
        prior, fraction = self.prior, run.sampler.ablated_fraction
        share = max(prior.quality.error, prior.quality.deviation)  # an estimate below its own error says little
        error = prior.column**2 * share / (fraction * (1 - fraction)) / float((prior.column**2).sum())
        return error * self.masks.left_unknown() if self.masks else error


def learn_prior(run: Run, rounds: int) -> Prior:
    """Learn what examples share, from the examples that fit in memory, evenly spaced."""
    mask_gradients, examples = MaskGradients(run), _spread_out(run)
    count = sum(mask_gradients.rounds[:rounds])
    if count < MIN_GRADIENTS or rounds < FOLDS:
        raise RegressionError(
            f"an informed fit needs at least {MIN_GRADIENTS} mask gradients, in {FOLDS} rounds or more; it "
            f"would use {count} in "
            f"{rounds} of {run.path}: collect more with --gradients, 64 or so"
        )
    folds = _dealt(rounds, FOLDS)
    gradients, whole, spread = _fold_gradients(mask_gradients, folds, examples)
    if not whole.any():
        raise RegressionError(
            f"every gate gradient in {run.path} is zero, so the mask gradients say nothing; look at the output, "
            f"or fit masks "
            f"by ridge"
        )
    rows = _rows(mask_gradients, folds, examples, spread)
    numbers = {site: i for i, site in enumerate(dict.fromkeys(component.site for component in run.components))}
    sites = torch.tensor([numbers[component.site] for component in run.components])
    shared, held = learn(rows, gradients, sites)
    column = shared.weights(whole).square().mean(0).sqrt()
    column = (column / column.mean().clamp_min(1e-30)).clamp_min(COLUMN_FLOOR)
    explained = _explained(held)
    folds = _dealt(rounds, HALVES)
    gradients = _fold_gradients(mask_gradients, folds, examples)[0]
    halves = apart(shared, _rows(mask_gradients, folds, examples, spread), gradients)
    return Prior(rounds, shared, _mean_masks(mask_gradients, rounds), column, _judged(explained, halves))


def _dealt(rounds: int, folds: int) -> list[list[int]]:
    return [list(range(fold, rounds, folds)) for fold in range(folds)]


def _fold_gradients(
    mask_gradients: MaskGradients, folds: list[list[int]], examples: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (2, folds, examples, components) gradients of all folds but one, those of all, and the spread."""
    parts = [mask_gradients.means(fold, examples) for fold in folds]
    sums = np.stack([mean * count for mean, count in parts])  # (folds, 2, examples, components)
    counts = np.stack([count for _, count in parts])
    spread = _spread(mask_gradients, sum(map(len, folds)), examples)
    others = [_ends(sums.sum(0) - own, counts.sum(0) - number) for own, number in zip(sums, counts, strict=True)]
    whole = _ends(sums.sum(0), counts.sum(0)) / spread[:, None]
    return torch.stack(others, dim=1) / spread[:, None], whole, spread


def _ends(sums: np.ndarray, counts: np.ndarray) -> Tensor:
    """Turn (2, examples, components) sums and counts into means; where an end has none, the other stands in."""
    means = sums / np.maximum(counts, 1)
    return torch.from_numpy(np.where(counts > 0, means, means[::-1]))


def _rows(mask_gradients: MaskGradients, folds: list[list[int]], examples: slice, spread: Tensor) -> Rows:
    mask_groups = torch.from_numpy(mask_gradients.group_of(examples))
    outputs = torch.from_numpy(mask_gradients.outputs(sum(map(len, folds)), examples))
    outputs = (outputs - outputs.mean(0)) / spread
    starts = np.cumsum([0, *mask_gradients.rounds])
    parts = []
    means = _mean_masks(mask_gradients, sum(map(len, folds)))
    for number, fold in enumerate(folds):
        masks = torch.from_numpy(
            np.concatenate([mask_gradients.masks(i) for i in fold])
        )  # (mask gradients, slots, components)
        y = torch.cat([outputs[starts[i] : starts[i + 1]] for i in fold])
        of_round = torch.cat([torch.full((mask_gradients.rounds[i],), i) for i in fold])
        for mask_group in sorted(set(mask_groups.tolist())):
            members = (mask_groups == mask_group).nonzero()[:, 0]
            parts.append(MaskGroup(masks[:, mask_group], means[mask_group], y[:, members], members, number, of_round))
    run = mask_gradients.run
    return Rows(tuple(parts), (len(folds), len(mask_groups), run.n_components), 1 - run.sampler.ablated_fraction)


@dataclass(frozen=True)
class Quality:
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


def _explained(trials: list[tuple[Rows, Tensor]]) -> float:
    """Return the share of the outputs' variance that weights explain in rows that they never saw."""
    total = sum(float((mask_group.outputs**2).sum()) for held, _ in trials for mask_group in held.mask_groups)
    return 1 - sum(held.error(weights) for held, weights in trials) / total


def _judged(explained: float, halves: list[tuple[Rows, Tensor]]) -> Quality:
    """Judge weights that explain so much by weights from half of the mask gradients, whose error pairs of rows give.

    Only rows of different rounds are independent, and a fold of four has but one round where mask gradients are few; a
    half has two. What the better weights explain more of the variance, their error is less.
    """
    sums = torch.cat([_pairs(held, weights) for held, weights in halves]).double()  # (slots, 2)
    total, pairs = sums.sum(0).tolist()
    deviation = float((sums[:, 1] - pairs / len(sums)).square().sum().sqrt()) / total
    return Quality(explained, pairs / total - (explained - _explained(halves)), deviation)


def _pairs(held: Rows, weights: Tensor) -> Tensor:
    """Return (slots, 2): sums of squared outputs, and the estimated sum that errors cost.

    The product of two rows' residuals with the product of their centred masks has the product of the errors for its
    mean, free of the residuals' own variance, so sums over pairs of independent rows estimate the squared errors.
    """
    rows = []
    for mask_group, residual in zip(held.mask_groups, held.residual(weights), strict=True):
        design = (mask_group.masks.float() - held.kept) / math.sqrt(
            held.variance()
        )  # rows of one round share out ablations
        counts = torch.unique_consecutive(mask_group.rounds, return_counts=True)[1].tolist()
        adjoints = torch.stack(
            [r.T @ d for r, d in zip(torch.split(residual, counts), torch.split(design, counts), strict=True)]
        )
        own = (adjoints**2).sum()  # adjoints: (rounds, examples, components), sums over rows
        pairs = len(design) ** 2 - sum(count**2 for count in counts)
        error = ((adjoints.sum(0) ** 2).sum() - own) * len(design) / max(pairs, 1)
        rows.append(torch.stack([(mask_group.outputs**2).sum(), error]))
    return torch.stack(rows)


@dataclass(frozen=True)
class _Masks:
    """Ridge on what the prior leaves of the masks' outputs, one penalty for all examples.

    A penalty per example is too free when masks are far fewer than components: generalised cross-validation then takes
    some examples' noise for signal. One penalty is chosen by the sum of its scores over the examples learned from.
    """

    column: Tensor
    spectrum: Spectrum
    left: Tensor  # (masks, rank) in the dual form, else empty
    gram: Gram | None
    penalty: float

    @classmethod
    def of(cls, run: Run, rows: np.ndarray, prior: Prior, gram: Gram | None) -> Self:
        column = prior.column.double()
        examples = _spread_out(run)
        if len(rows) <= run.n_components:
            x = torch.cat([part[:, :-1] for part, _ in batches(run, rows, slice(0, 1))])
            spectrum, left = Spectrum.dual(x.double() * column)  # scaled masks are no whole numbers, exact in float32
            gram = None
        else:
            gram = gram or Gram.of(run, rows)
            spectrum, left = Spectrum.primal(gram.scaled(column)), torch.empty(0)
        start = cls(column, spectrum, left, gram, 0.0)
        weights, spread = prior.weights(MaskGradients(run), examples)
        scores, variation, _ = start.scores(FitBlock(run, rows, examples), weights)
        grid = PENALTIES * spectrum.eigenvalues.mean()
        left_over = grid / (spectrum.eigenvalues[:, None] + grid)
        freedom = spectrum.count - 1 - (1 - left_over).sum(0)
        loose = freedom >= spectrum.count / 2  # nearer to interpolation, cross-validation compares noise with noise
        grid, left_over, freedom = grid[loose], left_over[:, loose], freedom[loose]
        residual = (variation[:, None] - scores.T**2 @ (1 - left_over**2)).clamp_min(0)
        best = (residual / freedom**2 / spread.double()[:, None] ** 2).sum(0).argmin()
        return cls(column, spectrum, left, gram, float(grid[best]))

    def scores(self, block: FitBlock, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return U'R (rank, examples), sums of squares and (examples,) mean outputs; R is what the weights leave."""
        w = weights.double().T  # (components, examples)
        if self.gram is None:
            parts = list(batches(block.run, block.rows, block.examples))
            y = torch.cat([part for _, part in parts]).double()
            residual = y - torch.cat([x[:, :-1] for x, _ in parts]).double() @ w
            residual -= residual.mean(0)
            return self.left.T @ residual, (residual**2).sum(0), y.mean(0)
        moments = block.moments()
        product, centred = moments.centred(self.gram.total), self.gram.centred()
        image = centred @ w
        variation = moments.variation() - 2 * (w * product).sum(0) + (w * image).sum(0)
        scores = (self.spectrum.basis.T @ ((product - image) * self.column[:, None])) / self.spectrum.eigenvalues[
            :, None
        ]
        return scores, variation.clamp_min(0), moments.mean()

    def correct(self, block: FitBlock, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return corrected (examples, components) weights, and the masks' (examples,) mean outputs."""
        scores, _, mean = self.scores(block, weights)
        shrink = 1 / (self.spectrum.eigenvalues + self.penalty)
        more = (self.spectrum.basis @ (scores * shrink[:, None])).T * self.column
        return weights + more.float(), mean

    def left_unknown(self) -> Tensor:
        """Return the (components,) share of the prior's squared error that the masks leave."""
        known = self.spectrum.basis**2 @ (1 / (self.spectrum.eigenvalues + self.penalty))
        return (1 - known).clamp(0, 1).float()

    def mean_mask(self) -> Tensor:
        """Return the (components,) share of masks that keep each component."""
        return self.spectrum.mean / self.column


def _mean_masks(mask_gradients: MaskGradients, rounds: int) -> Tensor:
    """Return the (slots, components) share of the first rounds' mask gradients that keep each component."""
    kept = np.stack([mask_gradients.kept(i) for i in range(rounds)]).sum(0)
    return torch.from_numpy(kept / sum(mask_gradients.rounds[:rounds])).float()


def _spread(mask_gradients: MaskGradients, rounds: int, examples: slice) -> Tensor:
    """Return the (examples,) standard deviation of the mask gradients' outputs; 1 for an output that never varies."""
    spread = torch.from_numpy(mask_gradients.outputs(rounds, examples)).std(0)
    return torch.where(spread > 0, spread, torch.ones(()))


def _spread_out(run: Run) -> slice:
    """Return evenly spaced examples, as many as the shared model is learned from; an odd step meets every slot."""
    most = max(LEARNING_NUMBERS // run.n_components, 64)
    step = math.ceil(run.n_examples / most)
    return slice(0, run.n_examples, step if step % 2 else step + 1)
