"""Learning the shared model: gains by site, then refinements that are kept where they predict held-out rows better.

A mask gradient's output and its gradient come from one mask, so gradients would explain the outputs of their own mask
gradients too well. The mask gradients are dealt into folds, and the outputs of a fold only ever meet gradients of the
other folds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coar.regression.informed.rows import RowBlock, Rows, subtract, sum_of_squares
from coar.regression.informed.shared_model import Curvature, SharedModel, unit, weighted_sum
from coar.regression.informed.site_gains import SiteMoments, by_site, gains_by_site, members_of, moments_by_round
from coar.regression.informed.solving import System, predictions, solver_of

GAIN_PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1)  # in units of each column's own sum of squares
STRUCTURE_PENALTIES = (100.0, 30.0, 10.0, 3.0)  # in units of the mean column's sum of squares
RANK = 20  # directions in which examples differ, at most
BANDS = ((0, 1), (1, 6))  # of the leading directions of a site's curvature; a gain each
FEATURES = 2 + len(BANDS)  # of a component, each with a gain: both ends of the path, and the bands, at most
EXAMPLES_PER_DIRECTION = 8


@dataclass(frozen=True)
class Trial:
    """A model learned from the rows of all folds but one, or of all, with what it leaves of all outputs.

    Attributes:
        model: The model.
        rows: All rows.
        held: The fold that it has not seen; None where it has seen all.
        places: (folds, examples, rank) places of the examples.
        left: Residuals of all rows, block by block.
    """

    model: SharedModel
    rows: Rows
    held: int | None
    places: Tensor
    left: Sequence[Tensor]

    def seen(self) -> Rows:
        """Return the rows that the model is learned from."""
        return self.rows.without(self.held)

    def held_out(self) -> list[tuple[RowBlock, Tensor]]:
        """Return the blocks of rows that the model has not seen, each with its residuals."""
        return [pair for pair in zip(self.rows.blocks, self.left, strict=True) if pair[0].fold == self.held]

    def error(self) -> float:
        """Return the sum of squared residuals of the rows that the model has not seen."""
        return sum_of_squares([left for _, left in self.held_out()])

    def renewed(self, model: SharedModel, weights: Callable[[int], Tensor]) -> "Trial":
        """Return the trial with a model that gives these (examples, components) weights of each fold."""
        return replace(self, model=model, left=self.rows.residual(weights))


Refinement = Callable[[float, Sequence[int]], list[Trial]]  # refines some of the trials with a penalty
Stage = Callable[[Sequence[Trial], Tensor], Refinement]  # prepares the refinement of trials, given the gradients


def learn(rows: Rows, gradients: Tensor, sites: Tensor) -> tuple[SharedModel, list[Trial]]:
    """Learn a shared model; keep each refinement, with the penalty, that predicts held-out rows best.

    Args:
        rows: Outputs under masks.
        gradients: (2, folds, examples, components) gradients at both ends, in units of each example's spread; those of
            a fold are means over the mask gradients of the other folds.
        sites: (components,) number of each component's site.

    Returns:
        The model; and for each fold the trial that is learned without its rows.
    """
    start = _Start.of(rows, gradients, sites)
    trials = [start.trial(rows, fold) for fold in (*range(rows.shape[0]), None)]
    del start  # its features take as much memory as the gradients
    for stage, penalties in STAGES:
        trials = _best(trials, stage, penalties, gradients)
    return trials[-1].model, trials[:-1]


def relearn(model: SharedModel, rows: Rows, gradients: Tensor) -> list[Trial]:
    """Return for each fold a trial without its rows that goes through the same stages as a model."""
    start, penalties = _Start.of(rows, gradients, model.curvature.sites), dict(model.stages)
    trials = [start.trial(rows, fold) for fold in range(rows.shape[0])]
    for stage, _ in STAGES:
        if stage.__name__ in penalties:
            trials = stage(trials, gradients)(penalties[stage.__name__], range(len(trials)))
    return trials


def _best(trials: list[Trial], stage: Stage, penalties: tuple[float, ...], gradients: Tensor) -> list[Trial]:
    """Refine trials with ever weaker penalties until two in turn predict held-out rows no better.

    Return the trials refined with the best penalty, or the given ones when no penalty helps. The last trial has seen
    all rows, so it is refined with the best penalty alone.
    """
    refine, last = stage(trials, gradients), len(trials) - 1
    best, chosen, least, failures = trials, None, sum(trial.error() for trial in trials[:last]), 0
    for penalty in penalties:
        refined = refine(penalty, range(last))
        now = sum(trial.error() for trial in refined)
        if now < least:
            best, chosen, least, failures = refined, penalty, now, 0
        elif failures:
            break
        else:
            failures = 1
    return trials if chosen is None else [*best, *refine(chosen, [last])]


@dataclass(frozen=True)
class _Start:
    """What all trials have in common: the curvature's directions, and how well the features predict each round.

    Attributes:
        gradients: (2, folds, examples, components).
        mean: (2, examples, components), over folds.
        curvature: Its leading directions.
        features: (folds, examples, components) each: the ends, and the curvature along the bands of directions.
        moments: Those of the features, by round.
    """

    gradients: Tensor
    mean: Tensor
    curvature: Curvature
    features: list[Tensor]
    moments: dict[int, SiteMoments]

    @classmethod
    def of(cls, rows: Rows, gradients: Tensor, sites: Tensor) -> "_Start":
        mean = gradients.mean(1)
        products, squares = (by_site((mean[0] * end).sum(0), sites) for end in (mean[1], mean[0]))
        ratio = products / squares.clamp_min(1e-30)
        curvature = Curvature(sites, ratio, _curves(mean[1] - ratio * mean[0], sites))
        features = [*gradients, *curvature.along(gradients, _bands(curvature.curves))]
        return cls(gradients, mean, curvature, features, moments_by_round(rows, features, sites))

    def trial(self, rows: Rows, held: int | None) -> Trial:
        """Learn gains by site from all folds but one, for both ends and for the curvature's leading directions."""
        sites, curvature = self.curvature.sites, self.curvature
        moments = [self.moments[number] for number in rows.without(held).rounds()]
        ends = 2 * (int(sites.max()) + 1)
        placing = gains_by_site([part.leading(ends) for part in moments], 2)[:, sites].float()
        rank = min(RANK, rows.shape[1] // EXAMPLES_PER_DIRECTION)
        directions = _leading(unit(weighted_sum(placing, self.mean)), rank).T
        gain = gains_by_site(moments, len(self.features))[:, sites].float()
        of_bands = [next(i for i, (_, last) in enumerate(BANDS) if n < last) for n in range(len(curvature.curves))]
        every = gain[[0, 1, *(2 + band for band in of_bands)]]
        model = SharedModel(placing, curvature, every, directions, every.new_zeros(rank, rows.shape[2]))
        trial = Trial(model, rows, held, model.places(self.gradients), ())
        return trial.renewed(model, lambda fold: weighted_sum(gain, [feature[fold] for feature in self.features]))


def _bands(curves: Tensor) -> Tensor:
    """Return (bands, directions, components) ones for the directions of each band that there are."""
    bands = curves.new_zeros(sum(first < len(curves) for first, _ in BANDS), *curves.shape)
    for band, (first, last) in zip(bands, BANDS, strict=False):
        band[first:last] = 1
    return bands


def _curves(curvature: Tensor, sites: Tensor) -> Tensor:
    """Return (directions, components) leading directions of each site's (examples, components) curvature."""
    most = min(BANDS[-1][1], len(curvature) // EXAMPLES_PER_DIRECTION)
    curves = curvature.new_zeros(most, curvature.shape[1])
    for group in members_of(sites).values():
        curves[:, group] = _leading(unit(curvature[:, group]), most)
    return curves


def _leading(rows: Tensor, count: int) -> Tensor:
    """Return the (count, columns) leading right singular vectors of (rows, columns); zeros where there are none."""
    table = rows.double()
    wide = table.shape[1] > len(table)
    values, vectors = torch.linalg.eigh(table @ table.T if wide else table.T @ table)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    there = values > 1e-9 * values[:1].clamp_min(1e-30)
    if wide:
        vectors = table.T @ (vectors * values.clamp_min(1e-30).rsqrt())
    leading = rows.new_zeros(count, rows.shape[1])
    leading[: len(there)] = (vectors * there).T
    return leading


def smoothing(trials: Sequence[Trial], gradients: Tensor) -> Refinement:
    """Average the gradients of examples near each other, in place of curves, which do so by site."""
    mean = gradients.mean(1)

    def refined(trial: Trial) -> Trial:
        model, sites = trial.model, trial.model.curvature.sites
        common = torch.linalg.pinv(model.places(mean)) @ mean  # (2, rank, components)
        features = [*gradients, *(trial.places @ one for one in common)]
        moments = moments_by_round(trial.seen(), features, sites)
        gain = gains_by_site(list(moments.values()), len(features))[:, sites].float()
        smoothed = replace(
            model,
            curvature=replace(model.curvature, curves=model.curvature.curves[:0]),
            gain=gain[:2],
            structure=weighted_sum(gain[2:], common),
            stages=(*model.stages, ("smoothing", 0.0)),
        )
        return trial.renewed(smoothed, lambda fold: weighted_sum(gain, [feature[fold] for feature in features]))

    return lambda _, which: [refined(trials[i]) if trials[i].model.rank else trials[i] for i in which]


def gains(trials: Sequence[Trial], gradients: Tensor) -> Refinement:
    """Correct the gains component by component, by ridge on what the model leaves."""
    squares = torch.stack([torch.stack([own.square().sum(0) for own in end]).mean(0) for end in gradients])

    def system(trial: Trial) -> System:
        seen = trial.seen()
        scale = squares * seen.variance() * seen.count()  # (2, components)
        return System(
            trial.rows,
            seen.folds(),
            trial.left,
            weights=lambda fold, some, gain: weighted_sum(gain, gradients[:, fold, :, some]),
            transposed=lambda fold, some, values: (gradients[:, fold, :, some] * values).sum(1),
            scale=scale,
            units=scale + 1e-6 * scale.mean() + 1e-30,
        )

    def changed(number: int, more: Tensor) -> SharedModel:
        model = trials[number].model
        return replace(model, gain=torch.cat([model.gain[:2] + more, model.gain[2:]]))

    return _by_ridge("gains", trials, [system(trial) for trial in trials], changed)


def structure(trials: Sequence[Trial], gradients: Tensor) -> Refinement:
    """Add what examples have in common, by ridge on what the model leaves; large weights may change more."""
    if not trials[0].model.rank:
        return lambda _, which: [trials[i] for i in which]

    def column_of(trial: Trial) -> Tensor:
        squares = [trial.model.weights(gradients[:, fold]).square().mean(0) for fold in trial.rows.folds()]
        return torch.stack(squares).mean(0).sqrt()  # (components,)

    columns = [column_of(trial) for trial in trials]

    def system(trial: Trial, column: Tensor) -> System:
        places, seen = trial.places, trial.seen()
        size = (places**2).mean(0).sum(0)  # (rank,)
        scale = size[:, None] * seen.count() * seen.variance() * column**2  # (rank, components)
        return System(
            trial.rows,
            seen.folds(),
            trial.left,
            weights=lambda fold, some, common: places[fold] @ (common * column[some]),
            transposed=lambda fold, some, values: (places[fold].T @ values) * column[some],
            scale=scale,
            units=(scale.mean() + 1e-30).expand_as(scale),
        )

    def changed(number: int, more: Tensor) -> SharedModel:
        model = trials[number].model
        return replace(model, structure=model.structure + more * columns[number])

    return _by_ridge("structure", trials, [system(*pair) for pair in zip(trials, columns, strict=True)], changed)


def _by_ridge(
    name: str, trials: Sequence[Trial], systems: Sequence[System], changed: Callable[[int, Tensor], SharedModel]
) -> Refinement:
    """Return the refinement of each trial's model by the unknowns of its system, which say what to add to it."""
    solve = solver_of(systems)

    def refine(penalty: float, which: Sequence[int]) -> list[Trial]:
        found, refined = solve(penalty, which), []
        predicted = predictions([systems[i] for i in which], found)
        for i, more, explained in zip(which, found, predicted, strict=True):
            trial = trials[i]
            model = replace(changed(i, more), stages=(*trial.model.stages, (name, penalty)))
            refined.append(replace(trial, model=model, left=subtract(trial.left, explained)))
        return refined

    return refine


STAGES: tuple[tuple[Stage, tuple[float, ...]], ...] = (
    (smoothing, (0.0,)),
    (gains, GAIN_PENALTIES),
    (structure, STRUCTURE_PENALTIES),
)
