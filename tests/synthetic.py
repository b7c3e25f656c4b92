"""Small runs without a model, whose outputs are a known function of the masks."""

from pathlib import Path

import numpy as np
import zarr

import coar
from coar.components import Component, Components
from coar.store import Plan

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
    **facts,
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
        facts={"precision": {"name": "float32"}, "batch_norms": {}, **facts},
        blocks=blocks,
    )
    run.extend(plan)
    run.array("masks")[:] = np.packbits(keep, axis=1, bitorder="little")
    run.array("outputs")[:] = values
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


def arrays(attributions):
    """Everything a regression gives, by name."""
    return {
        "weight": attributions.weights(),
        "standard_error": attributions.standard_errors(),
        "intercept": attributions.intercept,
        "penalty": attributions.penalty,
    }


def files(folder: Path):
    """Content of every file below a folder, by its path there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
