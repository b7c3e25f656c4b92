"""Gates do what an overwritten copy does, and leave nothing behind."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import coar
from coar.components.table import Component, Components
from coar.errors import AblationError, ComponentError
from coar.gates.gates import Gates
from tests import nets, oracles


def random_masks(rows, components, *, seed=0, kept=0.7):
    return torch.rand(rows, components, generator=torch.Generator().manual_seed(seed)) < kept


def constants_for(components, seed=1):
    return torch.randn(len(components), generator=torch.Generator().manual_seed(seed))


def overwritten(model, x, components, keep, values):
    """Logits of a copy in which the ablated components' outputs are overwritten."""
    chosen = {
        (row.site, row.position): float(value)
        for row, kept, value in zip(components, keep, values, strict=True)
        if not kept
    }
    return oracles.forward(oracles.replaced(model, chosen), x)


def gated(model, x, components, keep, values, **settings):
    with Gates(model, components, values, **settings) as gates, torch.no_grad():
        gates.set(keep)
        y = model(x)
        gates.confirm()
    return y


@pytest.fixture
def planar():
    return oracles.rough(nets.PlanarNet()), torch.randn(6, 4, 8, 8)


NORMS = {"depthwise": "norm"}
FINDERS = {
    "filters": (coar.conv_filters, {}),
    "neurons": (coar.neurons, {}),
    "through outputs": (coar.conv_filters, {"use_hooks": True}),
    "with a batch norm": (coar.conv_filters, {"batch_norms": NORMS}),
    "slices": (lambda model: coar.parameter_slices(model, ["*.weight", "grouped.bias"]), {}),
}


@pytest.mark.parametrize("way", FINDERS)
@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_is_bit_identical_afterwards(planar, way, interrupted):
    model, x = planar
    find, settings = FINDERS[way]
    components = find(model)
    model.up.register_forward_hook(lambda _module, _args, y: None)
    before = oracles.snapshot(model)
    base = oracles.forward(model, x)
    expected = pytest.raises(RuntimeError) if interrupted else contextlib.nullcontext()
    with expected, Gates(model, components, torch.zeros(len(components)), **settings) as gates, torch.no_grad():
        for mask in random_masks(3, len(components)):
            mask[-1] = False
            gates.set(mask)
            assert not torch.equal(model(x), base)
        model(x[:, :3] if interrupted else x)  # three channels do not fit: an error in the middle of a forward
    oracles.assert_same(before, oracles.snapshot(model))
    assert torch.equal(oracles.forward(model, x), base)


