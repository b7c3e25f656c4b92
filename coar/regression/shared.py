"""What examples share: how gate gradients turn into weights, learned from all examples' outputs at once.

An example's weights, in units of its outputs' spread, are modelled as `gain_kept * K + gain_ablated * A + phi H`. K and
A are its mean gate gradients at the kept and the ablated end, which estimate the two ends of the integral that least
squares estimates. The gains are learned per site first and then per component. `phi` places the example among the
others, by the leading directions of their weights, and H says what examples near each other have in common.

A probe's output and its gradient come from one mask, so gradients would explain the outputs of their own probes too
well. The probes are dealt into folds, and the outputs of a fold only ever meet gradients of the other folds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

GAIN_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)  # in units of each column's own sum of squares
STRUCTURE_PENALTIES = (3.0, 10.0, 30.0, 100.0)  # in units of the mean column's sum of squares
RANK = 20  # directions in which examples differ, at most
EXAMPLES_PER_DIRECTION = 8
JITTER = 1e-3  # ridge on the gains per site, in units of each column's own sum of squares
TOLERANCE, STEPS = 1e-4, 100  # of conjugate gradients: relative size of the residual, and iterations


@dataclass(frozen=True)
class Slot:
    """Rows of one fold that some examples have in common.

    Attributes:
        masks: (rows, components) booleans.
        mean: (components,) mean of the slot's masks in all folds.
        outputs: (rows, examples) outputs less their mean in all folds, in units of each example's spread.
        examples: (examples,) their places among all.
        fold: The fold of the probes.
    """

    masks: Tensor
    mean: Tensor
    outputs: Tensor
    examples: Tensor
    fold: int


@dataclass(frozen=True)
class Rows:
    """Rows of a set of examples, as one linear operator on their (folds, examples, components) weights.

    Attributes:
        slots: The rows by slot and fold.
        shape: Folds, examples, components.
        kept: Share of the components that a mask keeps.
    """

    slots: tuple[Slot, ...]
    shape: tuple[int, int, int]
    kept: float

    def split(self, fold: int) -> tuple["Rows", "Rows"]:
        """Return the rows of the other folds, and those of one fold."""
        others = tuple(slot for slot in self.slots if slot.fold != fold)
        return replace(self, slots=others), replace(self, slots=tuple(slot for slot in self.slots if slot.fold == fold))

    def count(self) -> float:
        """Return the mean number of rows of an example."""
        return sum(slot.outputs.numel() for slot in self.slots) / self.shape[1]

    def variance(self) -> float:
        """Return the variance of a mask's entry."""
        return self.kept * (1 - self.kept)

    def design(self, slot: Slot) -> Tensor:
        """Return the (rows, components) masks less their mean, as the outputs are less theirs."""
        return slot.masks.float() - slot.mean

    def predict(self, weight: Tensor) -> list[Tensor]:
        """Map (folds, examples, components) weights to (rows, examples) predictions of each slot."""
        return [self.design(slot) @ weight[slot.fold, slot.examples].T for slot in self.slots]

    def pull(self, values: list[Tensor]) -> Tensor:
        """Apply the transpose of `predict`."""
        out = torch.zeros(self.shape)
        for slot, value in zip(self.slots, values, strict=True):
            out[slot.fold, slot.examples] = value.T @ self.design(slot)
        return out

    def residual(self, weight: Tensor) -> list[Tensor]:
        """Return what (folds, examples, components) weights leave of the outputs."""
        return [slot.outputs - part for slot, part in zip(self.slots, self.predict(weight), strict=True)]

    def error(self, weight: Tensor) -> float:
        """Return the sum of squared residuals."""
        return float(sum((part**2).sum() for part in self.residual(weight)))


@dataclass(frozen=True)
class SharedModel:
    """How an example's gate gradients become its weights.

    Attributes:
        gain: (2, components) factors on the gradients at the kept and the ablated end.
        placing: (2, components) such factors that give the weights by which an example is placed among the others.
        directions: (components, rank) of those weights.
        structure: (rank, components) weights of examples in each direction.
        gain_penalty, structure_penalty: As chosen on held-out rows; None where the stage did not help.
    """

    gain: Tensor
    placing: Tensor
    directions: Tensor
    structure: Tensor
    gain_penalty: float | None = None
    structure_penalty: float | None = None

    def weights(self, gradients: Tensor) -> Tensor:
        """Map (2, ..., components) gradients to (..., components) weights, both in units of the spread."""
        return _combine(self.gain, gradients) + self.places(gradients) @ self.structure

    def places(self, gradients: Tensor) -> Tensor:
        """Return the (..., rank) places of examples."""
        return _unit(_combine(self.placing, gradients)) @ self.directions


def learn(rows: Rows, gradients: Tensor, sites: Tensor) -> SharedModel:
    """Learn a shared model, its penalties chosen on the last fold.

    Args:
        rows: Outputs under masks.
        gradients: (2, folds, examples, components) gradients at both ends, in units of each example's spread; those of
            a fold are means over the probes of the other folds.
        sites: (components,) number of each component's site.
    """
    part, held = rows.split(rows.shape[0] - 1)
    start = _start(part, gradients, sites)
    middle, gain = _best(
        start, GAIN_PENALTIES, lambda penalty: _with_gains(start, part, gradients, penalty), held, gradients
    )
    _, structure = _best(
        middle, STRUCTURE_PENALTIES, lambda penalty: _with_structure(middle, part, gradients, penalty), held, gradients
    )
    return _learn_with(rows, gradients, sites, gain, structure)


