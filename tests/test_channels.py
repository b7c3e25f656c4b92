"""Heads and whole modules under constants, one per channel: from calibration to an edit, and in files of older runs."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
import xarray
from torch import nn

import coar
from coar.components.table import Components
from coar.errors import AblationError, ComponentError, CorruptRunError, EditError
from coar.gates.folding import fold
from coar.gates.gates import Gates
from coar.store import arrays
from tests import oracles, tiny

CALIBRATION, STUDIED = (3, 9, 5, 1, 7, 6), (4, 8, 2, 6)  # lengths of texts
BLOCKS = "bert.encoder.layer.?.attention.output.dense"


@pytest.fixture(scope="module")
def bert():
    return tiny.classifier()


def parts(model):
    """Heads of the first layer, and whole modules of the second."""
    wide = coar.modules(model, ["bert.encoder.layer.1.attention.output.dense", "bert.encoder.layer.1.output.dense"])
    return coar.attention_heads(model, include="*.0.*") + wide


def study(model, ablation):
    return coar.Study(
        model=model,
        examples=tiny.sentences(STUDIED, seed=8),
        components=parts(model),
        ablation=ablation,
        sampler=coar.BernoulliSampler(ablated_fraction=0.5, seed=1),
    )


def collect(what, path, **settings):
    return coar.collect(what, path, **{"masks": 12, "gradients": 8, "device": "cpu", "progress": False, **settings})


def passed(model, row):
    """What a component computes for every token of the calibration texts, each run alone and without its padding."""
    tokens = []
    for ids, length in zip(tiny.sentences(CALIBRATION).inputs["input_ids"], CALIBRATION, strict=True):
        place = row.site, row.side
        held = oracles.held(model, ids[None, :length], [place])[place]
        tokens += [token for t in held for token in t[0].double()]
    return torch.stack(tokens)[:, row.position : row.position + row.size]  # (tokens, channels)


@pytest.mark.parametrize("batch_size", [2, 64])
@pytest.mark.parametrize("label", ["mean", "peak"])
def test_padding_says_nothing_of_what_a_component_computes(bert, label, batch_size):
    ablation = coar.choose_ablation(label, calibration=tiny.sentences(CALIBRATION))
    found = ablation.replacements(bert, parts(bert), batch_size=batch_size)
    for i, row in enumerate(parts(bert)):
        values = passed(bert, row)
        expected = values.mean(0) if label == "mean" else [oracles.peak(v.tolist(), 128) for v in values.T]
        own = found[parts(bert).channels_of([i])].double()
        torch.testing.assert_close(own, torch.as_tensor(expected).double(), rtol=0, atol=1e-5)


def test_padding_without_an_attention_mask_is_an_error(bert):
    texts = tiny.sentences(CALIBRATION)
    ids = texts.inputs["input_ids"]
    for inputs in (ids, {"input_ids": ids}):
        examples = coar.Examples(inputs=inputs, targets=texts.targets)
        with pytest.raises(AblationError, match=r"hold token 0, which is this model's padding token"):
            coar.Mean(calibration=examples).replacements(bert, parts(bert), batch_size=4)
    whole = coar.Examples(inputs=ids[:, :1], targets=texts.targets)  # one token each, none of them padding
    assert coar.Mean(calibration=whole).replacements(bert, parts(bert), batch_size=4).isfinite().all()


def expected_outputs(model, run, masks):
    """Outputs of the oracle, text by text and without padding, for (masks, components) booleans."""
    ids = tiny.sentences(STUDIED, seed=8).inputs["input_ids"]
    table, rows = run.components, []
    for mask in masks:
        patches = [
            (row.site, row.side, row.axis, row.position, row.position + row.size, constants)
            for i, row in enumerate(table)
            if not mask[i]
            for constants in [torch.from_numpy(run.replacements[table.channels_of([i])])]
        ]
        logits = [
            oracles.patched(model, text[None, :length], patches, run=lambda net, x: oracles.forward(net, x).logits)[0]
            for text, length in zip(ids, STUDIED, strict=True)
        ]
        rows.append(oracles.read_outputs(torch.stack(logits), torch.tensor([0, 1, 2, 0]), "logsumexp"))
    return np.stack(rows)


@pytest.mark.parametrize("label", ["mean", "peak", "optimal"])
def test_a_run_keeps_a_constant_per_channel_and_gives_the_oracles_outputs(bert, label, tmp_path):
    run = collect(
        study(bert, coar.choose_ablation(label, calibration=tiny.sentences(CALIBRATION))), tmp_path / "r.zarr"
    )
    again = coar.Run.open(run.path)
    assert again.replacements.shape == (again.components.width,) == (2 * 8 + 2 * 16,)
    masks = run.plan.masks(run.sampler, 4, 0, 12)
    found = run.array("outputs")[:]
    np.testing.assert_allclose(found, expected_outputs(bert, again, masks), atol=1e-4)
    with xarray.open_zarr(tmp_path / "r.zarr", group="component", consolidated=False) as columns:
        assert columns["replacement"].sizes == {"channel": 48}
        assert columns["size"].sum() == 48


def test_an_edit_of_heads_folds_their_constants_and_survives_the_disk(bert, tmp_path):
    what = study(bert, coar.Mean(calibration=tiny.sentences(CALIBRATION)))
    run = collect(what, tmp_path / "r.zarr")
    fitted = coar.fit(run, progress=False)
    fitted.to_safetensors(tmp_path / "fit.safetensors")
    goal = coar.EditGoal(targets=[1], references=[0, 2, 3], direction="decrease")
    chosen = coar.edit(coar.load(tmp_path / "fit.safetensors"), goal, budget=4)
    chosen.save(tmp_path / "edit.json")
    edit = coar.Edit.load(tmp_path / "edit.json")
    assert edit == chosen
    assert sorted(np.size(value) for value in edit.replacements) == [8, 8, 16, 16]
    texts = what.examples.inputs
    with torch.no_grad():
        logits = edit.apply(bert)(**texts).logits
    nothing = np.zeros((1, 4), dtype=bool)
    found = oracles.read_outputs(logits, torch.tensor([0, 1, 2, 0]), "logsumexp")
    np.testing.assert_allclose(found, expected_outputs(bert, run, nothing)[0], atol=1e-4)
    assert list(edit.apply(bert).state_dict()) == list(bert.state_dict())


def test_gradients_by_gates_with_constants_are_finite_differences(bert):
    double, table = deepcopy(bert).double(), parts(bert)
    values = torch.randn(table.width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    texts = tiny.sentences(STUDIED, seed=8).inputs
    keep = torch.rand(4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with Gates(double, table, values, use_hooks=True) as gates:

        def scalar(mask):
            gates.set(mask)
            return double(**texts).logits[:, 0].sum()

        live = keep.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(scalar(live), live)
        for row in range(4):
            for column in range(4):
                ends = []
                for step in (1e-6, -1e-6):
                    moved = keep.clone()
                    moved[row, column] += step
                    with torch.no_grad():
                        ends.append(float(scalar(moved)))
                slope = (ends[0] - ends[1]) / 2e-6
                assert float(gradient[row, column]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_runs_and_edits_of_older_versions_have_one_constant_for_a_whole_head(bert, tmp_path):
    run = collect(study(bert, coar.ZeroActivation()), tmp_path / "r.zarr", gradients=0)
    for constants, expected in (([0.5, 0, 0, -1.0], [0.5] * 8 + [0] * 24 + [-1.0] * 16), ([1.0, 2.0], None)):
        arrays.write_all(run.group, "component/replacement", np.array(constants, dtype=np.float32), "component")
        if expected:
            assert coar.Run.open(run.path).replacements.tolist() == expected
        else:
            with pytest.raises(CorruptRunError, match=r"\(2,\) for 4 components with 48 channels"):
                _ = coar.Run.open(run.path).replacements
    edited, heads = deepcopy(bert), coar.attention_heads(bert)
    fold(edited, heads[:2], [0.0, 0.25], batch_norms={})
    spread = deepcopy(bert)
    fold(spread, heads[:2], [(0.0,) * 8, (0.25,) * 8], batch_norms={})
    for name, value in edited.state_dict().items():
        torch.testing.assert_close(value, spread.state_dict()[name], rtol=0, atol=1e-6)
    with pytest.raises(EditError, match="has 8 channels, and 3 constants were given"):
        fold(spread, heads[:1], [(0.0, 1.0, 2.0)], batch_norms={})


def test_an_edit_file_with_one_constant_for_a_head_is_read(bert, tmp_path):
    run = collect(study(bert, coar.ZeroActivation()), tmp_path / "r.zarr")
    goal = coar.EditGoal(targets=[1], references=[0, 2, 3], direction="decrease")
    coar.edit(coar.fit(run, progress=False), goal, budget=4).save(tmp_path / "edit.json")
    content = json.loads((tmp_path / "edit.json").read_text())
    plain = coar.Edit.load(tmp_path / "edit.json").apply(bert).state_dict()
    for row in content["components"]:
        row["replacement"] = 0.0
    (tmp_path / "edit.json").write_text(json.dumps(content))
    older = coar.Edit.load(tmp_path / "edit.json")
    assert set(older.replacements) == {0.0}
    assert all(torch.equal(value, plain[name]) for name, value in older.apply(bert).state_dict().items())


class Branches(nn.Module):
    """A layer, a sequence that ends in one, and a module of which only its code knows what it returns."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)
        self.sequence = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 3)), nn.Dropout(0.5))
        self.own = nn.TransformerEncoderLayer(4, 1, 4, batch_first=True)
        self.maps = nn.Sequential(nn.ReLU(), nn.Conv2d(1, 2, 3, padding=1))

    def forward(self, x):
        maps = self.maps(x[:, None, None].expand(-1, 1, 3, -1)).mean((2, 3)).sum(1, keepdim=True)
        return torch.tanh(self.layer(x)) + self.sequence(x) + self.own(x[:, None])[:, 0, :3] + maps


