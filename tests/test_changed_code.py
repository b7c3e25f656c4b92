"""A run goes on with the model it was made for: the same weights under another forward are refused."""

import pytest
import torch
from torch import nn

import coar
from coar.errors import MismatchError


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
