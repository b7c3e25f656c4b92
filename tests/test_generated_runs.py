"""Runs that the fitting benchmarks generate: they are runs like any other, and fits find what is in them."""

import numpy as np
import torch

import coar
from benchmarks.fit import generate


def test_least_squares_finds_what_was_generated(tmp_path):
    masks, components, examples = 3_000, 12, 7
    generate(tmp_path / "r.zarr", masks, components, examples)
    run = coar.Run.open(tmp_path / "r.zarr")
    assert not run.missing_units()
    fitted = coar.fit(run, method="ols", progress=False)
    weights = torch.randn(components, examples, generator=torch.Generator().manual_seed(0)) / components**0.5
    off = (fitted.weights(slice(None)) - weights.numpy().T) / fitted.standard_errors(slice(None))
    assert 0.7 < np.sqrt((off**2).mean()) < 1.3  # as far off as noise of 0.3 makes it
    assert run.fingerprint["ablation"]["name"] == "ZeroWeight"
