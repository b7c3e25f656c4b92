"""Edits undone bit for bit, joined, and of use without the package."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import coar
from coar.cli.common import app
from coar.components.table import Component
from coar.errors import EditError, WeightsError
from coar.weights import weights_fingerprint

GOAL = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")


class Mixed(nn.Module):
    """A convolution without bias before a batch norm, one without either, and linear layers with and without bias."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.free = nn.Conv2d(4, 4, 3, bias=False)
        self.hidden = nn.Linear(4, 5)
        self.last = nn.Linear(5, 3, bias=False)

    def forward(self, x):
        """Map (rows, 1, 8, 8) to (rows, 3)."""
        x = self.free(self.norm(self.conv(x)).relu()).relu().mean((2, 3))
        return self.last(self.hidden(x).relu())


@pytest.fixture
def model():
    torch.manual_seed(3)
    net = Mixed().eval()
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
        net.conv.weight[0, 0, 0] = torch.tensor([-0.0, 0.0, 1.0])
    return net


def component(site, position, side="output", axis=1):
    return Component(f"{site}[{position}]", "part", site, side, axis, position, 1)


CHOSEN = {
    component("conv", 0): 0.7,
    component("conv", 2): -0.3,
    component("free", 1): 0.5,
    component("hidden", 3, axis=-1): -1.5,
    component("last", 4, "input", -1): 0.25,
}


def edit_of(model, chosen=None, **changes):
    chosen = CHOSEN if chosen is None else chosen
    parts = (tuple(chosen), tuple(chosen.values()), tuple(range(len(chosen))))
    made = coar.Edit(*parts, GOAL, "Mean", {"conv": "norm"}, weights_fingerprint(model))
    return replace(made, **changes)


def bits(state):
    return {name: value.numpy().tobytes() for name, value in state.items()}


def test_undo_gives_back_every_bit(model):
    edit = edit_of(model).keep(model)
    edited = edit.apply(model)
    assert bits(edited.state_dict()) != bits(model.state_dict())
    assert {"free.bias", "last.bias"} == edited.state_dict().keys() - model.state_dict().keys()
    restored = edit.undo(edited)
    assert bits(restored.state_dict()) == bits(model.state_dict())
    assert list(restored.state_dict()) == list(model.state_dict())
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(restored(x), model(x))
        assert not torch.equal(edited(x), model(x))


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16])
def test_undo_in_other_types_of_numbers(model, kind):
    other = model.to(kind)
    edit = edit_of(other).keep(other)
    before = {name: value.view(torch.uint8) for name, value in other.state_dict().items() if value.ndim}
    after = edit.undo(edit.apply(other)).state_dict()
    assert all(torch.equal(after[name].view(torch.uint8), value) for name, value in before.items())


def test_only_what_was_changed_is_kept(model):
    tensors = edit_of(model, {component("hidden", 3, axis=-1): -1.5}).keep(model).originals.tensors
    assert {name: len(value) for name, value in tensors.items()} == {
        "hidden.weight@at": 4,
        "hidden.weight@was": 4,
        "hidden.bias@at": 1,
        "hidden.bias@was": 1,
    }
    assert torch.equal(tensors["hidden.weight@was"], model.hidden.weight[3].detach())
    assert tensors["hidden.weight@at"].tolist() == [12, 13, 14, 15]


def test_edit_with_originals_survives_the_disk(model, tmp_path):
    edit = edit_of(model).keep(model)
    edit.save(tmp_path / "deep/mine.json")
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["mine.json", "mine.originals.safetensors"]
    loaded = coar.Edit.load(tmp_path / "deep/mine.json")
    assert loaded == edit
    assert loaded != edit_of(model)
    assert loaded != edit_of(model, {component("conv", 0): 0.7}).keep(model)
    assert bits(loaded.undo(edit.apply(model)).state_dict()) == bits(model.state_dict())


def test_command_undoes_a_checkpoint(model, tmp_path):
    edit = edit_of(model).keep(model)
    edit.save(tmp_path / "edit.json")
    coar.save_weights(model, tmp_path / "before.safetensors")
    coar.save_weights(edit.apply(model), tmp_path / "after.safetensors")
    words = [
        "undo",
        tmp_path / "after.safetensors",
        "--edit",
        tmp_path / "edit.json",
        "--out",
        tmp_path / "again.safetensors",
    ]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()


def test_undo_refuses_other_weights(model):
    edit = edit_of(model).keep(model)
    with pytest.raises(EditError, match="these are the weights before the edit"):
        edit.undo(model)
    edited = edit.apply(model)
    with torch.no_grad():
        edited.hidden.bias[0] += 1e-6
    with pytest.raises(EditError, match=r"these are others, .* unchanged since"):
        edit.undo(edited)


