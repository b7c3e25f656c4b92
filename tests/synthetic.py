"""Small runs without a model, whose outputs are a known function of the masks."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr

import coar
from coar.components.table import Component, Components
from coar.regression import memory
from coar.store.gradients import MaskGradients
from coar.store.plan import Plan
from coar.store.records import PrecisionRecord, RunRecord

FRACTION = 0.3
PER_LAYER = 4


def table(components):
    """Components in layers of four."""
    return Components(
        Component(f"layer{i // PER_LAYER}[{i % PER_LAYER}]", "neuron", f"layer{i // PER_LAYER}", "output", -1, i % 4, 1)
        for i in range(components)
    )


def weights(examples=20, components=12, seed=1):
    """(examples, components) normal weights, each example on a scale of its own."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((examples, components)) * rng.uniform(0.3, 3, (examples, 1))


def linear(truth, intercept=0.0, noise=0.0, seed=2):
    """Outputs that are linear in the masks, plus Gaussian noise; `noise` is one number, or one per example."""

    def outputs(masks):
        clean = masks @ truth.T + intercept
        return clean + noise * np.random.default_rng(seed).standard_normal(clean.shape)

    return outputs


@dataclass(frozen=True)
class Pairwise:
    """Outputs with effects of components and of pairs of them, whose best linear model and gradients are known.

    The mean gradient by a gate is the best weight exactly, and a single one strays from it by what the output strays
    from the best linear model, so errors of the two go together as they do in a real model.

    Attributes:
        effect: (examples, components) effects.
        pair: (examples, components, components) symmetric effects of pairs, zero on the diagonal.
        ends: (2, components) factors on the gradients at the kept and the ablated end, which a model may have.
        unseen: (examples, components) part of the effects that gradients do not show.
    """

    effect: np.ndarray
    pair: np.ndarray
    ends: np.ndarray
    unseen: np.ndarray | float = 0.0

    def outputs(self, masks):
        """(masks, examples) outputs under (masks, components) masks for all."""
        return masks @ self.effect.T + 0.5 * np.einsum("md,nde,me->mn", masks, self.pair, masks, optimize=True)

    def mask_gradients(self, masks, examples=slice(None)):
        """(passes, examples) outputs and (passes, examples, components) gradients under masks of their own."""
        through = np.einsum("nde,pne->pnd", self.pair[examples], masks, optimize=True)
        outputs = (masks * (self.effect[examples] + 0.5 * through)).sum(2)
        seen = self.effect - self.unseen
        return outputs, (seen[examples] + through) * np.where(masks == 1, *self.ends)

    def best(self, kept=1 - FRACTION):
        """(examples, components) weights of the best linear model."""
        return self.effect + kept * self.pair.sum(2)

    def shares(self, kept=1 - FRACTION):
        """(examples,) share of the outputs' variance that the best linear model explains, and the variance."""
        linear_part = (self.best(kept) ** 2).sum(1) * kept * (1 - kept)
        rest = 0.5 * (self.pair**2).sum((1, 2)) * (kept * (1 - kept)) ** 2
        return linear_part / (linear_part + rest), linear_part + rest


def pairwise(examples=60, components=32, *, pairs=0.3, shared=3, own=0.5, ends=(1.0, 1.0), seed=0):
    """Effects of a few kinds that examples share, each example's own, and of pairs."""
    rng = np.random.default_rng(seed)
    kinds = rng.standard_normal((examples, shared)) @ rng.standard_normal((shared, components)) / np.sqrt(shared)
    effect = kinds + own * rng.standard_normal((examples, components))
    half = np.triu(rng.standard_normal((examples, components, components)) * pairs, 1)
    factors = np.stack([np.broadcast_to(end, components) for end in ends])
    return Pairwise(effect, half + half.transpose(0, 2, 1), factors)