@pytest.mark.parametrize("use_hooks", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(nets.PlanarNet, (6, 4, 8, 8)), (nets.LineAndVolumeNet, (6, 3, 16))],
    ids=["planar", "line and volume"],
)
def test_gates_overwrite_outputs_with_any_constants(make, shape, use_hooks):
    model, x = oracles.rough(make()), torch.randn(*shape)
    components = coar.conv_filters(model) + coar.neurons(model)
    values = constants_for(components)
    for keep in random_masks(4, len(components)):
        y = gated(model, x, components, keep, values, use_hooks=use_hooks)
        torch.testing.assert_close(y, overwritten(model, x, components, keep, values), rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_hooks", [False, True])
def test_layers_without_bias_get_the_right_constants(planar, use_hooks):
    model, x = planar
    sites = ["depthwise", "bare", "bare_up"]
    components = coar.conv_filters(model, include=sites)
    constants, outputs = constants_for(components), {}
    for keep in (torch.zeros(len(components), dtype=torch.bool), random_masks(1, len(components))[0]):
        with Gates(model, components, constants, use_hooks=use_hooks) as gates, torch.no_grad():
            gates.set(keep)
            handles = [  # registered after the gates' own hooks, so that they see what gates let through
                model.get_submodule(site).register_forward_hook(lambda _m, _a, y, site=site: outputs.update({site: y}))
                for site in sites
            ]
            model(x)
        for component, kept, constant in zip(components, keep, constants, strict=True):
            channel = outputs[component.site][:, component.position]
            assert torch.equal(channel, constant.expand_as(channel)) != bool(kept)
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_folded_into_the_gates_changes_nothing(affine):
    model = nets.PlanarNet()
    model.norm = nn.BatchNorm2d(8, eps=0.1, affine=affine)
    oracles.rough(model)
    x, every = torch.randn(6, 4, 8, 8), coar.conv_filters(model)
    for components in (every, every[:11], every[10:20]):  # also where only some filters of the layer are components
        values = constants_for(components)
        for keep in [torch.ones(len(components), dtype=torch.bool), *random_masks(3, len(components))]:
            y = gated(model, x, components, keep, values, batch_norms=NORMS)
            torch.testing.assert_close(y, overwritten(model, x, components, keep, values), rtol=0, atol=1e-5)


def test_zero_weight_constants_are_the_biases(planar):
    model, _ = planar
    components = coar.conv_filters(model) + coar.neurons(model)
    biases = {site: model.get_submodule(site).bias for site in {row.site for row in components}}
    expected = [0 if biases[row.site] is None else biases[row.site].tolist()[row.position] for row in components]
    values = coar.ZeroWeight().replacements(model, components, batch_size=8)
    assert values.dtype == torch.float32
    assert values.tolist() == expected


def test_mean_constants_are_the_channel_means_whatever_the_batch_size(planar):
    model, x = planar
    components = coar.conv_filters(model) + coar.neurons(model)
    ablation = coar.Mean(calibration=coar.Examples(inputs=x, targets=torch.zeros(len(x), dtype=torch.long)))
    means = {site: oracles.channel_means(model, x, site) for site in {row.site for row in components}}
    expected = torch.tensor([means[row.site][row.position] for row in components])
    before = oracles.snapshot(model)
    for batch_size in (1, 4, 100):
        values = ablation.replacements(model, components, batch_size=batch_size)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    oracles.assert_same(before, oracles.snapshot(model))


def test_mean_has_no_meaning_for_slices_and_for_modules_never_called(planar):
    model, x = planar
    ablation = coar.Mean(calibration=coar.Examples(inputs=x, targets=torch.zeros(len(x), dtype=torch.long)))
    with pytest.raises(AblationError, match=r"up\.weight"):
        ablation.replacements(model, coar.parameter_slices(model, "up.weight"), batch_size=8)
    model.spare = nn.Conv2d(1, 2, 3)
    before = oracles.snapshot(model)
    with pytest.raises(AblationError, match="spare"):
        ablation.replacements(model, coar.conv_filters(model), batch_size=8)
    oracles.assert_same(before, oracles.snapshot(model))


@pytest.mark.parametrize("mean", [False, True], ids=["zero weight", "mean"])
@pytest.mark.parametrize("pipeline", ["digits", "cifar10"])
def test_gates_on_outputs_equal_gates_on_weights_also_per_row(pipeline, mean, request):
    module = request.getfixturevalue(pipeline)
    study = module.study(ablation="mean" if mean else "zero")
    model, components = study.model, study.components
    x, _ = study.examples.block(0, 6)
    values = study.ablation.replacements(model, components, batch_size=250)
    masks = random_masks(len(x), len(components), kept=0.9)
    by_weight = torch.stack([gated(model, x, components, keep, values) for keep in masks])  # (masks, rows, classes)
    settings = {"use_hooks": True}
    by_output = torch.stack([gated(model, x, components, keep, values, **settings) for keep in masks])
    torch.testing.assert_close(by_output, by_weight, rtol=0, atol=1e-4)
    per_row = gated(model, x, components, masks, values, **settings)
    torch.testing.assert_close(per_row, by_weight[range(len(x)), range(len(x))], rtol=0, atol=1e-4)


def test_one_mask_per_row_reaches_neurons_behind_further_axes():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, components = torch.randn(5, 7, 4), coar.neurons(model)  # (rows, tokens, features)
    masks, values = random_masks(5, len(components)), constants_for(components)
    per_row = gated(model, x, components, masks, values, use_hooks=True)
    for i, keep in enumerate(masks):
        expected = overwritten(model, x[i : i + 1], components, keep, values)
        torch.testing.assert_close(per_row[i : i + 1], expected, rtol=0, atol=1e-6)


def test_gradient_of_the_mask_agrees_with_finite_differences(planar):
    model, x = planar[0].double(), planar[1].double()
    components = coar.conv_filters(model) + coar.neurons(model)
    values = constants_for(components).double()
    keep = torch.rand(len(x), len(components), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    weights = torch.randn(len(x), 5, dtype=torch.float64)
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
    assert (gradient != 0).double().mean() > 0.8  # not all, since a ReLU may close for a whole channel


def test_own_hooks_stay_and_fire(planar):
    model, x = planar
    fired = []
    model.up.register_forward_hook(lambda _module, _args, _y: fired.append("after"))
    model.up.register_forward_pre_hook(lambda _module, _args: fired.append("before"))
    model.last.weight.register_hook(lambda _gradient: fired.append("backward"))
    components = coar.conv_filters(model)
    for settings in ({}, {"use_hooks": True}):
        gated(model, x, components, torch.ones(len(components)), torch.zeros(len(components)), **settings)
    assert fired == ["before", "after"] * 2
    model(x).sum().backward()
    assert fired == ["before", "after"] * 3 + ["backward"]


class Kept(nn.Linear):
    """A layer of a user's own that keeps what it returned."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


@pytest.mark.parametrize("settings", [{"use_hooks": True}, {"resample": True}])
def test_what_others_hold_of_a_pass_is_not_written_over(settings):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), Kept(6, 3))
    x, held = torch.randn(5, 4), []
    for layer in model[:2]:
        layer.register_forward_hook(lambda _module, _args, y: held.append(y))
    components = coar.neurons(model, include=["0", "4"]) + coar.input_features(model, include="2")
    oracles.forward(model, x)
    with Gates(model, components, torch.zeros(len(components)), **settings) as gates, torch.inference_mode():
        if "resample" in settings:
            gates.record(lambda: model(x.flip(0)))
        for ablated in ("2", "0", "4"):
            gates.set(torch.tensor([row.site != ablated for row in components]))
            gated = model(x)
    plain = held[:2]
    assert torch.equal(held[-4], plain[0])  # what the first layer returned when it was ablated
    assert torch.equal(held[-5], plain[1])  # what the second was given
    assert not torch.equal(model[4].last, gated)


def test_a_batch_norms_own_forward_is_put_back(planar):
    model, x = planar
    model.norm.forward = own = model.norm.forward  # on the module itself, where some libraries put a wrapper
    components = coar.conv_filters(model)
    constants = constants_for(components)
    y = gated(model, x, components, torch.ones(len(components)), constants, batch_norms=NORMS)
    torch.testing.assert_close(y, oracles.forward(model, x), rtol=0, atol=1e-5)
    assert model.norm.forward is own


class Twice(nn.Module):
    """One convolution called twice, then an in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(3, 4)

    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.last(self.relu(self.conv(x)).sum((2, 3)))


@pytest.mark.parametrize("use_hooks", [False, True])
def test_a_module_used_twice_is_gated_both_times_also_before_in_place_layers(use_hooks):
    model, x = oracles.rough(Twice()), torch.randn(4, 3, 5, 5)
    components = coar.conv_filters(model)
    values = constants_for(components)
    for keep in (torch.tensor([True, False, True]), torch.tensor([False, False, True])):
        y = gated(model, x, components, keep, values, use_hooks=use_hooks)
        torch.testing.assert_close(y, overwritten(model, x, components, keep, values), rtol=0, atol=1e-5)
        zero = coar.ZeroWeight().replacements(model, components, batch_size=4)
        rows = [("conv", i) for i in range(3) if not keep[i]]
        expected = oracles.forward(oracles.zeroed(model, rows), x)
        y = gated(model, x, components, keep, zero, use_hooks=use_hooks)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_hooks", [False, True])
def test_tied_weights_are_gated_only_where_the_component_lies(use_hooks):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    x, both = torch.randn(5, 4), coar.neurons(model, exclude="4")
    first = coar.neurons(model, include="0")
    for components in (first, both):
        values = coar.ZeroWeight().replacements(model, components, batch_size=8)
        for keep in random_masks(4, len(components), kept=0.5):
            rows = [(row.site, row.position) for row, kept in zip(components, keep, strict=True) if not kept]
            expected = oracles.forward(oracles.zeroed(model, rows), x)
            y = gated(model, x, components, keep, values, use_hooks=use_hooks)
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("computed", ["weight", "bias"])
@pytest.mark.parametrize("use_hooks", [False, True])
def test_weights_and_biases_computed_from_others_are_gated(computed, use_hooks):
    class Doubled(nn.Module):
        def forward(self, value):
            return 2 * value

    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    if computed == "weight":
        weight_norm(model[0])
    else:
        parametrize.register_parametrization(model[0], "bias", Doubled())
    x, components = torch.randn(5, 2, 4, 4), coar.conv_filters(model)
    values, keep = constants_for(components), torch.tensor([True, False, False, True])
    y = gated(model, x, components, keep, values, use_hooks=use_hooks)
    torch.testing.assert_close(y, overwritten(model, x, components, keep, values), rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_hooks", [False, True])
def test_layers_whose_weights_are_read_without_a_call_are_gated_too(use_hooks):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x, components = torch.randn(3, 5, 8), coar.neurons(model)
    values = coar.ZeroWeight().replacements(model, components, batch_size=8)
    for keep in random_masks(3, len(components)):
        rows = [(row.site, row.position) for row, kept in zip(components, keep, strict=True) if not kept]
        expected = oracles.forward(oracles.zeroed(model, rows), x)
        y = gated(model, x, components, keep, values, use_hooks=use_hooks)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


def test_a_module_never_called_is_an_error_with_hooks(planar):
    model, x = planar
    model.spare = nn.Conv2d(1, 2, 3)
    components = coar.conv_filters(model)
    with pytest.raises(AblationError, match="spare"):
        gated(model, x, components, torch.ones(len(components)), torch.zeros(len(components)), use_hooks=True)


@pytest.mark.parametrize("site", ["grouped", "up", "grouped_up"])
@pytest.mark.parametrize("slices_first", [False, True])
def test_two_kinds_of_components_on_the_same_weights_are_an_error(planar, site, slices_first):
    model, _ = planar
    tables = coar.conv_filters(model, include=site), coar.parameter_slices(model, f"{site}.weight")
    components = tables[1] + tables[0] if slices_first else tables[0] + tables[1]
    with pytest.raises(AblationError, match="same weights"):
        Gates(model, components, torch.zeros(len(components)))


@pytest.mark.parametrize(("axis", "size"), [(1, 1), (0, 2)])
def test_slices_that_overlap_are_an_error(planar, axis, size):
    model, _ = planar
    slices = coar.parameter_slices(model, "up.weight") + coar.parameter_slices(model, "up.weight", axis=axis, size=size)
    with pytest.raises(AblationError):
        Gates(model, slices, torch.zeros(len(slices)))


def test_masks_that_a_gate_cannot_take_are_errors(planar):
    model, x = planar
    filters, slices = coar.conv_filters(model), coar.parameter_slices(model, "*.weight")
    for components in (filters, slices):
        gates = Gates(model, components, torch.zeros(len(components)))
        with gates, pytest.raises(AblationError, match="one mask"):
            gates.set(torch.ones(len(x), len(components), dtype=torch.bool))
    with pytest.raises(AblationError, match="parameter slice"):
        Gates(model, slices, torch.zeros(len(slices)), use_hooks=True)
    other = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(ComponentError, match="belong to another model"):
        Gates(other, filters, torch.zeros(len(filters)))


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("side", ["output", "module"])
def test_components_of_one_side_that_gates_cannot_separate_are_an_error(side, axis):
    model = nn.Sequential(nn.Linear(4, 3))
    table = Components(
        Component(name, "neuron", "0", side, own, i, 1) for name, own, i in (("a", -1, 0), ("b", axis, 1))
    )
    if side == "output" and axis == -1:
        Gates(model, table, torch.zeros(2))  # two rows along one axis
        return
    with pytest.raises(AblationError, match=r"'b' (lies along another axis|overlaps another component)"):
        Gates(model, table, torch.zeros(2))


@pytest.mark.parametrize("use_hooks", [False, True])
@pytest.mark.parametrize("length", [-1, 1])
def test_masks_of_another_length_are_errors(planar, length, use_hooks):
    model, _ = planar
    components = coar.conv_filters(model)
    gates = Gates(model, components, torch.zeros(len(components)), use_hooks=use_hooks)
    with gates, pytest.raises(AblationError):
        gates.set(torch.ones(len(components) + length))


@pytest.mark.parametrize("length", [-1, 1])
def test_constants_of_another_length_are_errors(planar, length):
    model, _ = planar
    components = coar.conv_filters(model)
    with pytest.raises(AblationError):
        Gates(model, components, torch.zeros(len(components) + length))


def test_outputs_without_a_batch_axis_are_an_error():
    model = nn.Sequential(nn.Conv2d(1, 3, 3))
    components = coar.conv_filters(model)
    with pytest.raises(AblationError, match="batch axis"):
        gated(model, torch.randn(1, 8, 8), components, torch.ones(3), torch.zeros(3), use_hooks=True)


def test_gates_in_gates_undo_themselves_in_order(planar):
    model, x = planar
    outer, inner = coar.conv_filters(model, include="up"), coar.conv_filters(model, include=["up", "grouped"])
    before, base = oracles.snapshot(model), oracles.forward(model, x)
    with Gates(model, outer, torch.zeros(len(outer))) as gates, torch.no_grad():
        gates.set(torch.zeros(len(outer), dtype=torch.bool))
        without = model(x)
        gated(model, x, inner, torch.zeros(len(inner)), torch.ones(len(inner)))
        assert torch.equal(model(x), without)
    oracles.assert_same(before, oracles.snapshot(model))
    np.testing.assert_array_equal(oracles.forward(model, x), base)
