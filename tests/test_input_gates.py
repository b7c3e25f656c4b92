"""Gates on what a layer reads do what rewritten copies do, in its weights and in hooks, and carry gradients."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import coar
from coar.components.table import Component, Components
from coar.errors import AblationError
from coar.gates.gates import Gates, called_sites
from tests import oracles, tiny


def some_parts(model, kind):
    """All heads, and the neurons of every feed-forward block after their activation."""
    return coar.attention_heads(model) + coar.input_features(model, include=tiny.PROJECTION[kind][0].format("[0-9]"))


def random_masks(rows, components, *, seed=0, kept=0.7):
    return torch.rand(rows, components, generator=torch.Generator().manual_seed(seed)) < kept


def constants_for(components, seed=1):
    return torch.randn(components.width, generator=torch.Generator().manual_seed(seed)) * 0.5


def features(components, keep):
    """(site, feature) that a mask ablates, and the number of its constant."""
    every = [(index, row.site, row.position + i) for index, row in enumerate(components) for i in range(row.size)]
    return {(site, feature): n for n, (index, site, feature) in enumerate(every) if not keep[index]}


def rewritten(model, x, components, keep, values):
    constants = {feature: float(values[index]) for feature, index in features(components, keep).items()}
    return oracles.forward(oracles.features_replaced(model, constants), x)


def gated(model, x, components, keep, values, **settings):
    with Gates(model, components, values, **settings) as gates, torch.no_grad():
        gates.set(keep)
        y = model(x)
        gates.confirm()
    return y


@pytest.mark.parametrize("use_hooks", [False, True])
@pytest.mark.parametrize("kind", tiny.MODELS)
def test_zero_weight_zeroes_columns(kind, use_hooks):
    model, x = tiny.model(kind), tiny.inputs(kind)
    components = some_parts(model, kind)
    zero = coar.ZeroWeight().replacements(model, components, batch_size=2)
    assert not zero.any()
    for keep in random_masks(3, len(components)):
        expected = oracles.forward(oracles.features_zeroed(model, features(components, keep)), x)
        y = gated(model, x, components, keep, zero, use_hooks=use_hooks)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-4)
        assert (expected - oracles.forward(model, x)).abs().mean() > 0.05


@pytest.mark.parametrize("use_hooks", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_any_constants_replace_inputs(kind, use_hooks):
    model, x = tiny.model(kind), tiny.inputs(kind)  # llama's layers have no biases
    components = some_parts(model, kind)
    values = constants_for(components)
    for keep in random_masks(3, len(components)):
        y = gated(model, x, components, keep, values, use_hooks=use_hooks)
        torch.testing.assert_close(y, rewritten(model, x, components, keep, values), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_one_mask_per_row_gives_what_each_gives_alone(kind):
    model, x = tiny.model(kind), tiny.inputs(kind)
    components = some_parts(model, kind)
    masks, values = random_masks(len(x), len(components)), constants_for(components)
    per_row = gated(model, x, components, masks, values, use_hooks=True)
    alone = [gated(model, x[i : i + 1], components, keep, values) for i, keep in enumerate(masks)]
    torch.testing.assert_close(per_row, torch.cat(alone), rtol=0, atol=1e-4)


class Pairs(nn.Module):
    """Runs both halves of every pair as rows of their own, side by side."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.flatten(0, 1)).unflatten(0, (-1, 2))


@pytest.mark.parametrize("find", [some_parts, lambda model, kind: coar.neurons(model, exclude="*_proj")])
def test_one_mask_per_row_reaches_all_entries_of_a_row(find):
    model, x = tiny.model("clip"), tiny.inputs("clip", rows=6).unflatten(0, (3, 2))
    components = find(model, "clip")
    pairs = Components(row._replace(site=f"inner.{row.site}") for row in components)
    masks, values = random_masks(3, len(components)), constants_for(components)
    y = gated(Pairs(model), x, pairs, masks, values, use_hooks=True)
    for i, keep in enumerate(masks):
        expected = gated(model, x[i], components, keep, values)
        torch.testing.assert_close(y[i], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("masks", "shape"), [(3, (5, 4)), (3, (1, 4)), (3, (2, 3, 4)), (2, (4,))])
@pytest.mark.parametrize("find", [coar.neurons, coar.input_features])
def test_rows_that_masks_cannot_be_laid_on_are_an_error(find, masks, shape):
    model = nn.Sequential(nn.Linear(4, 4))
    components = find(model)
    with pytest.raises(AblationError, match=rf"{masks} masks .* of '0' has shape \({shape[0]}.* multiple of {masks}"):
        gated(model, torch.randn(shape), components, torch.ones(masks, 4), torch.zeros(4), use_hooks=True)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])  # the others round to float32 inside