def test_undo_needs_originals(model):
    edit = edit_of(model)
    with pytest.raises(EditError, match=r"keeps no original weights.*edit\.keep\(model\)"):
        edit.undo(edit.apply(model))
    with pytest.raises(EditError, match="made for weights"):
        edit_of(model, weights="0" * 64).keep(model)


def spoilt(path):
    tensors = load_file(path)
    tensors["hidden.bias@was"] += 1
    save_file(tensors, path)


DAMAGE = {
    "another number": (spoilt, "is not the file that was written with"),
    "missing": (lambda path: path.unlink(), "which cannot be read: there are no weights"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-3]), "which cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_originals_are_refused(model, tmp_path, damage):
    edit_of(model).keep(model).save(tmp_path / "edit.json")
    spoil, words = DAMAGE[damage]
    spoil(tmp_path / "edit.originals.safetensors")
    with pytest.raises(EditError, match=words):
        coar.Edit.load(tmp_path / "edit.json")


def test_originals_of_another_place_are_not_read(model, tmp_path):
    edit_of(model).keep(model).save(tmp_path / "in/edit.json")
    content = json.loads((tmp_path / "in/edit.json").read_text())
    content["originals"]["file"] = "../secret.safetensors"
    (tmp_path / "in/edit.json").write_text(json.dumps(content))
    (tmp_path / "in/edit.originals.safetensors").rename(tmp_path / "secret.safetensors")
    with pytest.raises(EditError, match="which cannot be read"):
        coar.Edit.load(tmp_path / "in/edit.json")


def test_joined_edits_do_what_both_do(model):
    items = list(CHOSEN.items())
    one, other = edit_of(model, dict(items[:3])), edit_of(model, dict(items[2:]))
    both = one + other
    assert (both.components, both.replacements) == (tuple(CHOSEN), tuple(CHOSEN.values()))
    assert both.goal == GOAL
    assert bits(both.apply(model).state_dict()) == bits(edit_of(model).apply(model).state_dict())
    assert bits((one + one).apply(model).state_dict()) == bits(one.apply(model).state_dict())
    kept = both.keep(model)
    assert bits(kept.undo(kept.apply(model)).state_dict()) == bits(model.state_dict())


def test_joined_edits_of_different_goals_have_none(model, tmp_path):
    other = edit_of(
        model, goal=coar.EditGoal(targets=[1], references=[2, 3], direction="increase"), ablation="ZeroWeight"
    )
    both = edit_of(model) + other
    assert (both.goal, both.ablation) == (None, "Mean and ZeroWeight")
    both.save(tmp_path / "edit.json")
    assert coar.Edit.load(tmp_path / "edit.json") == both


def test_edits_that_contradict_each_other_are_not_joined(model):
    clash = edit_of(model, {component("conv", 2): -0.4})
    with pytest.raises(
        EditError, match=r"'conv\[2\]' is replaced by -0\.3 at a strength of 1 in one edit and by -0\.4 at 1"
    ):
        edit_of(model) + clash
    with pytest.raises(EditError, match="join edits of one model only"):
        edit_of(model) + edit_of(model, weights="0" * 64)


PLAIN = """
import sys
sys.modules["coar"] = None  # whoever imports it fails
import numpy as np, torch
from safetensors.torch import load_file
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.free, self.hidden, self.last = nn.Conv2d(4, 4, 3), nn.Linear(4, 5), nn.Linear(5, 3)
    def forward(self, x):
        x = self.free(self.norm(self.conv(x)).relu()).relu().mean((2, 3))
        return self.last(self.hidden(x).relu())
net = Net().eval()
net.load_state_dict(load_file(sys.argv[1]))
with torch.no_grad():
    np.save(sys.argv[3], net(torch.from_numpy(np.load(sys.argv[2]))).numpy())
"""


def test_edited_checkpoint_works_without_the_package(model, tmp_path):
    edited = edit_of(model).apply(model)
    coar.save_weights(edited, tmp_path / "edited.safetensors")
    x = torch.randn(6, 1, 8, 8)
    np.save(tmp_path / "x.npy", x.numpy())
    (tmp_path / "plain.py").write_text(PLAIN)
    words = [sys.executable, "plain.py", "edited.safetensors", "x.npy", "y.npy"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), edited(x).numpy())


def test_command_refuses_what_is_no_checkpoint(model, tmp_path):
    edit_of(model).keep(model).save(tmp_path / "edit.json")
    words = [
        "undo",
        str(tmp_path / "none.safetensors"),
        "--edit",
        str(tmp_path / "edit.json"),
        "--out",
        str(tmp_path / "o"),
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "there are no weights at" in done.output
    assert issubclass(WeightsError, coar.CoarError)
