"""A run goes on with the model it was made for: the same weights under another forward are refused."""

import dataclasses

import pytest
import torch
from torch import nn

import coar
from coar.errors import EditError, MismatchError


def study(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), activation(), nn.Linear(16, 4)).eval()
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    examples = coar.Examples(inputs=inputs, targets=torch.arange(8) % 4)
    return coar.Study(model=model, examples=examples, components=coar.neurons(model, exclude="2"))


def test_a_run_is_not_extended_by_a_model_of_the_same_weights_and_another_activation(tmp_path):
    path = tmp_path / "run.zarr"
    run = coar.collect(study(nn.GELU), path, masks=64, progress=False)
    before = run.array("outputs")[:]
    with pytest.raises(MismatchError, match="settings of module '1'") as error:
        coar.collect(study(nn.ReLU), path, masks=128, progress=False)
    assert "accept_code" in str(error.value)
    again = coar.collect(study(nn.GELU), path, masks=64, progress=False)
    assert (again.array("outputs")[:] == before).all()


def test_a_baseline_is_not_computed_with_other_code(tmp_path):
    run = coar.collect(study(nn.GELU), tmp_path / "run.zarr", masks=64, progress=False)
    with pytest.raises(MismatchError, match="module '1'"):
        coar.leave_one_out(study(nn.ReLU), run, progress=False)


class SameGELU(nn.GELU):
    """Another class that computes the same."""


def test_code_that_is_said_to_compute_the_same_goes_on_and_the_run_remembers(tmp_path):
    path = tmp_path / "run.zarr"
    coar.collect(study(nn.GELU), path, masks=64, progress=False)
    with pytest.raises(MismatchError):
        coar.collect(study(SameGELU), path, masks=128, progress=False)
    coar.Run.open(path).accept_code(study(SameGELU).model)
    run = coar.collect(study(SameGELU), path, masks=128, progress=False)
    assert len(run.plan) == 128
    with pytest.raises(MismatchError, match="module '1'"):
        coar.collect(study(nn.ReLU), path, masks=192, progress=False)
    whole = coar.collect(study(nn.GELU), tmp_path / "whole.zarr", masks=128, progress=False)
    assert (run.array("outputs")[:] == whole.array("outputs")[:]).all()


def edit_of(run):
    goal = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")
    return coar.edit(coar.fit(run, progress=False), goal, budget=2)


def test_an_edit_is_not_applied_to_other_code_before_or_after_it_was_saved(tmp_path):
    run = coar.collect(study(nn.GELU), tmp_path / "run.zarr", masks=64, progress=False)
    edit = edit_of(run)
    edit.save(tmp_path / "edit.json")
    for one in (edit, coar.Edit.load(tmp_path / "edit.json")):
        assert len(one.apply(study(nn.GELU).model)) == 3
        with pytest.raises(EditError, match=r"settings of module '1'.*edit\.accept_code"):
            one.apply(study(nn.ReLU).model)
    with pytest.raises(EditError, match="module '1'"):
        coar.judge_edit(edit, study(nn.ReLU).model, study(nn.ReLU).examples)


def test_a_choice_refuses_other_code_before_it_runs_the_model(tmp_path):
    run = coar.collect(study(nn.GELU), tmp_path / "run.zarr", masks=64, progress=False)
    goal = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")
    other, calls = study(nn.ReLU), []
    other.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(EditError, match=r"these attributions were .*module '1'.*Run\.open\(path\)\.accept_code"):
        coar.select(coar.fit(run, progress=False), other.model, other.examples, goal, progress=False)
    assert not calls


def test_code_accepted_by_the_run_or_by_the_edit_is_applied(tmp_path):
    run = coar.collect(study(nn.GELU), tmp_path / "run.zarr", masks=64, progress=False)
    edit = edit_of(run)
    with pytest.raises(EditError):
        edit.apply(study(SameGELU).model)
    accepted = edit.accept_code(study(SameGELU).model)
    assert torch.equal(accepted.apply(study(SameGELU).model)[0].weight, edit.apply(study(nn.GELU).model)[0].weight)
    with pytest.raises(EditError):
        accepted.apply(study(nn.ReLU).model)
    run.accept_code(study(SameGELU).model)
    later = edit_of(coar.Run.open(run.path))
    assert len(later.apply(study(SameGELU).model)) == 3
    assert len((later + edit).apply(study(nn.GELU).model)) == 3
    coar.load(run.path).to_safetensors(tmp_path / "weights.safetensors")
    again = coar.load(tmp_path / "weights.safetensors")
    goal = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")
    assert coar.edit(again, goal, budget=2).codes == later.codes


def test_edits_for_different_code_are_not_joined(tmp_path):
    one, other = (
        edit_of(coar.collect(study(kind), tmp_path / f"{kind.__name__}.zarr", masks=64, progress=False))
        for kind in (nn.GELU, nn.ReLU)
    )
    with pytest.raises(EditError, match="different code"):
        one + other


def test_an_edit_is_applied_with_other_versions_of_libraries(tmp_path):
    edit = edit_of(coar.collect(study(nn.GELU), tmp_path / "run.zarr", masks=64, progress=False))
    older = dataclasses.replace(edit, codes=tuple({**code, "libraries": {"torch": "2.0"}} for code in edit.codes))
    assert len(older.apply(study(nn.GELU).model)) == 3