def test_gradients_by_masks_of_single_rows_agree_with_finite_differences(kind):
    model, x = tiny.model(kind).double(), tiny.inputs(kind, rows=3)
    components = some_parts(model, kind)
    values = constants_for(components).double()
    generator = torch.Generator().manual_seed(4)
    keep = torch.rand(len(x), len(components), dtype=torch.float64, generator=generator)
    weights = torch.randn(len(x), tiny.WIDTH, dtype=torch.float64, generator=generator)
    with Gates(model, components, values, use_hooks=True) as gates:

        def scalar(mask):
            gates.set(mask)
            return (model(x) * weights).sum()

        live = keep.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(scalar(live), live)
        step = 1e-5
        with torch.no_grad():
            for column in range(len(components)):
                row, ends = column % len(x), []
                for sign in (1, -1):
                    moved = keep.clone()
                    moved[row, column] += sign * step
                    ends.append(float(scalar(moved)))
                slope = (ends[0] - ends[1]) / (2 * step)
                assert float(gradient[row, column]) == pytest.approx(slope, rel=1e-5, abs=1e-7)
    assert (gradient != 0).all()


BOTH = [
    Component("in", "input feature", "0", "input", -1, 1, 1),
    Component("wide", "attention head", "0", "input", -1, 3, 2),
    Component("out", "neuron", "0", "output", -1, 0, 1),
    Component("last", "neuron", "0", "output", -1, 4, 1),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", [{}, {"use_hooks": True}, {"batch_norms": {"0": "1"}}], ids=str)
def test_one_module_may_hold_both_inputs_and_outputs(settings, bias):
    model = oracles.rough(nn.Sequential(nn.Linear(5, 6, bias=bias), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))
    x, components = torch.randn(7, 5), Components(BOTH)
    values = constants_for(components)
    zero = coar.ZeroWeight().replacements(model, components, batch_size=2)
    bias = [0.0] * 6 if model[0].bias is None else model[0].bias.tolist()
    assert zero.tolist() == pytest.approx([0, 0, 0, bias[0], bias[4]])
    inputs, outputs = components[:2], components[2:]
    for constants in (values, zero):
        for keep in torch.cartesian_prod(*[torch.tensor([True, False])] * 4):
            rows = {
                ("0", row.position): float(v)
                for row, v, k in zip(outputs, constants[3:], keep[2:], strict=True)
                if not k
            }
            net = oracles.replaced(model, rows)
            expected = rewritten(net, x, inputs, keep[:2], constants[:3])
            y = gated(model, x, components, keep, constants, **settings)
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


class Named(nn.Module):
    """Gives its layer the input by name, and a further argument."""

    class Scaled(nn.Linear):
        """A linear layer that takes a factor."""

        def forward(self, x, *, factor):
            return super().forward(x) * factor

    def __init__(self):
        super().__init__()
        self.layer = Named.Scaled(4, 3)

    def forward(self, x):
        return self.layer(x=x, factor=2.0) + self.layer(x, factor=1.0)


@pytest.mark.parametrize("use_hooks", [False, True])
def test_inputs_given_by_name_are_gated_and_other_arguments_kept(use_hooks):
    model, x = Named(), torch.randn(5, 4)
    components = coar.input_features(model)
    keep, values = torch.tensor([True, False, True, False]), constants_for(components)
    y = gated(model, x, components, keep, values, use_hooks=use_hooks)
    replaced = torch.where(keep, x, values)
    torch.testing.assert_close(y, oracles.forward(model, replaced), rtol=0, atol=1e-6)
    mean = coar.Mean(calibration=coar.Examples(inputs=x, targets=torch.zeros(5))).replacements
    torch.testing.assert_close(mean(model, components, batch_size=2), x.mean(0))  # also a mean is taken of them


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("use_hooks", [False, True])
def test_the_model_is_bit_identical_afterwards(use_hooks, interrupted):
    model, x = tiny.model("gpt2"), tiny.inputs("gpt2")
    components = some_parts(model, "gpt2")
    fired = []
    site = model.get_submodule(components[0].site)
    site.register_forward_pre_hook(lambda _module, _args, kwargs: fired.append("before"), with_kwargs=True)
    before, base = oracles.snapshot(model), oracles.forward(model, x)
    expected = pytest.raises(IndexError) if interrupted else contextlib.nullcontext()
    gates = Gates(model, components, constants_for(components), use_hooks=use_hooks)
    with expected, gates, torch.no_grad():
        for mask in random_masks(2, len(components)):
            gates.set(mask)
            assert not torch.equal(model(x), base)
        if interrupted:
            site.register_forward_hook(lambda _module, _args, _y: fired[99])  # an error in the middle of a forward
            try:
                model(x)
            finally:
                site._forward_hooks.clear()
    oracles.assert_same(before, oracles.snapshot(model))
    assert torch.equal(oracles.forward(model, x), base)
    assert len(fired) == 4 + interrupted


def test_computed_weights_are_gated_in_hooks():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    weight_norm(model[2])
    x, components = torch.randn(5, 4), coar.input_features(model)
    keep, values = random_masks(1, len(components))[0], constants_for(components)
    y = gated(model, x, components, keep, values)
    torch.testing.assert_close(y, rewritten(model, x, components, keep, values), rtol=0, atol=1e-6)


@pytest.mark.parametrize("use_hooks", [False, True])
def test_layers_that_are_read_without_a_call_are_gated_too(use_hooks):
    model = oracles.rough(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    x, components = torch.randn(3, 5, 8), coar.input_features(model)
    assert "self_attn.out_proj" in {row.site for row in components}
    zero = torch.zeros(len(components))
    keep = random_masks(1, len(components))[0]
    before = oracles.snapshot(model)
    expected = oracles.forward(oracles.features_zeroed(model, features(components, keep)), x)
    y = gated(model, x, components, keep, zero, use_hooks=use_hooks)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    oracles.assert_same(before, oracles.snapshot(model))
    assert called_sites(model, components, run=lambda net: net(x)) == {row.site for row in components}


def test_sites_that_are_called():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "spare": nn.Linear(8, 8)})
    called = called_sites(model, coar.input_features(model), run=lambda net: net["used"](torch.randn(2, 8)))
    assert called == {"used"}


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("find", [coar.neurons, coar.input_features])
@pytest.mark.parametrize("slices_first", [False, True])
def test_slices_of_a_parameter_beside_components_of_its_layer_are_an_error(find, name, slices_first):
    model = nn.Sequential(nn.Linear(4, 3))
    tables = find(model), coar.parameter_slices(model, f"0.{name}")
    components = tables[1] + tables[0] if slices_first else tables[0] + tables[1]
    with pytest.raises(AblationError, match="same weights"):
        Gates(model, components, torch.zeros(len(components)))


