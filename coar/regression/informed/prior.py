"""The prior of an informed fit: weights of all examples from mask gradients, before any mask is looked at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from coar.errors import RegressionError
from coar.regression.informed.learning import learn, relearn
from coar.regression.informed.quality import PriorQuality, judge
from coar.regression.informed.rows import Rows, group_order
from coar.regression.informed.shared_model import SharedModel
from coar.regression.informed.site_gains import MOST_SITES
from coar.store.gradients import MaskGradients, deal
from coar.store.run import Run

MIN_GRADIENTS = 8
FOLDS, HALVES = 4, 2  # that rounds of mask gradients are dealt into, to learn and to judge
MEANS_NUMBERS = 4 * 2**20  # entries of means that are made together, at most
COLUMN_FLOOR = 1e-2  # of the mean column: what a mask may correct where gradients saw nothing


@dataclass(frozen=True)
class Prior:
    """What mask gradients give before any mask is looked at.

    Attributes:
        shared: Turns gradients into weights.
        kept: (mask groups, components) uint8 counts, for each round, of the mask gradients that keep each component.
        column: (components,) root mean square of the weights over examples, relative to the mean component's.
        quality: How good the weights are.
        device: Where gradients become weights; all tensors here, and the results, are on the CPU.
    """

    shared: SharedModel
    kept: tuple[np.ndarray, ...]
    column: Tensor
    quality: PriorQuality
    device: torch.device

    def mask_gradients(self, run: Run) -> MaskGradients:
        """Return the mask gradients of the run, with the counts that are known here."""
        return MaskGradients(run, kept_counts=self.kept)

    def weights(self, mask_gradients: MaskGradients, examples: slice) -> "PriorWeights":
        """Read the mask gradients of examples and return what they give."""
        rounds = len(self.kept)
        sums, counts = mask_gradients.sums([range(rounds)], examples)[0], mask_gradients.counts(range(rounds), examples)
        means = _means(*(torch.from_numpy(table).to(self.device) for table in (sums, counts)))
        outputs = torch.from_numpy(mask_gradients.outputs(rounds, examples))
        spread = _spread(outputs)
        scale = spread[:, None].to(self.device)
        weights = self.shared.to(self.device).weights(means / scale) * scale
        return PriorWeights(weights.cpu(), spread, outputs.double().mean(0))


@dataclass(frozen=True)
class PriorWeights:
    """What mask gradients give for some examples.

    Attributes:
        weights: (examples, components).
        spread: (examples,) standard deviations of the outputs.
        mean: (examples,) float64 means of the outputs.
    """

    weights: Tensor
    spread: Tensor
    mean: Tensor

    def __getitem__(self, examples: slice | Tensor) -> "PriorWeights":
        """Return those of some of the examples."""
        return PriorWeights(self.weights[examples], self.spread[examples], self.mean[examples])


@dataclass(frozen=True)
class _Sample:
    """What is read of a run to learn from, its examples ordered by mask group.

    Attributes:
        rows: The outputs, dealt into `FOLDS` folds, where they are computed with, as are `sums` and `counts`.
        order: (examples,) numbers of the examples among those that are read.
        groups: (examples,) their mask groups.
        spread: (examples,) standard deviations of their outputs.
        mean: (examples,) float64 means of their outputs.
        sums: (folds, 2, examples, components) sums of the mask gradients at both ends.
        counts: (folds, 2, mask groups, components) numbers of terms.
    """

    rows: Rows
    order: Tensor
    groups: Tensor
    spread: Tensor
    mean: Tensor
    sums: Tensor
    counts: Tensor

    @classmethod
    def read(cls, mask_gradients: MaskGradients, rounds: int, examples: slice, device: torch.device) -> "_Sample":
        run = mask_gradients.run
        present, places = np.unique(mask_gradients.group_of(examples), return_inverse=True)
        groups = torch.from_numpy(places)
        order = group_order(groups)
        outputs = torch.from_numpy(mask_gradients.outputs(rounds, examples))[:, order]
        spread = _spread(outputs)
        sizes = mask_gradients.rounds[:rounds]
        parts = torch.split(((outputs - outputs.mean(0)) / spread).to(device), list(sizes))
        masks = [torch.from_numpy(mask_gradients.masks(i, present.tolist())) for i in range(rounds)]
        rows = Rows.of(masks, parts, groups[order], folds=FOLDS, kept=1 - run.sampler.ablated_fraction)
        del masks
        folds = deal(sizes, FOLDS)
        sums = mask_gradients.sums(folds, examples)
        if len(order) > 1:  # a tensor of one number would drop the axis
            for part in sums.reshape(-1, *sums.shape[2:]):
                part[:] = part[order.numpy()]
        kept = np.stack([mask_gradients.kept_in(fold, present) for fold in folds])
        total = np.array([sum(sizes[i] for i in fold) for fold in folds], np.float32)
        counts = np.stack([kept, total[:, None, None] - kept], axis=1)
        tables = (torch.from_numpy(table).to(device) for table in (sums, counts))
        return cls(rows, order, groups[order], spread, outputs.double().mean(0), *tables)

    def left_out(self, folds: int) -> Tensor:
        """Return (2, folds, examples, components) mean gradients of all folds but one, in units of the spread."""
        found = self.sums.new_empty(2, folds, *self.sums.shape[2:])
        for fold in range(folds):
            others = [i for i in range(FOLDS) if i % folds != fold]
            self._means_of(others, found[:, fold])
        return found

    def whole(self) -> Tensor:
        """Return (2, examples, components) mean gradients of all folds, in units of the spread."""
        found = self.sums.new_empty(2, *self.sums.shape[2:])
        self._means_of(range(FOLDS), found)
        return found

    def _means_of(self, folds: Sequence[int], out: Tensor) -> None:
        """Write (2, examples, components) mean gradients of some folds, in units of the spread, a few examples each."""
        step = max(MEANS_NUMBERS // self.sums.shape[-1], 1)
        counts = reduce(torch.add, (self.counts[i] for i in folds))
        groups, spread = self.groups.to(out.device), self.spread.to(out.device)
        for start in range(0, len(self.order), step):
            some = slice(start, start + step)
            means = _means(reduce(torch.add, (self.sums[i, :, some] for i in folds)), counts[:, groups[some]])
            out[:, some] = means.div_(spread[some, None])


def learn_prior(run: Run, rounds: int, examples: slice, device: torch.device) -> tuple[Prior, PriorWeights]:
    """Learn what examples share.

    Args:
        run: A run with mask gradients.
        rounds: How many of their rounds to use.
        examples: The examples to learn from, see `learning_examples`.
        device: Where to compute.

    Returns:
        The prior, and what it gives for these examples, both on the CPU.

    Raises:
        RegressionError: When there are too few mask gradients, or all are zero.
    """
    mask_gradients = MaskGradients(run)
    count = sum(mask_gradients.rounds[:rounds])
    least = max(MIN_GRADIENTS, sum(mask_gradients.rounds[:FOLDS]))
    if count < least:
        raise RegressionError(
            f"an informed fit needs at least {least} mask gradients and would use {count} of the "
            f"{mask_gradients.count} in {run.path}; use more, or collect more with --gradients, 64 or so"
        )
    sample = _Sample.read(mask_gradients, rounds, examples, device)
    whole = sample.whole()
    if not whole.any():
        raise RegressionError(
            f"every mask gradient in {run.path} is zero, so mask gradients give no information; check the output, or "
            f"fit masks by ridge"
        )
    numbers = {site: i for i, site in enumerate(dict.fromkeys(component.site for component in run.components))}
    sites = torch.tensor([numbers[component.site] for component in run.components])
    if len(numbers) > MOST_SITES:
        sites = sites * MOST_SITES // len(numbers)
    shared, trials = learn(sample.rows, sample.left_out(FOLDS), sites.to(device))
    weights = shared.weights(whole).cpu()
    column = weights.square().mean(0).sqrt()
    column = (column / column.mean().clamp_min(1e-30)).clamp_min(COLUMN_FLOOR)
    halves = relearn(shared, sample.rows.dealt(HALVES), sample.left_out(HALVES))
    kept = tuple(mask_gradients.kept(i) for i in range(rounds))
    found = PriorWeights(weights * sample.spread[:, None], sample.spread, sample.mean)
    prior = Prior(shared.to(torch.device("cpu")), kept, column, judge(trials, halves), device)
    return prior, found[torch.argsort(sample.order)]


def learning_examples(run: Run, most: int) -> slice:
    """Return at most so many evenly spaced examples to learn from; an odd step meets every mask group."""
    step = math.ceil(run.n_examples / most)
    return slice(0, run.n_examples, step if step % 2 else step + 1)


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    """Turn (2, examples, components) sums and counts into means; an end without any has the mean of the other."""
    means = sums / counts.clamp_min(1)
    return torch.where(counts > 0, means, means.flip(0))


def _spread(outputs: Tensor) -> Tensor:
    """Return the (examples,) standard deviation of (rows, examples) outputs; 1 for an output that never varies."""
    spread = outputs.std(0)
    return torch.where(spread > 0, spread, torch.ones(()))
