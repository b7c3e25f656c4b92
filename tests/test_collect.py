"""Collecting: every number is the model's, going on changes nothing that is there, and mistakes are named."""

import json
import math
import shutil
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import coar
from coar.errors import MismatchError, OutputError, PrecisionError, SettingsError
from coar.store.plan import Unit
from tests.faults import helpers
from tests.faults.helpers import collect, study

ASKED = {"masks": 100, "test_masks": 20}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """120 rows and 20 examples of the tiny net, read only."""
    return collect(study(), tmp_path_factory.mktemp("run") / "tiny.zarr", **ASKED)


@pytest.fixture(scope="module")
def longer(run, tmp_path_factory):
    """The same run, extended to 250 rows, read only."""
    path = helpers.copied(run, tmp_path_factory.mktemp("run") / "longer.zarr").path
    return collect(study(), path, masks=230, test_masks=20)


@pytest.fixture
def fresh(run, tmp_path):
    """A copy of the run to change."""
    return helpers.copied(run, tmp_path / "copy.zarr")


def test_outputs_are_the_models_with_those_weights_zeroed(run):
    what = study()
    x, y = what.examples.block(0, helpers.EXAMPLES)

    def margins(model):
        logits = model.eval()(x).detach().double()
        others = [logits[i, torch.arange(3) != y[i]].logsumexp(0) for i in range(len(y))]
        return [float(logits[i, y[i]] - others[i]) for i in range(len(y))]

    np.testing.assert_allclose(helpers.whole(run, "base_output"), margins(helpers.net()), atol=1e-5)
    for row in (0, 15, 16, 19, 20, 119):
        split, index = ("test", row) if row < 20 else ("train", row - 20)
        model = helpers.net()
        model.hidden.weight.data[~coar.BernoulliSampler().masks(split, [index], 11)[0]] = 0
        np.testing.assert_allclose(helpers.whole(run, "outputs")[row], margins(model), atol=1e-5)


@pytest.mark.parametrize(
    "wanted", [{}, {"masks": 60}, {"masks": 0}, {"test_masks": 0}, {"mask_block": 5, "example_block": 3}], ids=str
)
def test_asking_for_no_more_touches_nothing(fresh, wanted):
    before, values = helpers.stamps(fresh.path), helpers.files(fresh.path)
    again = collect(study(), fresh.path, **(ASKED | wanted))
    assert helpers.stamps(fresh.path) == before
    assert helpers.files(fresh.path) == values
    assert (len(again.plan), again.blocks) == (120, (16, 8))


@pytest.mark.parametrize("steps", [(100, 230), (1, 2, 17, 230), (44, 60, 230), (108, 230)], ids=str)
def test_extended_equals_collected_at_once(tmp_path, steps):
    at_once = collect(study(), tmp_path / "once.zarr", masks=steps[-1], test_masks=20)
    for masks in steps:
        extended = collect(study(), tmp_path / "steps.zarr", masks=masks, test_masks=20)
        extended.require_complete()
    assert helpers.row_labels(extended) == helpers.row_labels(at_once)
    assert extended.plan.extents == tuple(masks + 20 for masks in steps)
    assert helpers.differing(helpers.files(at_once.path), helpers.files(extended.path)) == ["zarr.json"]


def test_extended_digits_equal_those_collected_at_once(tmp_path, digits):
    what = helpers.digits_study()
    at_once = collect(what, tmp_path / "once.zarr", masks=230)
    extended = collect(what, tmp_path / "steps.zarr", masks=100)
    before = helpers.whole(extended, "outputs")
    extended = collect(what, tmp_path / "steps.zarr", masks=230)
    np.testing.assert_array_equal(helpers.whole(extended, "outputs")[:100], before)
    assert helpers.differing(helpers.files(at_once.path), helpers.files(extended.path)) == ["zarr.json"]


def test_extended_in_another_order_has_the_same_rows_elsewhere(tmp_path):
    final = {"masks": 130, "test_masks": 30, "validation_masks": 9, "test_fractions": [0.4]}
    at_once = collect(study(), tmp_path / "once.zarr", **final)
    collect(study(), tmp_path / "steps.zarr", masks=50)
    collect(study(), tmp_path / "steps.zarr", masks=70, test_masks=10)
    extended = collect(study(), tmp_path / "steps.zarr", **final)
    labels = helpers.row_labels(at_once)
    order = [labels.index(label) for label in helpers.row_labels(extended)]
    assert sorted(order) == list(range(199))
    for name in ("outputs", "masks", "split", "ablated_fraction"):
        np.testing.assert_array_equal(helpers.whole(extended, name), helpers.whole(at_once, name)[order])


