"""Ablation that differs between kinds of components."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.errors import AblationError, SettingsError
from tests import oracles

KINDS = ["conv filter", "neuron"]


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 4)
    return oracles.rough(nn.Sequential(*layers).eval())


def examples(seed, count=6):
    pictures = torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
    return coar.Examples(inputs=pictures, targets=torch.arange(count) % 4)


def study(model, ablation):
    components = coar.neurons(model, exclude="5") + coar.conv_filters(model)
    return coar.Study(model=model, examples=examples(1), components=components, ablation=ablation)


def test_every_kind_has_its_own_constants(tmp_path):
    """Means for filters and zeros for neurons, against a pass that replaces them by hand."""
    model, calibration = net(), examples(2)
    ablation = coar.ByKind(ablations={KINDS[0]: coar.Mean(calibration=calibration), KINDS[1]: coar.ZeroActivation()})
    asked = study(model, ablation)
    run = coar.collect(asked, tmp_path / "run.zarr", masks=3, device="cpu", progress=False)
    with torch.no_grad():
        means = model[0](calibration.inputs).mean((0, 2, 3))
    for mask, outputs in zip(run.masks(0, 3), run.array("outputs")[:], strict=True):
        kept = torch.from_numpy(mask)
        with torch.no_grad():
            filters = torch.where(kept[5:, None, None], model[0](asked.examples.inputs), means[:, None, None])
            hidden = torch.where(kept[:5], model[3](model[1](filters).flatten(1)), 0)
            logits = model[5](model[4](hidden))
        expected = oracles.read_outputs(logits, asked.examples.targets, "logsumexp")
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_settings_and_calibration_examples_are_those_of_all_kinds(tmp_path, caplog):
    model = net()
    mean, zero = coar.Mean(calibration=examples(2)), coar.ZeroActivation()
    found = [
        study(model, coar.ByKind(ablations=dict(zip(KINDS, pair, strict=True)))).fingerprint()["ablation"]
        for pair in ((mean, zero), (zero, mean), (coar.Mean(calibration=examples(3)), zero))
    ]
    assert len({repr(settings) for settings in found}) == 3
    overlapping = study(model, coar.ByKind(ablations=dict.fromkeys(KINDS, coar.Mean(calibration=examples(1)))))
    with caplog.at_level(logging.WARNING, logger="coar"):
        coar.collect(overlapping, tmp_path / "run.zarr", masks=2, device="cpu", progress=False)
    assert "6 of 6 examples of the study are calibration examples too" in caplog.text
    assert not coar.ByKind(ablations={"neuron": mean}).needs_gradients
    assert coar.ByKind(ablations={"neuron": mean, "a": coar.Optimal(calibration=examples(2))}).needs_gradients


def test_what_does_not_fit(tmp_path):
    with pytest.raises(SettingsError, match="Resample for 'neuron' replaces components by other examples' activations"):
        coar.ByKind(ablations={"neuron": coar.Resample()})
    asked = study(net(), coar.ByKind(ablations={"neuron": coar.ZeroActivation()}))
    with pytest.raises(AblationError, match=r"no ablation for the kind 'conv filter'; .* \['conv filter', 'neuron'\]"):
        coar.collect(asked, tmp_path / "run.zarr", masks=2, device="cpu", progress=False)