def add_gradients(run, truth, count, *, mask_groups=10):
    """Give a run mask gradients whose numbers are a `Pairwise` truth's; the number of mask groups stays as it was."""
    if not run.entry("gradients"):
        run.set_entry("gradients", {"rounds": [], "mask_groups": mask_groups, "masks": "stratified"})
    mask_gradients = MaskGradients(run)
    mask_gradients.extend(count)
    for unit in mask_gradients.missing_units():
        examples = mask_gradients.examples_of(unit)
        masks = mask_gradients.masks(unit.round)[:, mask_gradients.group_of(examples)].astype(
            float
        )  # (mask gradients, examples, components)
        outputs, gradients = truth.mask_gradients(masks, examples)
        with np.errstate(invalid="ignore"):
            kept = (gradients * masks).sum(0) / masks.sum(0)
            ablated = (gradients * (1 - masks)).sum(0) / (1 - masks).sum(0)
        mask_gradients.write_unit(unit, *(values.astype(np.float32) for values in (kept, ablated, outputs)))
    return run


def make(
    path: Path,
    outputs,
    *,
    components=12,
    masks=200,
    test_masks=0,
    steps=None,
    ablated_fraction=FRACTION,
    blocks=(16, 7),
    metadata=None,
    seed=0,
    batch_norms=None,
):
    """Write a complete run whose outputs are `outputs(masks)`; `steps` are extensions of the plan, in order."""
    sampler = coar.BernoulliSampler(ablated_fraction=ablated_fraction, seed=seed)
    plan = Plan()
    for wanted in steps or [{("test", ablated_fraction): test_masks, ("train", ablated_fraction): masks}]:
        plan = plan.extended(wanted)
    keep = plan.masks(sampler, components, 0, len(plan))
    values = np.asarray(outputs(keep.astype(float)), dtype=np.float32)
    parts = table(components)
    run = coar.Run.create(
        path,
        components=parts,
        metadata={"id": np.arange(values.shape[1]), **(metadata or {})},
        replacements=np.linspace(-1, 1, components, dtype=np.float32),
        fingerprint={
            "components": parts.fingerprint(),
            "weights": "0" * 64,
            "sampler": sampler.settings(),
            "ablation": {"name": "Mean"},
            "output": {"name": "CorrectClassMargin"},
        },
        facts=RunRecord(batch_norms=batch_norms or {}, precision=PrecisionRecord(name="float32")),
        blocks=blocks,
    )
    run.extend(plan)
    run.array("masks")[:] = np.packbits(keep, axis=1, bitorder="little")
    run.array("outputs")[:] = values
    if len(values):
        run.array("base_output")[:] = values.mean(0)
    return run


def design(run, split="train", ablated_fraction=None):
    """(masks, components) 0/1 design and (masks, examples) outputs of a split, read with Zarr alone."""
    group = zarr.open_group(run.path, mode="r")
    chosen = group["split"][:] == split
    if ablated_fraction is not None:
        chosen &= group["ablated_fraction"][:] == ablated_fraction
    x = np.unpackbits(group["masks"][:], axis=1, count=group["component/name"].shape[0], bitorder="little")
    return x[chosen].astype(float), group["outputs"][:][chosen].astype(float)


def fit(run, **settings):
    return coar.fit(run, progress=False, **settings)


@contextmanager
def no_decomposition():
    """Plan fits as if a decomposition never fitted into memory."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_decomposed_bytes", "_correction_bytes"):
            patch.setattr(memory, name, lambda *sizes: math.inf)
        yield


def iterative_fit(run, **settings):
    """Fit without a decomposition."""
    with no_decomposition():
        return fit(run, **settings)


def arrays(attributions):
    """Everything a fit gives, by name."""
    read = {
        "weight": attributions.weights,
        "standard_error": attributions.standard_errors,
        "intercept": lambda: attributions.intercept,
        "penalty": lambda: attributions.penalty,
    }
    lacking = {"lasso": "standard_error", "informed": "penalty"}.get(attributions.fit.method)
    return {name: values() for name, values in read.items() if name != lacking}


def files(folder: Path):
    """Content of every file below a folder, by its path there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
