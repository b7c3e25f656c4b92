"""An edit folded into the weights gives what the gates predicted, in a model that needs nothing of the package."""

import inspect
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

import coar
from coar.components.table import Component
from coar.errors import ComponentError, EditError
from coar.gates.batch_norms import following_batch_norms
from coar.gates.folding import fold
from coar.gates.gates import Gates
from tests import nets, oracles, tiny


def random_constants(components, seed=5):
    return torch.randn(components.width, generator=torch.Generator().manual_seed(seed)) * 0.5


def some_rows(components):
    """About one component in seven, and at least one of every site."""
    return [i for i, row in enumerate(components) if row.position % 7 == 2]


def gated(model, x, components, rows, values):
    keep = torch.ones(len(components), dtype=torch.bool)
    keep[rows] = False
    with Gates(model, components, values) as gates, torch.no_grad():
        gates.set(keep)
        return model(x)


def norms_of(model, x, components):
    return following_batch_norms(model, components, run=lambda net: oracles.forward(net, x))


def folded(model, components, rows, values, batch_norms):
    copy = deepcopy(model)
    constants = [tuple(values[components.channels_of([i])].tolist()) for i in rows]
    fold(copy, [components[i] for i in rows], constants, batch_norms=batch_norms)
    return copy


def pipeline_case(name):
    def make(request):
        pipeline = request.getfixturevalue(name)
        study = pipeline.study(ablation="mean")
        return study.model, study.examples.block(0, 24)[0], study.ablation

    return make


def made_case(net, shape):
    def make(_request):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        calibration = coar.Examples(inputs=x.flip(0) * 1.1, targets=torch.zeros(len(x), dtype=torch.long))
        return oracles.rough(net()), x, coar.Mean(calibration=calibration)

    return make