def test_heads_and_features_of_the_same_layer_overlap():
    model = tiny.model("gpt2")
    components = coar.attention_heads(model) + coar.input_features(model, include="*.attn.c_proj")
    with pytest.raises(AblationError, match=r"attn\.c_proj\.input\[0\]' overlaps"):
        Gates(model, components, torch.zeros(components.width))


def test_masks_that_a_gate_cannot_take_are_errors():
    model = tiny.model("gpt2")
    heads = coar.attention_heads(model)
    with Gates(model, heads, torch.zeros(heads.width)) as gates, pytest.raises(AblationError, match="one mask"):
        gates.set(torch.ones(5, len(heads)))  # weights are gated, also those of a Conv1D
    model = nn.Sequential(nn.Linear(4, 3))
    components = coar.input_features(model)
    with Gates(model, components, torch.zeros(4), use_hooks=True) as gates:
        gates.set(torch.ones(4))
        with pytest.raises(AblationError, match=r"input of '0' has shape \(5, 3\); 4 channels"):
            model(torch.randn(5, 3))


def test_mean_constants_are_the_means_over_examples_and_positions():
    model, x = tiny.model("gpt2"), tiny.inputs("gpt2", rows=7)
    components = coar.input_features(model, include=["*.mlp.c_proj", "*.c_fc"]) + coar.attention_heads(model)
    ablation = coar.Mean(calibration=coar.Examples(inputs=x, targets=torch.zeros(len(x))))
    means = {site: oracles.feature_means(model, x, site) for site, _, _ in components.sites()}
    expected = torch.tensor([means[row.site][row.position + i] for row in components for i in range(row.size)])
    before = oracles.snapshot(model)
    for batch_size in (3, 100):
        values = ablation.replacements(model, components, batch_size=batch_size)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    oracles.assert_same(before, oracles.snapshot(model))
    model.spare = nn.Linear(2, 2)
    with pytest.raises(AblationError, match=r"'spare' was never called .* its inputs have no activations"):
        ablation.replacements(model, coar.input_features(model, include="spare"), batch_size=8)
