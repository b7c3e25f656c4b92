"""The component table: what finders find, in which order, under which names, and what they refuse."""

import functools
import pickle

import pytest
import torch
import transformers
from torch import nn
from torchvision.models import resnet18, resnet50, vit_b_16

import coar
from coar.components.membership import check_components
from coar.components.table import Component
from coar.errors import ComponentError
from pipelines.cifar10 import CifarResNet
from pipelines.digits import DigitsNet
from tests import nets, tiny

# a stem of 64, then per stage four convolutions of its width and, from the second on, a shortcut of that width
RESNET18_FILTERS = 64 + 4 * 64 + (4 + 1) * 128 + (4 + 1) * 256 + (4 + 1) * 512


@pytest.fixture
def planar():
    return nets.PlanarNet()


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (resnet18, RESNET18_FILTERS),
        (CifarResNet, 688),
        (lambda: CifarResNet(blocks=7), 1584),
        (DigitsNet, 336),
        (nets.PlanarNet, 8 + 8 + 6 + 6 + 8 + 6),
        (nets.LineAndVolumeNet, 6 + 4 + 6 + 4),
    ],
)
def test_counts_are_those_of_the_architecture(make, count):
    model = make()
    components = coar.conv_filters(model)
    assert len(components) == count
    by_hand = sum(m.out_channels for _, m in model.named_modules() if "Conv" in type(m).__name__)
    assert by_hand == count


def gpt2_small():
    return transformers.GPT2Model(transformers.GPT2Config())


def vit_components(model):
    """All rows of linear layers and of stacked queries, keys and values, but the classifier's."""
    return coar.parameter_slices(model, "*.in_proj_weight") + coar.neurons(model, exclude="heads.head")


PUBLISHED = {  # the counts of Shah et al. 2024, and the call that gives each
    "CIFAR-10": (nets.OneStage, lambda model: coar.conv_filters(model, include="*conv*"), 2_304),
    "ResNet-50": (resnet50, lambda model: coar.conv_filters(model, exclude="*.downsample.*"), 22_720),
    "ResNet-50 by name": (resnet50, lambda model: coar.conv_filters(model, include="*conv*"), 22_720),
    "ResNet-50 with shortcuts": (resnet50, coar.conv_filters, 22_720 + 256 + 512 + 1024 + 2048),
    "ViT-B/16": (vit_b_16, vit_components, 82_944),
    "GPT-2": (gpt2_small, coar.input_features, 64_512),
}


@pytest.mark.parametrize("setup", PUBLISHED)
def test_published_counts_are_reproduced(setup):
    make, find, count = PUBLISHED[setup]
    with torch.device("meta"):
        model = make()
    components = find(model)
    assert len(components) == count
    check_components(model, components)


def test_filters_are_named_and_ordered_like_the_modules(planar):
    components = coar.conv_filters(planar)
    widths = {"grouped": 8, "depthwise": 8, "up": 6, "bare": 6, "grouped_up": 8, "bare_up": 6}
    assert components.names == tuple(f"{site}[{i}]" for site, width in widths.items() for i in range(width))
    assert components[9] == Component("depthwise[1]", "conv filter", "depthwise", "output", 1, 1, 1)
    assert [row.position for row in components[8:16]] == list(range(8))
    assert components.index("up[0]") == 16
    assert set(components.kinds) == {"conv filter"}


def test_neurons_are_rows_of_linear_layers_the_last_among_them(planar):
    components = coar.neurons(planar)
    assert components.names == tuple(f"last[{i}]" for i in range(5))
    assert components[4] == Component("last[4]", "neuron", "last", "output", -1, 4, 1)
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert len(coar.neurons(layer)) == 8 + 16 + 8


