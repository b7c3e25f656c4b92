"""Learning the shared model: gains by site, then refinements that are kept where they predict held-out rows better.

A mask gradient's output and its gradient come from one mask, so gradients would explain the outputs of their own mask
gradients too well. The mask gradients are dealt into folds, and the outputs of a fold only ever meet gradients of the
other folds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coar.regression.informed.rows import Rows, subtract, sum_of_squares
from coar.regression.informed.shared_model import Curvature, SharedModel, unit, weighted_sum
from coar.regression.informed.site_gains import SiteMoments, by_site, gains_by_site, members_of, moments_by_round
from coar.regression.informed.solving import System

GAIN_PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1)  # in units of each column's own sum of squares
STRUCTURE_PENALTIES = (100.0, 30.0, 10.0, 3.0)  # in units of the mean column's sum of squares
RANK = 20  # directions in which examples differ, at most
BANDS = ((0, 1), (1, 6))  # of the leading directions of a site's curvature; a gain each
FEATURES = 2 + len(BANDS)  # of a component, each with a gain: both ends of the path, and the bands, at most
EXAMPLES_PER_DIRECTION = 8


@dataclass(frozen=True)
class Trial:
    """A model learned from the rows of some folds, with what it leaves of their outputs and of those of other folds.

    Attributes:
        model: The model.
        rows: The rows that it is learned from.
        held: The rows that it has not seen.
        places: (folds, examples, rank) places of the examples.
        left: Residuals of `rows`.
        held_left: Residuals of `held`.
    """

    model: SharedModel
    rows: Rows
    held: Rows
    places: Tensor
    left: Sequence[Tensor]
    held_left: Sequence[Tensor]

    def error(self) -> float:
        """Return the sum of squared residuals of the rows that the model has not seen."""
        return sum_of_squares(self.held_left)

    def changed(self, model: SharedModel, more: Tensor) -> "Trial":
        """Return the trial with a model whose (folds, examples, components) weights are larger by `more`."""
        return replace(
            self,
            model=model,
            left=subtract(self.left, self.rows.predict(more)),
            held_left=subtract(self.held_left, self.held.predict(more)),
        )

    def renewed(self, model: SharedModel, weights: Tensor) -> "Trial":
        """Return the trial with a model that gives these (folds, examples, components) weights."""
        return replace(self, model=model, left=self.rows.residual(weights), held_left=self.held.residual(weights))


Refinement = Callable[[float], Trial]  # a trial's refinement with a penalty
Stage = Callable[[Trial, Tensor], Refinement]  # prepares the refinement of a trial, given the gradients


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
    trials = [start.trial(*rows.split(fold)) for fold in range(rows.shape[0])]
    final = start.trial(rows, replace(rows, blocks=()))
    del start  # its features take as much memory as the gradients
    for stage, penalties in STAGES:
        trials, penalty = _best(trials, stage, penalties, gradients)
        if penalty is not None:
            final = stage(final, gradients)(penalty)
    return final.model, trials


def relearn(model: SharedModel, rows: Rows, gradients: Tensor) -> list[Trial]:
    """Return for each fold a trial without its rows that goes through the same stages as a model."""
    start, penalties, found = _Start.of(rows, gradients, model.curvature.sites), dict(model.stages), []
    for fold in range(rows.shape[0]):
        trial = start.trial(*rows.split(fold))
        for stage, _ in STAGES:
            if stage.__name__ in penalties:
                trial = stage(trial, gradients)(penalties[stage.__name__])
        found.append(trial)
    return found


def _best(
    trials: list[Trial], stage: Stage, penalties: tuple[float, ...], gradients: Tensor
) -> tuple[list[Trial], float | None]:
    """Refine the folds' trials with ever weaker penalties until two in turn predict held-out rows no better.

    Return the best trials and their penalty, or the given ones and None when no penalty helps.
    """
    refinements = [stage(trial, gradients) for trial in trials]
    best, chosen, least, failures = trials, None, sum(trial.error() for trial in trials), 0
    for penalty in penalties:
        refined = [refinement(penalty) for refinement in refinements]
        now = sum(trial.error() for trial in refined)
        if now < least:
            best, chosen, least, failures = refined, penalty, now, 0
        elif failures:
            break
        else:
            failures = 1
    return best, chosen


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
        features = [*gradients, *curvature.along(gradients, _bands(len(curvature.curves), len(sites)))]
        return cls(gradients, mean, curvature, features, moments_by_round(rows, features, sites))

    def trial(self, rows: Rows, held: Rows) -> Trial:
        """Learn gains by site from rows, for both ends and for the curvature's leading directions."""
        sites, curvature = self.curvature.sites, self.curvature
        moments = [self.moments[number] for number in rows.rounds()]
        ends = 2 * (int(sites.max()) + 1)
        placing = gains_by_site([part.leading(ends) for part in moments], 2)[:, sites].float()
        rank = min(RANK, rows.shape[1] // EXAMPLES_PER_DIRECTION)
        directions = _leading(unit(weighted_sum(placing, self.mean)), rank).T
        gain = gains_by_site(moments, len(self.features))[:, sites].float()
        of_bands = [next(i for i, (_, last) in enumerate(BANDS) if n < last) for n in range(len(curvature.curves))]
        every = gain[[0, 1, *(2 + band for band in of_bands)]]
        model = SharedModel(placing, curvature, every, directions, torch.zeros(rank, rows.shape[2]))
        trial = Trial(model, rows, held, model.places(self.gradients), (), ())
        return trial.renewed(model, weighted_sum(gain, self.features))


def _bands(directions: int, components: int) -> Tensor:
    """Return (bands, directions, components) ones for the directions of each band that there are."""
    bands = torch.zeros(sum(first < directions for first, _ in BANDS), directions, components)
    for band, (first, last) in zip(bands, BANDS, strict=False):
        band[first:last] = 1
    return bands


def _curves(curvature: Tensor, sites: Tensor) -> Tensor:
    """Return (directions, components) leading directions of each site's (examples, components) curvature."""
    most = min(BANDS[-1][1], len(curvature) // EXAMPLES_PER_DIRECTION)
    curves = torch.zeros(most, curvature.shape[1])
    for group in members_of(sites):
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
    leading = torch.zeros(count, table.shape[1])
    leading[: len(there)] = (vectors * there).T
    return leading


def smoothing(trial: Trial, gradients: Tensor) -> Refinement:
    """Average the gradients of examples near each other, in place of curves, which do so by site."""

    def refine(_: float) -> Trial:
        model, sites = trial.model, trial.model.curvature.sites
        if not model.rank:
            return trial
        mean = gradients.mean(1)
        places = model.places(mean)
        common = torch.linalg.lstsq(places.expand(2, *places.shape), mean).solution  # (2, rank, components)
        features = [*gradients, *(trial.places @ one for one in common)]
        moments = moments_by_round(trial.rows, features, sites)
        gain = gains_by_site(list(moments.values()), len(features))[:, sites].float()
        smoothed = replace(
            model,
            curvature=replace(model.curvature, curves=model.curvature.curves[:0]),
            gain=gain[:2],
            structure=weighted_sum(gain[2:], common),
            stages=(*model.stages, ("smoothing", 0.0)),
        )
        return trial.renewed(smoothed, weighted_sum(gain, features))

    return refine


def gains(trial: Trial, gradients: Tensor) -> Refinement:
    """Correct the gains component by component, by ridge on what the model leaves."""
    rows = trial.rows
    squares = torch.stack([torch.stack([own.square().sum(0) for own in end]).mean(0) for end in gradients])
    scale = squares * rows.variance() * rows.count()  # (2, components)
    solve = System(
        rows,
        trial.left,
        weights=lambda fold, gain: weighted_sum(gain, gradients[:, fold]),
        transposed=lambda fold, values: torch.stack([(own * values).sum(0) for own in gradients[:, fold]]),
        scale=scale,
        units=scale + 1e-6 * scale.mean() + 1e-30,
    ).solver()

    def refine(penalty: float) -> Trial:
        more, model = solve(penalty), trial.model
        gain = torch.cat([model.gain[:2] + more, model.gain[2:]])
        refined = replace(model, gain=gain, stages=(*model.stages, ("gains", penalty)))
        return trial.changed(refined, weighted_sum(more, gradients))

    return refine


def structure(trial: Trial, gradients: Tensor) -> Refinement:
    """Add what examples have in common, by ridge on what the model leaves; large weights may change more."""
    rows, places = trial.rows, trial.places
    column = trial.model.weights(gradients).square().mean((0, 1)).sqrt()  # (components,)
    size = (places**2).mean(0).sum(0)  # (rank,)
    scale = size[:, None] * rows.count() * rows.variance() * column**2  # (rank, components)
    solve = System(
        rows,
        trial.left,
        weights=lambda fold, common: places[fold] @ (common * column),
        transposed=lambda fold, values: (places[fold].T @ values) * column,
        scale=scale,
        units=scale.mean() + 1e-30,
    ).solver()

    def refine(penalty: float) -> Trial:
        model = trial.model
        if not model.rank:
            return trial
        more = solve(penalty) * column
        refined = replace(model, structure=model.structure + more, stages=(*model.stages, ("structure", penalty)))
        return trial.changed(refined, places @ more)

    return refine


STAGES: tuple[tuple[Stage, tuple[float, ...]], ...] = (
    (smoothing, (0.0,)),
    (gains, GAIN_PENALTIES),
    (structure, STRUCTURE_PENALTIES),
)