def test_extension_redoes_only_the_blocks_it_cuts(fresh):
    before = helpers.stamps(fresh.path)
    collect(study(), fresh.path, masks=230, test_masks=20)
    after = helpers.stamps(fresh.path)
    kept = {name for name in before if before[name] == after[name] and name.startswith(("outputs/c", "masks/c"))}
    whole_blocks = range(7)  # rows 112 to 119 lie in block 7, which is filled up
    assert kept == {f"outputs/c/{i}/{j}" for i in whole_blocks for j in range(3)} | {
        f"masks/c/{i}/0" for i in whole_blocks
    }


STAGES = [("outputs", "resized"), ("masks", "resized")]  # what an extension does, in its order
STAGES += [(name, part) for name in ("split", "ablated_fraction") for part in ("gone", "described", "filled")]


@pytest.mark.parametrize("masks", [100, 230])
@pytest.mark.parametrize("stage", range(len(STAGES) + 1), ids=["none", *map("-".join, STAGES)])
def test_extension_cut_short(run, longer, fresh, masks, stage):
    for name, part in STAGES[:stage]:
        if part == "gone":
            shutil.rmtree(fresh.path / name)
        elif part == "filled":
            shutil.copytree(longer.path / name, fresh.path / name, dirs_exist_ok=True)
        else:
            (fresh.path / name).mkdir(exist_ok=True)
            shutil.copy(longer.path / name / "zarr.json", fresh.path / name)
    opened = coar.Run.open(fresh.path)
    np.testing.assert_array_equal(opened.outputs(slice(0, 120), slice(0, 20)), helpers.whole(run, "outputs"))
    collect(study(), fresh.path, masks=masks, test_masks=20)
    expected = run if masks == 100 else longer
    assert helpers.differing(helpers.files(fresh.path), helpers.files(expected.path)) == []


def shuffled(examples):
    return examples.subset([1, 0, *range(2, helpers.EXAMPLES)])


def nudged():
    values = helpers.inputs()
    values[19, 5] += 1e-3
    return values


def other_weights():
    model = helpers.net()
    model.head.bias.data[0] += 1e-6
    return model


def calibrated(seed=2, count=20):
    return coar.Mean(calibration=helpers.examples(inputs=helpers.inputs(seed)).subset(range(count)))


def two_labels():
    return helpers.examples(metadata={"group": [f"group {int(i == 3)}" for i in range(20)]})


CHANGES = {
    "weights": ("weights", {"model": other_weights()}),
    "examples order": ("examples", {"examples": shuffled(helpers.examples())}),
    "examples value": ("examples", {"examples": helpers.examples(inputs=nudged())}),
    "targets": ("examples", {"examples": helpers.examples(targets=(torch.arange(20) + 1) % 3)}),
    "metadata": ("examples", {"examples": two_labels()}),
    "fewer examples": ("examples", {"examples": helpers.examples().subset(range(19))}),
    "ablation": ("ablation", {"ablation": coar.ZeroWeight()}),
    "calibration values": ("ablation", {"ablation": calibrated(seed=3)}),
    "calibration count": ("ablation", {"ablation": calibrated(count=19)}),
    "output": ("output", {"output": coar.ClassLogit()}),
    "output setting": ("output", {"output": coar.CorrectClassMargin(against="largest")}),
    "sampler fraction": ("sampler", {"sampler": coar.BernoulliSampler(ablated_fraction=0.2)}),
    "sampler seed": ("sampler", {"sampler": coar.BernoulliSampler(seed=1)}),
    "sampler kind": ("sampler", {"sampler": coar.FixedSizeSampler()}),
    "fewer components": ("components", {"components": coar.neurons(helpers.net(), include="hidden")[:10]}),
    "components order": (
        "components",
        {"components": coar.Components(reversed(coar.neurons(helpers.net(), include="hidden")))},
    ),
}


@pytest.fixture(scope="module")
def mean_run(tmp_path_factory):
    """A run with a calibrated ablation, read only."""
    return collect(study(ablation=calibrated()), tmp_path_factory.mktemp("run") / "mean.zarr", masks=20)


@pytest.mark.parametrize(("item", "changes"), CHANGES.values(), ids=CHANGES.keys())
def test_another_study_is_refused_by_name(mean_run, item, changes):
    before = helpers.files(mean_run.path)
    with pytest.raises(MismatchError, match=rf"\n  {item}: the run has .*, now .*\n(?s:.*)new path") as caught:
        collect(study(**{"ablation": calibrated(), **changes}), mean_run.path, masks=40)
    assert str(caught.value).count(": the run has") == 1
    assert helpers.files(mean_run.path) == before