def test_neurons_of_transformers_conv1d_are_columns():
    gpt2 = tiny.model("gpt2")
    components = coar.neurons(gpt2, include="*.1.mlp.c_fc")
    assert gpt2.body.h[1].mlp.c_fc.weight.shape == (tiny.WIDTH, tiny.FEED)
    assert components.names == tuple(f"body.h.1.mlp.c_fc[{i}]" for i in range(tiny.FEED))
    assert len(coar.neurons(gpt2)) == tiny.LAYERS * (3 * tiny.WIDTH + tiny.WIDTH + tiny.FEED + tiny.WIDTH)
    check_components(gpt2, coar.neurons(gpt2))


def test_modules_are_components_as_a_whole(planar):
    components = coar.modules(planar, ["norm", "*up"])
    assert components.names == ("norm", "up", "grouped_up", "bare_up")
    assert components[0] == Component("norm", "module", "norm", "module", 0, 0, 1)
    check_components(planar, components)
    with pytest.raises(ComponentError, match="'nrom' matches no module"):
        coar.modules(planar, "nrom")
    with pytest.raises(ComponentError, match="another model"):
        check_components(DigitsNet(), components)


def test_wrappers_are_looked_through(planar):
    for wrapped in (torch.compile(planar), nn.DataParallel(planar), nn.DataParallel(torch.compile(planar))):
        assert coar.conv_filters(wrapped) == coar.conv_filters(planar)
        assert coar.modules(wrapped, "norm") == coar.modules(planar, "norm")
        assert coar.parameter_slices(wrapped, "up.*") == coar.parameter_slices(planar, "up.*")
        check_components(wrapped, coar.neurons(planar))


def test_input_features_are_columns_of_linear_layers_and_rows_of_transformers_conv1d(planar):
    components = coar.input_features(planar)
    assert components.names == tuple(f"last.input[{i}]" for i in range(6))
    assert components[4] == Component("last.input[4]", "input feature", "last", "input", -1, 4, 1)
    gpt2 = tiny.model("gpt2")
    assert gpt2.body.h[1].mlp.c_proj.weight.shape == (tiny.FEED, tiny.WIDTH)  # (inputs, outputs)
    components = coar.input_features(gpt2, include="*.1.mlp.c_proj")
    assert components.names == tuple(f"body.h.1.mlp.c_proj.input[{i}]" for i in range(tiny.FEED))
    widths = {"c_attn": tiny.WIDTH, "c_proj": tiny.WIDTH, "c_fc": tiny.WIDTH}
    assert len(coar.input_features(gpt2)) == tiny.LAYERS * (sum(widths.values()) + tiny.FEED)
    assert coar.input_features(nn.Linear(2, 3)).names == ("input[0]", "input[1]")


def test_what_is_merely_called_conv1d_is_no_linear_layer():
    class Conv1D(nn.Conv1d):
        """A convolution of a user's own."""

    model = nn.Sequential(Conv1D(3, 4, 1), nn.Linear(2, 5))
    assert {row.site for row in coar.input_features(model)} == {"1"}


def test_slices_cut_a_parameter_along_an_axis(planar):
    rows = coar.parameter_slices(planar, ["bare.weight", "last.*"])
    assert rows.names == tuple(f"{name}[{i}]" for name, n in (("bare.weight", 6), ("last.weight", 5), ("last.bias", 5))
                               for i in range(n))  # fmt: skip
    wide = coar.parameter_slices(planar, "last.weight", axis=1, size=3)
    assert wide.names == ("last.weight[:,0:3]", "last.weight[:,3:6]")
    assert wide[1] == Component("last.weight[:,3:6]", "parameter slice", "last.weight", "parameter", 1, 3, 3)