def test_modules_that_end_in_a_layer_are_made_permanent_and_others_refused():
    model, x = oracles.rough(Branches()).requires_grad_(False), torch.randn(6, 4)
    table = coar.modules(model, ["layer", "sequence", "maps"])
    assert [(row.axis, row.size) for row in table] == [(-1, 3), (-1, 3), (1, 2)]
    values = torch.randn(8)
    for chosen in ([0], [1], [2], [0, 1, 2]):
        places = [
            (row.site, "output", row.axis, 0, row.size, values[table.channels_of([i])]) for i, row in enumerate(table)
        ]
        expected = oracles.patched(model, x, [places[i] for i in chosen])
        keep = torch.tensor([i not in chosen for i in range(3)])
        with Gates(model, table, values) as gates, torch.no_grad():
            gates.set(keep)
            torch.testing.assert_close(model(x), expected)
        edited = deepcopy(model)
        constants = [tuple(values[table.channels_of([i])].tolist()) for i in chosen]
        fold(edited, [table[i] for i in chosen], constants, batch_norms={})
        torch.testing.assert_close(oracles.forward(edited, x), expected)
    with pytest.raises(EditError, match=r"'own' is a whole module that ends in a TransformerEncoderLayer"):
        fold(model, coar.modules(model, "own"), [0.0], batch_norms={})


def test_where_a_modules_features_lie_may_be_said():
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "layer": nn.Linear(4, 3)})
    (norm,) = coar.modules(model, "norm")
    assert (norm.axis, norm.size) == (0, 1)
    (norm,) = coar.modules(model, "norm", axis=-1, size=4)
    assert (norm.axis, norm.size) == (-1, 4)
    for wrong in ({"axis": 0}, {"size": 0}):
        with pytest.raises(ComponentError, match="axis 0 is the batch"):
            coar.modules(model, "layer", **wrong)


def test_channels_are_counted_in_table_order(bert):
    table = parts(bert) + Components([coar.neurons(bert)[3]])
    assert table.width == 49
    assert table.channels_of([4, 1]).tolist() == [48, *range(8, 16)]
    assert table.positions_of([4, 1]).tolist() == [3, *range(8, 16)]
    assert table.channels_of([]).tolist() == []