RESNET18_NORMS = {"conv1": "bn1"}
RESNET18_NORMS |= {f"layer{i}.{j}.conv{k}": f"layer{i}.{j}.bn{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)}
RESNET18_NORMS |= {f"layer{i}.0.downsample.0": f"layer{i}.0.downsample.1" for i in (2, 3, 4)}
BLOCK_NORMS = {f"layer{i}.{j}.conv{k}": f"layer{i}.{j}.bn{k}" for i in (1, 2, 3) for j in (0, 1, 2) for k in (1, 2)}
CASES = {  # a model with inputs, and the batch norm of every convolution without bias that has one
    "digits": (
        pipeline_case("digits"),
        {"conv1": "bn1"}
        | {f"layer{i}.conv{k}": f"layer{i}.bn{k}" for i in (1, 2, 3) for k in (1, 2)}
        | {f"layer{i}.shortcut.0": f"layer{i}.shortcut.1" for i in (2, 3)},
    ),
    "cifar10": (pipeline_case("cifar10"), {"conv1": "bn1"} | BLOCK_NORMS),
    "resnet18": (made_case(lambda: resnet18(num_classes=7), (12, 3, 64, 64)), RESNET18_NORMS),
    "planar": (made_case(nets.PlanarNet, (24, 4, 8, 8)), {"depthwise": "norm"}),
    "line and volume": (made_case(nets.LineAndVolumeNet, (24, 3, 16)), {"volume": "volume_norm"}),
}


@pytest.mark.parametrize("mean", [False, True], ids=["zero weight", "mean"])
@pytest.mark.parametrize("case", CASES)
def test_folding_gives_what_the_gates_give_and_keeps_the_keys(case, mean, request):
    make, expected_norms = CASES[case]
    model, x, ablation = make(request)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    components = coar.conv_filters(model) + coar.neurons(model)
    ablation = ablation if mean else coar.ZeroWeight()
    values = ablation.replacements(model, components, batch_size=64)
    rows = some_rows(components)
    batch_norms = norms_of(model, x, components)
    assert batch_norms == expected_norms
    edited = folded(model, components, rows, values, batch_norms)
    expected = gated(model, x, components, rows, values)
    torch.testing.assert_close(oracles.forward(edited, x), expected, rtol=0, atol=1e-4)
    assert (expected - oracles.forward(model, x)).abs().mean() > 0.01
    bare = {components[i].site for i in rows if model.get_submodule(components[i].site).bias is None}
    new = {f"{site}.bias" for site in bare - set(batch_norms)} if mean else set()
    assert set(edited.state_dict()) == set(before) | new
    assert bool(new) == (mean and case in ("planar", "line and volume"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_what_was_chosen_changes(digits):
    model = digits.model()
    components = coar.conv_filters(model)
    values = random_constants(components)
    batch_norms = norms_of(model, digits.split()["studied"].block(0, 16)[0], components)
    edited = folded(model, components, [3], values, batch_norms)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    expected["conv1.weight"][3] = 0
    expected["bn1.running_mean"][3] -= values[3]
    for name, value in edited.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_slice_is_zeroed_along_its_axis():
    model = oracles.rough(nets.PlanarNet())
    components = coar.parameter_slices(model, "up.weight", axis=1, size=2)
    edited = folded(model, components, [1], torch.zeros(6), {})
    expected = model.up.weight.detach().clone()
    expected[:, 2:4] = 0
    assert torch.equal(edited.up.weight, expected)
    assert not torch.equal(expected, model.up.weight)


@pytest.mark.parametrize("wiring", nets.WIRINGS)
@pytest.mark.parametrize("signs", [(1, -1, -1, 1), (1, -1, 1, -1), (-1, 1, -1, 1)])
def test_a_batch_norm_takes_constants_only_where_it_alone_reads_the_output(wiring, signs):
    wire, expected = nets.WIRINGS[wiring]
    model, x = nets.Wired(wire), torch.randn(8, 3, 5, 5)
    components = coar.conv_filters(model)
    before = oracles.snapshot(model)
    batch_norms = norms_of(model, x, components)
    assert batch_norms == expected
    oracles.assert_same(before, oracles.snapshot(model))
    values = torch.tensor([0.7, 0.4, 0.9, 0.6] * 2) * torch.tensor(signs * 2)
    rows = [0, 1, 6, 7]
    edited = oracles.forward(folded(model, components, rows, values, batch_norms), x)
    torch.testing.assert_close(edited, gated(model, x, components, rows, values), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [4, 6])
def test_a_batch_norm_over_another_axis_does_not_take_a_neurons_constants(tokens):
    linear, norm = nn.Linear(3, 6, bias=False), nn.BatchNorm1d(tokens)  # the norm's channels are the tokens
    model = oracles.rough(nn.Sequential(linear, norm, nn.Flatten(), nn.Linear(6 * tokens, 3)))
    x, components = torch.randn(8, tokens, 3), coar.neurons(model)
    values = random_constants(components)
    batch_norms = norms_of(model, x, components)
    assert batch_norms == {}
    edited = folded(model, components, [1, 5], values, batch_norms)
    torch.testing.assert_close(oracles.forward(edited, x), gated(model, x, components, [1, 5], values))


def test_a_batch_norm_after_neurons_takes_their_constants():
    model = oracles.rough(nn.Sequential(nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))
    x, components = torch.randn(8, 3), coar.neurons(model, include="0")
    values = random_constants(components)
    assert norms_of(model, x, components) == {"0": "1"}
    edited = folded(model, components, [1, 5], values, {"0": "1"})
    torch.testing.assert_close(oracles.forward(edited, x), gated(model, x, components, [1, 5], values))


class NormAndTanh(nn.BatchNorm2d):
    """A batch norm with an activation in its own forward, as timm has them."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_with_an_activation_inside_takes_constants(affine):
    model = oracles.rough(
        nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), NormAndTanh(6, affine=affine), nn.Conv2d(6, 3, 2), nn.Flatten())
    )
    x, components = torch.randn(8, 3, 4, 4), coar.conv_filters(model, include="0")
    values = random_constants(components)
    before = oracles.snapshot(model)
    batch_norms = norms_of(model, x, components)
    assert batch_norms == {"0": "1"}
    oracles.assert_same(before, oracles.snapshot(model))
    edited = folded(model, components, [1, 5], values, batch_norms)
    assert set(edited.state_dict()) == set(model.state_dict())
    expected = oracles.replaced(model, {("0", 1): float(values[1]), ("0", 5): float(values[5])})
    torch.testing.assert_close(oracles.forward(edited, x), oracles.forward(expected, x))


def test_a_batch_norm_that_keeps_no_statistics_is_no_home_for_constants():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    components = coar.conv_filters(model)
    assert norms_of(model, torch.randn(4, 3, 2, 2), components) == {}


@pytest.mark.parametrize("shared", ["weight", "bias"])
def test_shared_parameters_are_an_error(shared):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    setattr(model[2], shared, getattr(model[0], shared))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(EditError, match=r"shared by 0, 2"):
        fold(model, [coar.neurons(model)[0]], [1.5], batch_norms={})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("computed", ["weight", "bias"])
def test_computed_parameters_are_an_error(computed):
    model = nn.Sequential(nn.Linear(4, 4))
    weight_norm(model[0], computed, dim=0 if computed == "weight" else None)
    with pytest.raises(EditError, match="computed from other parameters"):
        fold(model, [coar.neurons(model)[0]], [1.5], batch_norms={})


def test_components_of_another_model_or_given_twice_are_an_error():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ComponentError, match="another model"):
        fold(model, [Component("1[0]", "neuron", "1", "output", -1, 0, 1)], [0.0], batch_norms={})
    with pytest.raises(ComponentError, match="twice"):
        fold(model, [coar.neurons(model)[0]] * 2, [0.0, 1.0], batch_norms={})


SCRIPT = """
import sys
import torch
from torch import nn
from torch.nn import functional
from safetensors.torch import load_file, save_file
{architecture}
torch.set_num_threads(1)
net = {construction}.eval()
x = load_file("x.safetensors")["x"]
with torch.no_grad():
    for name in sys.argv[1:]:
        net.load_state_dict(load_file(name + ".safetensors"))
        save_file({{"logits": net(x)}}, name + "-logits.safetensors")
assert not [name for name in sys.modules if name.split(".")[0] in ("coar", "pipelines", "zarr")]
"""


def outputs_without_the_package(edited, x, architecture, construction, folder):
    """What a new process makes of edited checkpoints by name, with nothing but the source of their architecture."""
    for name, model in edited.items():
        coar.save_weights(model, folder / f"{name}.safetensors")
    save_file({"x": x.contiguous()}, folder / "x.safetensors")
    script = folder / "plain.py"
    script.write_text(SCRIPT.format(architecture=architecture, construction=construction))
    words = [sys.executable, "-I", str(script), *edited]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: load_file(folder / f"{name}-logits.safetensors")["logits"] for name in edited}


@pytest.mark.parametrize("case", ["digits", "resnet18"])
def test_an_edited_checkpoint_needs_only_torch(case, request, tmp_path):
    model, x, mean = CASES[case][0](request)
    components = coar.conv_filters(model)
    rows, norms = some_rows(components), norms_of(model, x, components)
    ablations = {"zero": coar.ZeroWeight(), "mean": mean}
    values = {name: made.replacements(model, components, batch_size=64) for name, made in ablations.items()}
    edited = {name: folded(model, components, rows, found, norms) for name, found in values.items()}
    if case == "digits":
        source = request.getfixturevalue("digits")
        architecture = (
            "from torch import Tensor\n" + inspect.getsource(source.Block) + inspect.getsource(source.DigitsNet)
        )
        construction = "DigitsNet()"
    else:
        architecture, construction = "from torchvision.models import resnet18", "resnet18(num_classes=7)"
    logits = outputs_without_the_package(edited, x, architecture, construction, tmp_path)
    for name in ablations:
        expected = gated(model, x, components, rows, values[name])
        torch.testing.assert_close(logits[name], expected, rtol=0, atol=1e-4)
        assert (logits[name] - oracles.forward(model, x)).abs().mean() > 0.01


def transformer_parts(model, kind):
    """Heads, neurons after their activation, and outputs of the heads' projections."""
    feed, projection = tiny.PROJECTION[kind]
    inputs = coar.attention_heads(model) + coar.input_features(model, include=feed.format("[0-9]"))
    return inputs + coar.neurons(model, include=projection.format("*"))


@pytest.mark.parametrize("constants", [False, True], ids=["zero weight", "constants"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_folding_inputs_gives_what_the_gates_give_and_keeps_the_keys(kind, constants):
    model, x = tiny.model(kind), tiny.inputs(kind)
    components = transformer_parts(model, kind)
    zero = coar.ZeroWeight().replacements(model, components, batch_size=8)
    values = random_constants(components) if constants else zero
    rows = list(range(0, len(components), 3))
    expected = gated(model, x, components, rows, values)
    assert (expected - oracles.forward(model, x)).abs().mean() > 0.01
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = {f"{components[i].site}.bias" for i in rows} if constants and kind == "llama" else set()
    for order in (rows, rows[::-1]):  # inputs before outputs, and after
        edited = folded(model, components, order, values, {})
        torch.testing.assert_close(oracles.forward(edited, x), expected, rtol=0, atol=1e-4)
        assert set(edited.state_dict()) == set(before) | new
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_inputs_beside_a_batch_norm_that_takes_the_outputs_constants():
    model = oracles.rough(nn.Sequential(nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)))
    x, components = torch.randn(6, 8), coar.input_features(model, include="0") + coar.neurons(model, include="0")
    values = random_constants(components)
    assert norms_of(model, x, components) == {"0": "1"}
    rows = [1, 6, 8, 11]
    for order in (rows, rows[::-1]):
        edited = oracles.forward(folded(model, components, order, values, {"0": "1"}), x)
        torch.testing.assert_close(edited, gated(model, x, components, rows, values), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_inputs_of_layers_whose_parameters_are_not_their_own_are_an_error(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    feature = coar.input_features(model)[0]
    setattr(model[2], name, getattr(model[0], name))
    with pytest.raises(EditError, match=r"shared by 0, 2"):
        fold(model, [feature], [1.5], batch_norms={})
    weight_norm(model[0], name, dim=0 if name == "weight" else None)
    with pytest.raises(EditError, match="computed from other parameters"):
        fold(model, [feature], [1.5], batch_norms={})


def test_an_edited_transformer_needs_only_its_own_library(tmp_path):
    model, x = tiny.model("gpt2"), tiny.inputs("gpt2")
    components = transformer_parts(model, "gpt2")
    values, rows = random_constants(components), list(range(0, len(components), 4))
    edited = folded(model, components, rows, values, {})
    architecture = "from transformers import GPT2Config, GPT2Model\n" + inspect.getsource(tiny.Pooled)
    construction = f"Pooled(GPT2Model(GPT2Config(**{tiny.GPT2!r})))"
    found = outputs_without_the_package({"edited": edited}, x, architecture, construction, tmp_path)["edited"]
    torch.testing.assert_close(found, gated(model, x, components, rows, values), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, DetrFrozenBatchNorm2d])
def test_frozen_batch_norms_take_constants(kind):
    """The norms of detection models are no `BatchNorm2d`, and hold their scales as buffers."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 6, 3, bias=False), kind(6)
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.Conv2d(6, 4, 3)).eval().requires_grad_(False)
    for name, low, high in (("running_mean", -1, 1), ("running_var", 0.5, 2), ("weight", 0.5, 2), ("bias", -1, 1)):
        getattr(norm, name).uniform_(low, high)
    x, components = torch.randn(5, 3, 8, 8), coar.conv_filters(model, include="0")
    norms = following_batch_norms(model, components, run=lambda variant: variant(x))
    assert norms == {"0": "1"}
    edited = deepcopy(model)
    fold(edited, [components[2]], [1.5], batch_norms=norms)
    assert edited.state_dict().keys() == model.state_dict().keys()
    y = conv(x)
    y[:, 2] = 1.5
    assert torch.allclose(edited(x), model[1:](y), atol=1e-5)
    with Gates(model, components, torch.full((6,), 1.5), batch_norms=norms) as gates:
        gates.set(torch.arange(6) != 2)
        assert torch.allclose(model(x), edited(x), atol=1e-5)