def cross_fitted(model: SharedModel, rows: Rows, gradients: Tensor, sites: Tensor) -> Iterator[tuple[Rows, Tensor]]:
    """Yield the rows of each fold, and weights by a model with the same penalties that never saw them."""
    for fold in range(rows.shape[0]):
        part, held = rows.split(fold)
        trial = _learn_with(part, gradients, sites, model.gain_penalty, model.structure_penalty)
        yield held, trial.weights(gradients)


def _learn_with(
    rows: Rows, gradients: Tensor, sites: Tensor, gain: float | None, structure: float | None
) -> SharedModel:
    model = _start(rows, gradients, sites)
    if gain is not None:
        model = _with_gains(model, rows, gradients, gain)
    if structure is not None:
        model = _with_structure(model, rows, gradients, structure)
    return model


def _best(
    start: SharedModel,
    penalties: tuple[float, ...],
    refine: Callable[[float], SharedModel],
    held: Rows,
    gradients: Tensor,
) -> tuple[SharedModel, float | None]:
    """Refine a model with the penalty that predicts held-out rows best; keep it as it is when none does better."""
    best, chosen, least = start, None, held.error(start.weights(gradients))
    for penalty in penalties:
        model = refine(penalty)
        error = held.error(model.weights(gradients))
        if error < least:
            best, chosen, least = model, penalty, error
    return best, chosen


def _start(rows: Rows, gradients: Tensor, sites: Tensor) -> SharedModel:
    """Learn gains by site, for the gradients and for what examples near each other have in common of them."""
    gain = _gains_by_site(rows, gradients, sites)
    mean = gradients.mean(1)  # (2, examples, components), over folds
    unit = _unit(_combine(gain, mean)).double()
    rank = min(RANK, rows.shape[1] // EXAMPLES_PER_DIRECTION)
    values, vectors = torch.linalg.eigh(unit @ unit.T)
    values, vectors = values[len(values) - rank :].clamp_min(1e-12), vectors[:, len(values) - rank :]
    directions = (unit.T @ vectors / values.sqrt()).float()
    model = SharedModel(gain, gain, directions, torch.zeros(rank, rows.shape[2]))
    if not rank:
        return model
    places = model.places(mean)
    common = torch.linalg.lstsq(places.expand(2, *places.shape), mean).solution  # (2, rank, components)
    features = torch.cat([gradients, model.places(gradients) @ common[:, None]])
    both = _gains_by_site(rows, features, sites)
    return replace(model, gain=both[:2], structure=(both[2:, None] * common).sum(0))


def _gains_by_site(rows: Rows, features: Tensor, sites: Tensor) -> Tensor:
    """Return (features, components) factors that all components of a site share."""
    kinds, count = len(features), int(sites.max()) + 1
    groups = [(sites == site).nonzero()[:, 0] for site in range(count)]
    gram = torch.zeros(kinds * count, kinds * count, dtype=torch.float64)
    moment = torch.zeros(kinds * count, dtype=torch.float64)
    for slot in rows.slots:
        design = rows.design(slot)
        parts = [part[slot.fold, slot.examples] for part in features]
        columns = [design[:, group] @ part[:, group].T for part in parts for group in groups]
        table = torch.stack([column.flatten() for column in columns]).double()  # (factors, rows * examples)
        gram += table @ table.T
        moment += table @ slot.outputs.flatten().double()
    scale = gram.diagonal()
    floor = 1e-12 * scale.max().clamp_min(1e-30)
    gain: Tensor = torch.linalg.solve(gram + torch.diag(JITTER * scale + floor), moment)
    return gain.float().view(kinds, count)[:, sites]


def _with_gains(model: SharedModel, rows: Rows, gradients: Tensor, penalty: float) -> SharedModel:
    """Correct the gains component by component, by ridge on what the model leaves."""
    residual = rows.residual(model.weights(gradients))
    scale = (gradients**2).mean(1).sum(1) * rows.variance() * rows.count()  # (2, components)
    ridge = penalty * scale + 1e-6 * scale.mean() + 1e-30

    def pull(values: list[Tensor]) -> Tensor:
        return (gradients * rows.pull(values)).sum((1, 2))

    def normal(gain: Tensor) -> Tensor:
        return pull(rows.predict(_combine(gain, gradients))) + ridge * gain

    more = conjugate_gradients(normal, pull(residual), 1 / (scale + ridge))
    return replace(model, gain=model.gain + more, gain_penalty=penalty)


def _with_structure(model: SharedModel, rows: Rows, gradients: Tensor, penalty: float) -> SharedModel:
    """Add what examples have in common, by ridge on what the model leaves; large weights may change more."""
    if not len(model.structure):
        return model
    weights, places = model.weights(gradients), model.places(gradients)
    column = weights.square().mean((0, 1)).sqrt()  # (components,)
    size = (places**2).mean(0).sum(0)  # (rank,)
    scale = size[:, None] * rows.count() * rows.variance() * column**2  # (rank, components)
    ridge = penalty * scale.mean() + 1e-30

    def pull(values: list[Tensor]) -> Tensor:
        return torch.einsum("fnr,fnd->rd", places, rows.pull(values)) * column

    def normal(structure: Tensor) -> Tensor:
        return pull(rows.predict((places @ structure) * column)) + ridge * structure

    more = conjugate_gradients(normal, pull(rows.residual(weights)), 1 / (scale + ridge))
    return replace(model, structure=model.structure + more * column, structure_penalty=penalty)


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


def _combine(gain: Tensor, gradients: Tensor) -> Tensor:
    weights: Tensor = torch.einsum("kd,k...d->...d", gain, gradients)
    return weights


def _unit(weights: Tensor) -> Tensor:
    length: Tensor = weights.norm(dim=-1, keepdim=True)
    return weights / length.clamp_min(1e-30)