def test_other_library_versions_are_refused_by_name(fresh):
    description = json.loads((fresh.path / "zarr.json").read_text())
    description["attributes"]["coar"]["fingerprint"]["versions"]["torch"] = "1.0"
    (fresh.path / "zarr.json").write_text(json.dumps(description))
    with pytest.raises(MismatchError, match=r'versions: the run has .*"torch": "1\.0".*, now .*"torch": "\d'):
        collect(study(), fresh.path, **ASKED)


def test_auto_precision_records_what_it_measured(tmp_path):
    facts = collect(study(), tmp_path / "r.zarr", masks=40, precision="auto").facts.precision
    assert facts.name == ("bf16" if facts.error <= 0.05 and facts.speedup > 1 else "float32")
    assert (facts.tolerance, facts.masks) == (0.05, 16)
    assert 0 < facts.error < 1
    strict = collect(study(), tmp_path / "s.zarr", masks=40, precision="auto", precision_tolerance=1e-9)
    assert strict.facts.precision.name == "float32"
    collect(study(), tmp_path / "s.zarr", masks=50, precision="auto").require_complete()


def test_bf16_beyond_its_tolerance_creates_nothing(tmp_path):
    with pytest.raises(PrecisionError, match="tolerance is 1e-09; use float32 or auto"):
        collect(study(), tmp_path / "r.zarr", masks=40, precision="bf16", precision_tolerance=1e-9)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("first", "then"), [("float32", "bf16"), ("bf16", "float32")])
def test_another_precision_is_refused(run, tmp_path, first, then):
    made = collect(study(), tmp_path / "r.zarr", **ASKED, precision=first, precision_tolerance=10)
    assert made.facts.precision.name == first
    outputs = helpers.whole(run, "outputs")
    np.testing.assert_allclose(helpers.whole(made, "outputs"), outputs, atol=0.0 if first == "float32" else 0.1)
    assert np.array_equal(helpers.whole(made, "outputs"), outputs) == (first == "float32")
    with pytest.raises(MismatchError, match=f"collected in {first}, now {then} .* new path"):
        collect(study(), made.path, **ASKED, precision=then)
    collect(study(), made.path, masks=110, precision="auto").require_complete()


WRONG = {
    "unknown device": ({"device": "tpu"}, "unknown device 'tpu'"),
    "unlikely device": ({"device": "cuda:99"}, "'cuda:99' is not available"),
    "no device": ({"device": ""}, "unknown device"),
    "meta device": ({"device": "meta"}, "unknown device"),
    "precision": ({"precision": "float16"}, "unknown precision 'float16'"),
    "tolerance zero": ({"precision_tolerance": 0}, "precision_tolerance: Input should be greater than 0"),
    "tolerance nan": ({"precision_tolerance": float("nan")}, "precision_tolerance: Input should be greater than 0"),
    "zero masks": ({"masks": 0}, "zero masks"),
    "negative masks": ({"masks": -1}, "masks"),
    "negative masks beside others": ({"masks": -1, "test_masks": 5}, "-1 train masks"),
    "negative test masks": ({"test_masks": -1}, "-1 test masks"),
    "negative validation masks": ({"validation_masks": -1}, "-1 validation masks"),
    "half masks": ({"masks": 2.5}, "2.5 train masks"),
    "masks in words": ({"masks": "10"}, "10"),
    "fraction zero": ({"test_masks": 5, "test_fractions": [0.0]}, "ablated fraction"),
    "fraction beyond": ({"test_masks": 5, "test_fractions": [1.5]}, "ablated fraction"),
} | {
    f"{name} {size}": ({name: size}, f"Execution cannot be made: {name}: Input should be")
    for name in ("batch_size", "mask_block", "example_block")
    for size in (0, -1, 2.5)
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG.keys())
def test_settings_out_of_range(tmp_path, settings, message):
    with pytest.raises(SettingsError, match=message):
        collect(study(), tmp_path / "r.zarr", **({"masks": 10} | settings))
    assert list(tmp_path.iterdir()) == []