@pytest.mark.parametrize(
    ("settings", "sites"),
    [
        ({"include": "up"}, ["up"]),
        ({"include": "*up"}, ["up", "grouped_up", "bare_up"]),
        ({"include": ["up", "bare*"]}, ["up", "bare", "bare_up"]),
        ({"exclude": "*e*"}, ["up"]),
        ({"include": "*up", "exclude": ["up", "bare_*"]}, ["grouped_up"]),
        ({"include": "[bg]*", "exclude": "?are*"}, ["grouped", "grouped_up"]),
    ],
)
def test_patterns_choose_modules_in_model_order(planar, settings, sites):
    found = coar.conv_filters(planar, **settings)
    assert list(dict.fromkeys(row.site for row in found)) == sites


@pytest.mark.parametrize(
    ("find", "named"),
    [
        (lambda model: coar.conv_filters(model, include="lyaer*"), "lyaer*"),
        (lambda model: coar.conv_filters(model, include=["up", "UP"]), "UP"),
        (lambda model: coar.conv_filters(model, exclude="last"), "last"),  # there, but no convolution
        (lambda model: coar.conv_filters(model, include="up", exclude="up"), "include='up'"),
        (lambda model: coar.neurons(model, include="up"), "up"),
        (lambda model: coar.neurons(model, exclude="last"), "linear layer"),
        (lambda model: coar.input_features(model, include="up"), "up"),
        (lambda model: coar.input_features(model.up), "ConvTranspose2d has no linear layer"),
        (lambda _model: coar.input_features(nn.Sequential(nn.LazyLinear(3))), "lazy"),
        (lambda model: coar.parameter_slices(model, "up"), "up"),
        (lambda model: coar.parameter_slices(model, []), "parameter"),
        (lambda model: coar.parameter_slices(model, "last.bias", axis=1), "last.bias"),
        (lambda model: coar.parameter_slices(model, "last.weight", axis=-1), "last.weight"),
        (lambda model: coar.parameter_slices(model, "last.weight", axis=1, size=4), "size 4"),
        (lambda model: coar.parameter_slices(model, "last.weight", size=0), "size 0"),
        (lambda model: coar.conv_filters(model.last), "Linear"),
        (lambda model: coar.neurons(model.up), "ConvTranspose2d"),
        (lambda _model: coar.conv_filters(nn.Sequential(nn.LazyConv2d(3, 2))), "lazy"),
    ],
)
def test_what_finds_nothing_is_an_error_that_names_it(planar, find, named):
    with pytest.raises(ComponentError) as raised:
        find(planar)
    assert named in str(raised.value)


def test_a_model_that_is_itself_a_layer_has_components():
    layer = nn.Linear(3, 4)
    components = coar.neurons(layer)
    assert components.names == tuple(f"[{i}]" for i in range(4))
    check_components(layer, components)


def test_the_table_is_immutable_and_a_sequence(planar):
    components = coar.conv_filters(planar)
    before = components.names
    with pytest.raises(TypeError):
        components[0] = components[1]
    with pytest.raises(TypeError):
        del components[0]
    with pytest.raises(AttributeError):
        components[0].position = 3
    with pytest.raises(AttributeError):
        components.append(components[0])
    assert components.names == before
    assert next(reversed(components)) == components[-1]
    assert components[3] in components
    assert components[2:4].names == before[2:4]
    with pytest.raises(ComponentError, match="at least one"):
        components[3:3]


def test_equality_hash_and_fingerprint_follow_the_rows(planar):
    one, same = coar.conv_filters(planar), coar.conv_filters(nets.PlanarNet())
    assert one == same
    assert hash(one) == hash(same)
    assert one.fingerprint() == same.fingerprint()
    assert one == pickle.loads(pickle.dumps(one))
    assert one != list(one)
    first = one[0]
    changed = [first._replace(**{field: value}) for field, value in (
        ("name", "other"), ("kind", "neuron"), ("site", "up"), ("side", "parameter"),
        ("axis", 2), ("position", 7), ("size", 2),
    )]  # fmt: skip
    others = [coar.Components([row, *one[1:]]) for row in changed]
    others += [one[1:], one[1:] + one[:1], one + coar.neurons(planar)]
    assert len({table.fingerprint() for table in [one, *others]}) == len(others) + 1
    assert all(one != table for table in others)


