"""Models that are awkward to ablate: wrapped, of low precision, with hooks, keyword arguments or padded inputs."""

from collections import namedtuple
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.errors import AblationError, OutputError, SettingsError
from coar.gates.gates import Gates
from tests import architectures, oracles, tiny

EXAMPLES, CLASSES = 12, 4


class Net(nn.Module):
    """A small net that returns its logits in a package of choice."""

    def __init__(self, package=lambda logits: logits):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Linear(6, CLASSES)
        self.relu = nn.ReLU(inplace=True)
        self.package = package

    def forward(self, x):
        return self.package(self.last(self.relu(self.norm(self.conv(x))).mean((2, 3)) * 4))


def net(**settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = oracles.rough(Net(**settings))
    with torch.no_grad():
        model.conv.weight.mul_(3)
    return model.requires_grad_(False)


def pictures(dtype=torch.float32):
    x = torch.randn(EXAMPLES, 3, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    return coar.Examples(inputs=x, targets=torch.arange(EXAMPLES) % CLASSES)


def study(model, **changes):
    parts = {"model": model, "examples": pictures(), "components": coar.conv_filters(model), **changes}
    return coar.Study(sampler=coar.BernoulliSampler(ablated_fraction=0.4), **parts)


def collect(what, path, masks=6, **settings):
    return coar.collect(
        what, path, masks=masks, device="cpu", progress=False, execution=coar.Execution(batch_size=5), **settings
    )


def outputs(run):
    return run.array("outputs")[:]


def expected(model, run, examples, constant=0.0):
    """(masks, examples) margins of plain copies whose ablated filters are overwritten."""
    masks = run.plan.masks(run.sampler, run.n_components, 0, len(run.plan))
    rows = []
    for mask in masks:
        patches = [("conv", "output", 1, i, i + 1, constant) for i in np.flatnonzero(~mask)]
        logits = oracles.patched(model, examples.inputs, patches)
        rows.append(oracles.read_outputs(logits.float(), examples.targets, "logsumexp"))
    return np.stack(rows)


def compiled_in_place():
    model = net()
    model.compile(backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda: torch.compile(net(), backend="eager"),
    "compiled in place": compiled_in_place,
    "data parallel": lambda: nn.DataParallel(net()),
    "both": lambda: nn.DataParallel(torch.compile(net(), backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_give_what_the_model_inside_gives(wrapper, tmp_path):
    wrapped = WRAPPERS[wrapper]()
    what = study(wrapped, ablation=coar.Resample())
    assert what.fingerprint() == study(net(), ablation=coar.Resample()).fingerprint()
    run = collect(study(wrapped), tmp_path / "r.zarr", gradients=8)
    np.testing.assert_allclose(outputs(run), expected(net(), run, pictures()), atol=1e-4)
    plain = collect(study(net()), tmp_path / "plain.zarr", gradients=8)
    np.testing.assert_array_equal(run.array("gradient_kept")[:], plain.array("gradient_kept")[:])
    goal = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")
    edit = coar.edit(coar.fit(run, progress=False), goal, budget=2)
    x = pictures().inputs
    assert torch.equal(oracles.forward(edit.apply(wrapped), x), oracles.forward(edit.apply(net()), x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label", ["zero", "zero_activation", "mean", "peak", "optimal", "resample"])
def test_models_of_low_precision_are_near_their_own_kind(dtype, label, tmp_path):
    """Against the same weights in float64."""
    low, exact = net().to(dtype), net().to(dtype).double()
    ablation = coar.choose_ablation(label, calibration=pictures(dtype))
    what = study(low, examples=pictures(dtype), ablation=ablation)
    run = collect(what, tmp_path / "r.zarr", gradients=8)
    constants = [0.0] * len(what.components)
    if label == "mean":
        constants = oracles.channel_means(exact, pictures(dtype).inputs.double(), "conv")
    if label == "peak":  # in the precision of the model, since a histogram's fullest bin may be another one
        passed = oracles.held(low, pictures(dtype).inputs, [("conv", "output")])["conv", "output"][0].float()
        constants = [oracles.peak(passed[:, n].flatten().tolist(), 128) for n in range(6)]
    if label == "optimal":
        constants = run.replacements.tolist()
        assert np.isfinite(constants).all()
    x, sources = pictures(dtype).inputs.double(), ablation.sources(pictures(dtype))
    masks = run.plan.masks(run.sampler, run.n_components, 0, 6)
    held = None if sources is None else oracles.held(exact, x[sources], [("conv", "output")])["conv", "output"]
    for mask, row in zip(masks, outputs(run), strict=True):
        patches = [("conv", "output", 1, i, i + 1, held or constants[i]) for i in np.flatnonzero(~mask)]
        logits = oracles.patched(exact, x, patches)
        margins = oracles.read_outputs(logits, pictures().targets, "logsumexp")
        np.testing.assert_allclose(row, margins, atol=0.15 if dtype == torch.bfloat16 else 0.02)
    assert np.isfinite(run.array("gradient_outputs")[:, :2]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label", ["zero", "mean", "position_mean", "peak", "optimal", "resample"])
@pytest.mark.parametrize("name", ["GPT-2", "torch TransformerEncoder"])
def test_transformers_of_low_precision_are_near_those_of_full_precision(name, label, dtype, tmp_path):
    """Though two ways of gating differ by as much as roundings do."""
    architecture, found = architectures.ARCHITECTURES[name], []
    for kind in (torch.float32, dtype):
        model = architecture.make().to(kind)
        x, given = (v if name == "GPT-2" else v.to(kind) for v in (architecture.inputs(1), architecture.inputs(9)))
        calibration = coar.Examples(inputs=given, targets=torch.arange(4))
        ablation = coar.choose_ablation(label, calibration=calibration)
        if label == "optimal":
            ablation = coar.Optimal(calibration=calibration, steps=10)
        examples = coar.Examples(inputs=x, targets=torch.arange(4))
        what = coar.Study(
            model=model,
            examples=examples,
            components=coar.attention_heads(model),
            ablation=ablation,
            sampler=coar.BernoulliSampler(ablated_fraction=0.4),
        )
        found.append(outputs(collect(what, tmp_path / f"{kind}.zarr", gradients=8)))
    exact, low = found
    if label == "peak":  # the fullest bin may be another one
        assert np.isfinite(low).all()
    else:
        np.testing.assert_allclose(low, exact, atol=0.03 * np.abs(exact).max())


def test_hooks_of_the_models_owner_go_on_working(tmp_path):
    model = net()
    calls = []
    model.conv.register_forward_hook(lambda _module, _args, y: y * 1.5)
    model.last.register_forward_pre_hook(lambda _module, args: calls.append(args[0].shape))
    plain = outputs(collect(study(net()), tmp_path / "plain.zarr"))
    run = collect(study(model), tmp_path / "r.zarr")
    np.testing.assert_allclose(outputs(run), expected(model, run, pictures()), atol=1e-4)
    assert np.abs(outputs(run) - plain).max() > 0.1
    assert len(calls) > 0


Pair = namedtuple("Pair", ["logits", "extra"])


@dataclass
class Result:
    """What a user's model may return."""

    logits: torch.Tensor


PACKAGES = {
    "tuple": lambda logits: (logits, None),
    "named tuple": lambda logits: Pair(logits, 1),
    "named tuple with logits last": lambda logits: namedtuple("Late", ["loss", "logits"])(0.0, logits),
    "dict": lambda logits: {"loss": 0.0, "logits": logits},
    "dataclass": Result,
}


@pytest.mark.parametrize("package", PACKAGES)
def test_logits_are_read_from_any_usual_package(package, tmp_path):
    model = net(package=PACKAGES[package])
    run = collect(study(model), tmp_path / "r.zarr", gradients=8)
    np.testing.assert_allclose(outputs(run), expected(net(), run, pictures()), atol=1e-4)


@pytest.mark.parametrize("package", [lambda _: {"scores": 1}, lambda _: (), lambda _: (None, 2)])
def test_packages_without_logits_are_errors(package, tmp_path):
    with pytest.raises(OutputError, match="without logits"):
        collect(study(net(package=package)), tmp_path / "r.zarr")


@pytest.mark.parametrize("name", ["model", "examples", "components", "output", "ablation", "sampler"])
def test_a_study_of_things_of_another_kind_is_an_error(name):
    parts = {"model": net(), "examples": pictures(), "components": coar.conv_filters(net())}
    with pytest.raises(
        SettingsError, match=rf"{name} is of type str, and \w+ was expected; give an object, not its name"
    ):
        coar.Study(**parts | {name: "mean"})


@pytest.mark.parametrize("label", ["mean", "peak", "optimal"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_that_is_not_finite_is_an_error(label, value):
    examples = pictures()
    examples.inputs[3, 0, 1, 1] = value
    ablation = coar.choose_ablation(label, calibration=examples)
    with pytest.raises(AblationError, match=r"'conv' has activations that are not finite while the calibration"):
        ablation.replacements(net(), coar.conv_filters(net()), batch_size=5)


@pytest.fixture(scope="module")
def bert():
    return tiny.classifier()


def test_padded_texts_given_by_name_are_as_each_without_its_padding(bert, tmp_path):
    lengths = [3, 9, 5, 7, 2, 6]
    examples = tiny.sentences(lengths)
    components = coar.attention_heads(bert) + coar.input_features(bert, include="*.[01].output.dense")
    what = coar.Study(
        model=bert,
        examples=examples,
        components=components,
        sampler=coar.BernoulliSampler(ablated_fraction=0.4),
    )
    run = collect(what, tmp_path / "r.zarr", gradients=8)
    masks = run.plan.masks(run.sampler, run.n_components, 0, 6)
    for mask, row in zip(masks, outputs(run), strict=True):
        left_out = [components[i] for i in np.flatnonzero(~mask)]
        patches = [(c.site, "input", -1, c.position, c.position + c.size, 0.0) for c in left_out]
        for n, length in enumerate(lengths):
            words = examples.inputs["input_ids"][n : n + 1, :length]
            logits = oracles.patched(bert, words, patches, run=lambda net, ids: oracles.forward(net, ids).logits)
            margin = oracles.read_outputs(logits, examples.targets[n : n + 1], "logsumexp")
            np.testing.assert_allclose(row[n], margin[0], atol=1e-4)


def test_resampling_texts_of_several_lengths_needs_one_shape(bert):
    components = coar.attention_heads(bert)
    with Gates(bert, components, torch.zeros(components.width), resample=True) as gates, torch.no_grad():
        gates.record(lambda: bert(tiny.sentences([4, 4]).inputs["input_ids"]))
        gates.set(torch.ones(len(components)))
        with pytest.raises(AblationError, match="pad all examples alike"):
            bert(tiny.sentences([6, 6]).inputs["input_ids"])


def test_whole_modules_that_return_no_tensor_are_errors():
    model = net(package=lambda logits: {"logits": logits})
    outer = nn.Sequential(model)
    components = coar.modules(outer, "0")
    with Gates(outer, components, torch.zeros(components.width)) as gates:
        gates.set(torch.zeros(1))
        with pytest.raises(
            AblationError, match="Net returned a dict; a tensor, or a tuple or dataclass that starts with one"
        ):
            outer(pictures().inputs)


def test_a_module_is_zero_for_whom_it_is_ablated(tmp_path):
    model = net()
    what = study(model, components=coar.modules(model, ["conv", "norm"]), ablation=coar.ZeroActivation())
    run = collect(replace(what, sampler=coar.BernoulliSampler(ablated_fraction=0.5)), tmp_path / "r.zarr", gradients=8)
    masks = run.plan.masks(run.sampler, 2, 0, 6)
    assert len({tuple(mask) for mask in masks}) > 2
    for mask, row in zip(masks, outputs(run), strict=True):
        patches = [
            (path, "output", None, 0, 1, 0.0) for path, kept in zip(("conv", "norm"), mask, strict=True) if not kept
        ]
        logits = oracles.patched(model, pictures().inputs, patches)
        np.testing.assert_allclose(row, oracles.read_outputs(logits, pictures().targets, "logsumexp"), atol=1e-4)