class Fragile(nn.Module):
    """Gives not-a-number for rows with a large first value, but only while the first hidden neuron is ablated."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 11, bias=False), nn.Linear(11, 3)
        self.value = value

    def forward(self, x):
        h = self.hidden(x)
        return self.head(h).masked_fill((x[:, :1] > 50) & (h[:, :1] == 0), self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_output_that_is_not_finite_names_mask_and_example(tmp_path, value):
    x = helpers.inputs()
    x[13, 0] = 100.0
    model = Fragile(value)
    identifiers = {"id": np.arange(500, 520)}
    what = study(
        model=model,
        examples=helpers.examples(inputs=x, metadata=identifiers),
        components=coar.neurons(model, include="hidden"),
        sampler=coar.BernoulliSampler(ablated_fraction=0.02),
        output=coar.ClassLogit(),
    )
    kept = what.sampler.masks("train", range(100), 11)[:, 0]
    first = int((~kept).argmax())
    assert not kept[first], "no mask ablates the first neuron: choose another seed"
    with pytest.raises(OutputError, match=rf"train mask {first} .* gives {value} for example 13 \(id 513\)"):
        collect(what, tmp_path / "r.zarr", masks=100)
    run = coar.Run.open(tmp_path / "r.zarr")
    unit = Unit(first // 16, 1)
    assert unit in run.missing_units()
    stored = {name for name in helpers.chunks(run.path) if name.startswith("outputs/")}
    before = run.units()[: run.units().index(unit)]
    assert stored == {f"outputs/c/{i}/{j}" for i, j in before}
    with pytest.raises(OutputError, match=f"train mask {first} "):
        collect(what, tmp_path / "r.zarr", masks=100)


def test_base_output_that_is_not_finite_names_the_example(tmp_path):
    x = helpers.inputs()
    x[17, 2] = float("nan")
    with pytest.raises(OutputError, match=r"unablated model gives nan for example 17 \(id 17\)"):
        collect(study(examples=helpers.examples(inputs=x)), tmp_path / "r.zarr", masks=20)
    assert "base_output/c/2" not in helpers.chunks(tmp_path / "r.zarr")


@pytest.mark.parametrize("label", [3, -1])
def test_label_outside_the_logits(tmp_path, label):
    targets = torch.arange(20) % 3
    targets[11] = label
    with pytest.raises(OutputError, match=f"label {label} is outside the model's 3 classes"):
        collect(study(examples=helpers.examples(targets=targets)), tmp_path / "r.zarr", masks=20)


@pytest.mark.parametrize("training", [True, False])
def test_the_users_model_stays_as_it_is(tmp_path, digits, training):
    model = digits.model().train(training)
    before = deepcopy(model.state_dict())
    what = replace(helpers.digits_study(), model=model, ablation=coar.Mean(calibration=digits.judge()))
    collect(what, tmp_path / "r.zarr", masks=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert {module.training for module in model.modules()} == {training}
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("batch_size", [1, 3, 8, 500])
def test_batch_size_hardly_matters(tmp_path, digits, batch_size):
    what = helpers.digits_study()
    usual = collect(what, tmp_path / "usual.zarr", masks=20)
    other = collect(what, tmp_path / "other.zarr", masks=20, batch_size=batch_size)
    for name in ("outputs", "base_output"):
        np.testing.assert_allclose(helpers.whole(other, name), helpers.whole(usual, name), atol=1e-5)


def test_a_data_set_gives_the_same_run_as_its_tensor(run, tmp_path):
    data = TensorDataset(helpers.inputs(), torch.zeros(20))
    same = collect(study(examples=helpers.examples(inputs=data)), tmp_path / "r.zarr", **ASKED)
    assert helpers.differing(helpers.files(same.path), helpers.files(run.path)) == []


class Named(nn.Module):
    """The tiny net, called by keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = helpers.net()

    def forward(self, *, left, right):
        return self.inner(torch.cat([left, right], 1))


def test_inputs_by_name(run, tmp_path):
    model, x = Named(), helpers.inputs()
    named = helpers.examples(inputs={"right": x[:, 2:], "left": x[:, :2]})
    what = study(model=model, examples=named, components=coar.neurons(model, include="*hidden"))
    made = collect(what, tmp_path / "r.zarr", **ASKED, batch_size=7)
    np.testing.assert_allclose(helpers.whole(made, "outputs"), helpers.whole(run, "outputs"), atol=1e-5)


def test_files_that_a_killed_writer_left_are_removed(run, fresh):
    stray = fresh.path / "outputs/c/2/1.0123456789abcdef0123456789abcdef.partial"
    stray.write_bytes(b"half a chunk")
    collect(study(), fresh.path, **ASKED)
    assert helpers.files(fresh.path) == helpers.files(run.path)


def test_progress_is_shown_when_asked(tmp_path, capsys):
    collect(study(), tmp_path / "quiet.zarr", masks=20)
    assert capsys.readouterr().err == ""
    collect(study(), tmp_path / "loud.zarr", masks=20, progress=True)
    assert "100%" in capsys.readouterr().err


def test_blocks_grow_with_a_run_that_would_have_too_many_units():
    from coar.collection.collect import blocks_of

    assert blocks_of(5_000, 500, None, None) == (64, 500)
    assert blocks_of(5_000, 700, None, None) == (64, 350)  # of a size
    assert blocks_of(10**6, 10**6, None, 100) == (4096, 100)
    for masks, examples in ((10**6, 10**6), (10**6, 300), (64, 10**6), (10**7, 10**4)):
        height, width = blocks_of(masks, examples, None, None)
        assert math.ceil(masks / height) * math.ceil(examples / width) <= 131_072
