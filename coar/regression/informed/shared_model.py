"""What examples share: how gate gradients turn into weights, learned from all examples' outputs at once.

An example's weights, in units of its outputs' spread, are `gain_kept * K + gain_ablated * A + curve + phi H`. K and A
are its mean gate gradients at the kept and the ablated end, which estimate the two ends of the integral that least
squares estimates. Few mask gradients ablate a component, so A is the noisier end; but the curvature, what A has beyond
a multiple of K, lies near a few directions that examples share in a site, and the curve has a gain of its own for each
band of these. `phi` places the example among the others, by the leading directions of their weights, and H says what
examples near each other have in common. Gains are learned per site first and then per component.

A mask gradient's output and its gradient come from one mask, so gradients would explain the outputs of their own mask
gradients too well. The mask gradients are dealt into folds, and the outputs of a fold only ever meet gradients of the
other folds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coar.regression.informed.rows import Rows
from coar.regression.informed.site_gains import by_site, gains_by_site

GAIN_PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1)  # in units of each column's own sum of squares
STRUCTURE_PENALTIES = (100.0, 30.0, 10.0, 3.0)  # in units of the mean column's sum of squares
RANK = 20  # directions in which examples differ, at most
BANDS = ((0, 1), (1, 6))  # of the leading directions of a site's curvature; a gain each
EXAMPLES_PER_DIRECTION = 8
TOLERANCE, STEPS = 1e-3, 100  # of conjugate gradients: relative size of the residual, and iterations


@dataclass(frozen=True)
class SharedModel:
    """How an example's gate gradients become its weights.

    Attributes:
        sites: (components,) number of each component's site.
        placing: (2, components) factors on the ends that give the weights by which an example is placed among others.
        ratio: (components,) multiple of the kept end that is taken off the ablated one to leave the curvature.
        curves: (directions, components) leading directions of the curvature, of unit length in each site.
        gain: (2 + directions, components) factors on the ends, and on the curvature along each direction.
        directions: (components, rank) of the weights by which examples are placed.
        structure: (rank, components) weights of examples in each direction.
        stages: What was refined, and with which penalty, as chosen on held-out rows.
    """

    sites: Tensor
    placing: Tensor
    ratio: Tensor
    curves: Tensor
    gain: Tensor
    directions: Tensor
    structure: Tensor
    stages: tuple[tuple[str, float], ...] = ()

    def weights(self, gradients: Tensor) -> Tensor:
        """Map (2, ..., components) gradients to (..., components) weights, both in units of the spread."""
        return _combine(self.gain, self.features(gradients)) + self.places(gradients) @ self.structure

    def features(self, gradients: Tensor) -> Tensor:
        """Return the (2 + directions, ..., components) ends, and the curvature along each direction."""
        curvature = gradients[1] - self.ratio * gradients[0]
        along = [curve * by_site(curvature * curve, self.sites) for curve in self.curves]
        return torch.stack([*gradients, *along])

    def places(self, gradients: Tensor) -> Tensor:
        """Return the (..., rank) places of examples."""
        return _unit(_combine(self.placing, gradients)) @ self.directions


Stage = Callable[[SharedModel, Rows, Tensor, float], SharedModel]


def learn(rows: Rows, gradients: Tensor, sites: Tensor) -> tuple[SharedModel, list[tuple[Rows, Tensor]]]:
    """Learn a shared model; keep each refinement, with the penalty, that predicts held-out rows best.

    Args:
        rows: Outputs under masks.
        gradients: (2, folds, examples, components) gradients at both ends, in units of each example's spread; those of
            a fold are means over the mask gradients of the other folds.
        sites: (components,) number of each component's site.

    Returns:
        The model; and what `apart` returns for it.
    """
    parts = [rows.split(fold) for fold in range(rows.shape[0])]
    trials = [_start(part, gradients, sites) for part, _ in parts]
    model = _start(rows, gradients, sites)
    for stage, penalties in STAGES:
        trials, penalty = _best(trials, stage, penalties, parts, gradients)
        if penalty is not None:
            model = stage(model, rows, gradients, penalty)
    return model, [(held, trial.weights(gradients)) for trial, (_, held) in zip(trials, parts, strict=True)]


def apart(model: SharedModel, rows: Rows, gradients: Tensor) -> list[tuple[Rows, Tensor]]:
    """Return the rows of each fold with (folds, examples, components) weights that never saw them.

    They are those of a model that goes through the same stages, with the other folds' rows.
    """
    penalties, found = dict(model.stages), []
    for part, held in (rows.split(fold) for fold in range(rows.shape[0])):
        trial = _start(part, gradients, model.sites)
        for stage, _ in STAGES:
            if stage.__name__ in penalties:
                trial = stage(trial, part, gradients, penalties[stage.__name__])
        found.append((held, trial.weights(gradients)))
    return found


def _best(
    trials: list[SharedModel],
    stage: Stage,
    penalties: tuple[float, ...],
    parts: list[tuple[Rows, Rows]],
    gradients: Tensor,
) -> tuple[list[SharedModel], float | None]:
    """Refine the folds' models with ever weaker penalties until two in turn predict held-out rows no better.

    Return the best models and their penalty, or the given ones and None when no penalty helps.
    """

    def error(models: list[SharedModel]) -> float:
        return sum(held.error(model.weights(gradients)) for model, (_, held) in zip(models, parts, strict=True))

    best, chosen, least, failures = trials, None, error(trials), 0
    for penalty in penalties:
        models = [stage(trial, part, gradients, penalty) for trial, (part, _) in zip(trials, parts, strict=True)]
        now = error(models)
        if now < least:
            best, chosen, least, failures = models, penalty, now, 0
        elif failures:
            break
        else:
            failures = 1
    return best, chosen


def _start(rows: Rows, gradients: Tensor, sites: Tensor) -> SharedModel:
    """Learn gains by site, for both ends and for the curvature's leading directions."""
    placing = gains_by_site(rows, gradients, sites)
    mean = gradients.mean(1)  # (2, examples, components), over folds
    products, squares = (by_site((mean[0] * end).sum(0), sites) for end in (mean[1], mean[0]))
    ratio = products / squares.clamp_min(1e-30)
    curves = _curves(mean[1] - ratio * mean[0], sites)
    rank = min(RANK, rows.shape[1] // EXAMPLES_PER_DIRECTION)
    unit = _unit(_combine(placing, mean))
    none = torch.zeros(rank, rows.shape[2])
    model = SharedModel(sites, placing, ratio, curves, torch.empty(0), _leading(unit, rank).T, none)
    return replace(model, gain=_unbanded(gains_by_site(rows, _banded(model.features(gradients)), sites), len(curves)))


def _curves(curvature: Tensor, sites: Tensor) -> Tensor:
    """Return (directions, components) leading directions of each site's (examples, components) curvature."""
    most = min(BANDS[-1][1], len(curvature) // EXAMPLES_PER_DIRECTION)
    curves = torch.zeros(most, curvature.shape[1])
    for site in range(int(sites.max()) + 1):
        group = (sites == site).nonzero()[:, 0]
        found = _leading(_unit(curvature[:, group]), min(most, len(group)))
        curves[: len(found), group] = found
    return curves


def _leading(rows: Tensor, count: int) -> Tensor:
    """Return the (count, columns) leading right singular vectors; zeros where there are none."""
    values, vectors = torch.linalg.eigh((rows @ rows.T).double())
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    size = torch.where(values > 1e-9 * values[:1].clamp_min(1e-30), values.clamp_min(1e-30).rsqrt(), 0)
    leading: Tensor = ((vectors * size).T @ rows.double()).float()
    return leading


def _banded(features: Tensor) -> Tensor:
    """Add the features of a band's directions, which are to have one gain."""
    bands = [features[2:][first:last].sum(0) for first, last in BANDS if len(features) > 2 + first]
    return torch.stack([*features[:2], *bands])


def _unbanded(gain: Tensor, directions: int) -> Tensor:
    """Give every direction the gain of its band; (2 + bands, ...) to (2 + directions, ...)."""
    which = [next(i for i, (_, last) in enumerate(BANDS) if number < last) for number in range(directions)]
    return gain[[0, 1, *(2 + band for band in which)]]


def smoothing(model: SharedModel, rows: Rows, gradients: Tensor, _: float) -> SharedModel:
    """Let the gradients of examples near each other speak for each other, in place of curves, which do so per site."""
    if not len(model.structure):
        return model
    mean = gradients.mean(1)
    places = model.places(mean)
    common = torch.linalg.lstsq(places.expand(2, *places.shape), mean).solution  # (2, rank, components)
    gain = gains_by_site(rows, torch.cat([gradients, model.places(gradients) @ common[:, None]]), model.sites)
    return replace(
        model,
        curves=model.curves[:0],
        gain=gain[:2],
        structure=(gain[2:, None] * common).sum(0),
        stages=(*model.stages, ("smoothing", 0.0)),
    )


def gains(model: SharedModel, rows: Rows, gradients: Tensor, penalty: float) -> SharedModel:
    """Correct the gains component by component, by ridge on what the model leaves."""
    residual = rows.residual(model.weights(gradients))
    scale = (gradients**2).mean(1).sum(1) * rows.variance() * rows.count()  # (2, components)
    ridge = penalty * scale + 1e-6 * scale.mean() + 1e-30

    def adjoint(values: list[Tensor]) -> Tensor:
        return (gradients * rows.adjoint(values)).sum((1, 2))

    def normal(gain: Tensor) -> Tensor:
        return adjoint(rows.predict(_combine(gain, gradients))) + ridge * gain

    more = conjugate_gradients(normal, adjoint(residual), 1 / (scale + ridge))
    gain = torch.cat([model.gain[:2] + more, model.gain[2:]])
    return replace(model, gain=gain, stages=(*model.stages, ("gains", penalty)))


def structure(model: SharedModel, rows: Rows, gradients: Tensor, penalty: float) -> SharedModel:
    """Add what examples have in common, by ridge on what the model leaves; large weights may change more."""
    if not len(model.structure):
        return model
    weights, places = model.weights(gradients), model.places(gradients)
    column = weights.square().mean((0, 1)).sqrt()  # (components,)
    size = (places**2).mean(0).sum(0)  # (rank,)
    scale = size[:, None] * rows.count() * rows.variance() * column**2  # (rank, components)
    ridge = penalty * scale.mean() + 1e-30

    def adjoint(values: list[Tensor]) -> Tensor:
        return torch.einsum("fnr,fnd->rd", places, rows.adjoint(values)) * column

    def normal(structure: Tensor) -> Tensor:
        return adjoint(rows.predict((places @ structure) * column)) + ridge * structure

    more = conjugate_gradients(normal, adjoint(rows.residual(weights)), 1 / (scale + ridge))
    return replace(model, structure=model.structure + more * column, stages=(*model.stages, ("structure", penalty)))


STAGES: tuple[tuple[Stage, tuple[float, ...]], ...] = (
    (smoothing, (0.0,)),
    (gains, GAIN_PENALTIES),
    (structure, STRUCTURE_PENALTIES),
)


def conjugate_gradients(normal: Callable[[Tensor], Tensor], right: Tensor, inverse: Tensor) -> Tensor:
    """Solve `normal(x) = right` for a positive definite `normal`, preconditioned by the diagonal `inverse`."""
    x = torch.zeros_like(right)
    residual = right.clone()
    step = inverse * residual
    size = first = float((residual * step).sum())
    for _ in range(STEPS):
        if size <= TOLERANCE**2 * first:
            break
        image = normal(step)
        length = size / float((step * image).sum())
        x += length * step
        residual -= length * image
        steep = inverse * residual
        size, before = float((residual * steep).sum()), size
        step = steep + size / before * step
    return x


def _combine(gain: Tensor, features: Tensor) -> Tensor:
    weights: Tensor = torch.einsum("kd,k...d->...d", gain, features)
    return weights


def _unit(weights: Tensor) -> Tensor:
    length: Tensor = weights.norm(dim=-1, keepdim=True)
    return weights / length.clamp_min(1e-30)