def test_addition_keeps_order_and_refuses_duplicates(planar):
    filters, neurons = coar.conv_filters(planar), coar.neurons(planar)
    assert (neurons + coar.input_features(planar)).sites().keys() == {("last", "output", -1), ("last", "input", -1)}
    both = neurons + filters
    assert both.names == neurons.names + filters.names
    assert both.index("grouped[0]") == 5
    with pytest.raises(ComponentError, match=r"'bare\[0\]' is in the table twice"):
        filters + coar.conv_filters(planar, include="bare")


def test_an_unknown_name_is_an_error(planar):
    with pytest.raises(ComponentError, match=r"'up\[17\]'"):
        coar.conv_filters(planar).index("up[17]")


def test_sites_group_rows_in_order(planar):
    components = coar.conv_filters(planar, include="bare*") + coar.parameter_slices(planar, "last.weight", axis=1)
    assert components.sites() == {
        ("bare", "output", 1): list(range(6)),
        ("bare_up", "output", 1): list(range(6, 12)),
        ("last.weight", "parameter", 1): list(range(12, 18)),
    }


def test_the_frame_has_one_row_per_component(planar):
    components = coar.conv_filters(planar) + coar.parameter_slices(planar, "last.weight", axis=1, size=2)
    frame = components.to_pandas()
    assert frame.index.name == "component"
    assert list(frame.columns) == ["name", "kind", "site", "side", "axis", "position", "size"]
    assert [Component(*row) for row in frame.itertuples(index=False)] == list(components)
    assert frame.loc[components.index("up[3]"), "position"] == 3


def test_the_repr_counts_kinds(planar):
    text = repr(coar.conv_filters(planar) + coar.neurons(planar))
    assert "42 conv filters" in text
    assert "5 neurons" in text


def test_components_fit_any_model_of_the_architecture(planar):
    slices = functools.partial(coar.parameter_slices, patterns="*")
    for find in (coar.conv_filters, coar.neurons, coar.input_features, slices):
        check_components(planar, find(nets.PlanarNet()))


@pytest.mark.parametrize(
    ("components", "culprit"),
    [
        (lambda: coar.conv_filters(DigitsNet()), "conv1"),
        (lambda: coar.conv_filters(nn.ModuleDict({"up": nn.Conv2d(1, 7, 1)})), "up"),
        (lambda: coar.neurons(nn.ModuleDict({"last": nn.Linear(6, 6)})), "last"),
        (lambda: coar.neurons(nn.ModuleDict({"norm": nn.Linear(6, 6)})), "norm"),
        (lambda: coar.input_features(nn.ModuleDict({"last": nn.Linear(7, 5)})), "last"),
        (lambda: coar.input_features(nn.ModuleDict({"up": nn.Linear(1, 1)})), "up"),
        (lambda: coar.parameter_slices(nn.ModuleDict({"last": nn.Linear(7, 5)}), "last.weight", axis=1), "last.weight"),
        (lambda: coar.parameter_slices(nn.ModuleDict({"norm": nn.Linear(2, 8)}), "norm.weight", axis=1), "norm.weight"),
        (lambda: coar.parameter_slices(nn.ModuleDict({"bare": nn.Conv2d(6, 6, 3)}), "bare.bias"), "bare.bias"),
    ],
)
def test_components_of_another_model_are_an_error_that_names_the_culprit(planar, components, culprit):
    with pytest.raises(ComponentError, match="belong to another model") as raised:
        check_components(planar, components())
    assert f"'{culprit}" in str(raised.value)


def test_a_study_checks_its_components(planar):
    examples = coar.Examples(inputs=torch.zeros(2, 4, 8, 8), targets=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ComponentError):
        coar.Study(model=planar, examples=examples, components=coar.conv_filters(DigitsNet()))
