"""Baselines on the trained digits net against loops and hooks written by hand."""

import os
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

import coar
from coar.errors import AblationError, MismatchError
from coar.store.fits import fit_names

ROWS = slice(0, 12)
CLOSE = {"rtol": 1e-3, "atol": 2e-4}  # float32 sums in another order; margins are about 10
BASELINES = {"leave_one_out": coar.leave_one_out, "mask_gradient": coar.mask_gradient}


def dozen(digits, ablation, **options):
    whole = digits.study(ablation=ablation, **options)
    return replace(whole, examples=whole.examples.subset(range(12)))


@pytest.fixture(scope="module", params=["zero", "mean"])
def case(request, digits, tmp_path_factory):
    """A study of a dozen digits, and a run with both baselines computed in blocks of five; read only."""
    study = dozen(digits, request.param)
    path = tmp_path_factory.mktemp("run") / "r.zarr"
    run = coar.collect(study, path, masks=2, execution=coar.Execution(example_block=5), device="cpu", progress=False)
    for baseline in BASELINES.values():
        baseline(study, run, device="cpu", batch_size=5, progress=False)
    return study, run


def margins(logits, targets):
    """Log-odds of the correct class."""
    correct = logits[torch.arange(len(targets)), targets]
    others = [[v for c, v in enumerate(row) if c != y] for row, y in zip(logits.unbind(), targets, strict=True)]
    return correct - torch.stack([torch.stack(row).logsumexp(0) for row in others])


def sites(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}


def constants(study, digits):
    """What replaces each channel of a convolution: nothing (none has a bias), or its mean on training scans."""
    model = deepcopy(study.model)
    if isinstance(study.ablation, coar.ZeroWeight):
        return {name: torch.zeros(module.out_channels) for name, module in sites(model).items()}
    kept = {}
    for name, module in sites(model).items():
        module.register_forward_hook(lambda _m, _a, y, name=name: kept.__setitem__(name, y.mean((0, 2, 3))))
    with torch.no_grad():
        model(digits.split()["train"].inputs)
    return kept


@pytest.fixture(scope="module")
def by_hand(case, digits):
    """Leave-one-out: every component replaced in a copy of its own."""
    study, _ = case
    x, y = study.examples.inputs, study.examples.targets
    values = constants(study, digits)
    with torch.no_grad():
        base = margins(study.model(x), y)
        columns = []
        for name, layer in sites(study.model).items():
            for channel in range(layer.out_channels):
                copy = deepcopy(study.model)
                module = copy.get_submodule(name)
                module.weight[channel] = 0

                def fill(_module, _args, out, channel=channel, value=values[name][channel]):
                    out[:, channel] += value

                module.register_forward_hook(fill)
                columns.append(base - margins(copy(x), y))
    return base.numpy(), torch.stack(columns, 1).numpy()


def test_leave_one_out_is_the_loop(case, by_hand):
    found = coar.load(case[1].path, "leave_one_out")
    assert found.weights().shape == (12, 336)
    assert np.abs(by_hand[1]).max() > 1
    np.testing.assert_allclose(found.weights(), by_hand[1], **CLOSE)


def test_mask_gradient_is_activation_less_replacement_times_gradient(case, digits):
    study, run = case
    values, kept = constants(study, digits), {}
    model = deepcopy(study.model)

    def keep(_module, _args, y, name):
        y.retain_grad()
        kept[name] = y

    for name, module in sites(model).items():
        module.register_forward_hook(lambda m, a, y, name=name: keep(m, a, y, name))
    margins(model(study.examples.inputs), study.examples.targets).sum().backward()
    parts = [((y - values[name][:, None, None]) * y.grad).sum((2, 3)) for name, y in kept.items()]
    order = {name: part.detach() for name, part in zip(kept, parts, strict=True)}
    expected = torch.cat([order[name] for name in sites(model)], 1)
    assert expected.abs().max() > 1
    np.testing.assert_allclose(coar.load(run.path, "mask_gradient").weights(), expected, **CLOSE)


def test_mask_gradient_is_the_slope_of_a_gated_forward(case, digits):
    study, run = case
    values = {name: value.double() for name, value in constants(study, digits).items()}
    x, y = study.examples.inputs.double(), study.examples.targets
    names = list(run.components.names)
    found = coar.load(run.path, "mask_gradient").weights()
    for name, channel in (("conv1", 3), ("layer1.conv2", 9), ("layer2.shortcut.0", 17), ("layer3.conv2", 40)):
        model = deepcopy(study.model).double()
        gate = [1.0]

        def blend(_module, _args, out, channel=channel, value=values[name][channel], gate=gate):
            out = out.clone()
            out[:, channel] = gate[0] * out[:, channel] + (1 - gate[0]) * value
            return out

        model.get_submodule(name).register_forward_hook(blend)
        ends = []
        for gate[0] in (1 + 1e-6, 1 - 1e-6):
            with torch.no_grad():
                ends.append(margins(model(x), y))
        slope = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(found[:, names.index(f"{name}[{channel}]")], slope, **CLOSE)


@pytest.mark.parametrize("name", BASELINES)
def test_everything_kept_predicts_the_unablated_output(case, by_hand, name):
    predicted = coar.load(case[1].path, name).predict(np.ones((1, 336), dtype=bool))[0]
    np.testing.assert_allclose(predicted, by_hand[0], **CLOSE)


@pytest.mark.parametrize("name", BASELINES)
def test_stored_baseline_is_not_computed_again(case, name):
    study, run = case
    folder = run.path / "attributions" / name
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))
    again = BASELINES[name](study, run, progress=False)
    assert not [path for path in folder.rglob("*") if path.is_file() and path.stat().st_mtime > 0]
    np.testing.assert_array_equal(again.weights(), coar.load(run.path, name).weights())


@pytest.mark.parametrize("name", BASELINES)
def test_study_of_another_run_is_refused(case, digits, tmp_path, name):
    study, run = case
    others = {
        "sampler": dozen(digits, study.ablation.label, seed=1),
        "ablation": dozen(digits, {"zero": "mean", "mean": "zero"}[study.ablation.label]),
        "examples": replace(study, examples=study.examples.subset(range(12)[::-1])),
        "weights": replace(study, model=digits.DigitsNet().eval()),
    }
    before = fit_names(run)
    for what, other in others.items():
        with pytest.raises(MismatchError, match=f"\n  {what}: the run has"):
            BASELINES[name](other, run, progress=False)
    assert fit_names(run) == before


def test_baselines_of_parameter_slices(digits, tmp_path):
    study = dozen(digits, "zero")
    slices = coar.parameter_slices(study.model, "layer1.conv1.weight")
    study = replace(study, components=slices)
    run = coar.collect(study, tmp_path / "r.zarr", masks=2, device="cpu", progress=False)
    filters = coar.collect(
        replace(study, components=coar.conv_filters(study.model, include="layer1.conv1")),
        tmp_path / "f.zarr",
        masks=2,
        device="cpu",
        progress=False,
    )
    one = coar.leave_one_out(study, run, progress=False)
    other = coar.leave_one_out(replace(study, components=filters.components), filters, progress=False)
    np.testing.assert_allclose(one.weights(), other.weights(), **CLOSE)
    with pytest.raises(AblationError, match="parameter slice"):
        coar.mask_gradient(study, run, progress=False)
    assert fit_names(run) == ["leave_one_out"]
    assert not coar.verify(run)
