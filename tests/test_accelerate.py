"""Models that accelerate has split over devices: its hooks go on working, and gates give what they always do."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook
from torch import nn
from transformers import GPT2Model

import coar
from coar.errors import WeightsError
from coar.forward.copies import device_copy
from coar.gates.gates import Gates
from coar.weights import weights_fingerprint
from tests import oracles, tiny


def split(model, folder, last):
    """Put the last block of a GPT-2 on a device, or the disk, and all else on the processor; hooks everywhere."""
    places = {f"body.{name}": "cpu" for name in ("wte", "wpe", "drop", "h.0", "ln_f")} | {"body.h.1": last}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def parts(model):
    return coar.attention_heads(model) + coar.input_features(model, include="*.mlp.c_proj")


def hooks_of(model):
    return {name: module._hf_hook for name, module in model.named_modules() if hasattr(module, "_hf_hook")}


@pytest.mark.parametrize("last", ["cpu", "disk"])
@pytest.mark.parametrize("use_hooks", [False, True])
def test_gates_give_on_a_split_model_what_they_give_on_the_whole(last, use_hooks, tmp_path):
    plain, x = tiny.model("gpt2").requires_grad_(False), tiny.inputs("gpt2")
    model = split(deepcopy(plain), tmp_path, last)
    table, generator = parts(plain), torch.Generator().manual_seed(2)
    values = torch.randn(table.width, generator=generator)
    keep = torch.rand(len(table), generator=generator) < 0.6
    constants = {
        (row.site, row.position + n): float(values[table.channels_of([i])][n])
        for i, row in enumerate(table)
        if not keep[i]
        for n in range(row.size)
    }
    expected = oracles.forward(oracles.features_replaced(plain, constants), x)
    before, hooks = oracles.snapshot(model), hooks_of(model)
    with Gates(model, table, values, use_hooks=use_hooks) as gates, torch.no_grad():
        gates.set(keep)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
        gates.confirm()
    after = oracles.snapshot(model)
    if last == "cpu":
        oracles.assert_same(before, after)
    assert after[1:] == before[1:]  # what is offloaded is another empty tensor after every forward
    assert hooks_of(model) == hooks
    assert any(isinstance(hook, AlignDevicesHook) for hook in hooks.values())
    assert torch.equal(oracles.forward(model, x), oracles.forward(plain, x))


def test_a_run_of_a_split_model_is_that_of_the_whole(tmp_path):
    plain, examples = tiny.model("gpt2"), coar.Examples(inputs=tiny.inputs("gpt2"), targets=torch.arange(5))
    runs = []
    for name, model in (("whole", plain), ("split", split(deepcopy(plain), tmp_path, "cpu"))):
        what = coar.Study(
            model=model, examples=examples, components=parts(model), ablation=coar.Mean(calibration=examples)
        )
        runs.append(coar.collect(what, tmp_path / f"{name}.zarr", masks=6, gradients=8, device="cpu", progress=False))
    assert runs[0].fingerprint == runs[1].fingerprint
    np.testing.assert_allclose(runs[1].array("outputs")[:], runs[0].array("outputs")[:], atol=1e-6)


def test_weights_that_are_not_in_memory_are_an_error(tmp_path):
    model = split(tiny.model("gpt2"), tmp_path, "disk")
    examples = coar.Examples(inputs=tiny.inputs("gpt2"), targets=torch.arange(5))
    with pytest.raises(WeightsError, match=r"weights are not in memory .* 'body\.h\.1\..* load the whole model"):
        coar.Study(model=model, examples=examples, components=parts(model))


def test_a_split_model_stays_as_it_is_when_a_copy_of_it_is_made(tmp_path):
    model = split(tiny.model("gpt2"), tmp_path, "cpu")
    before = [(name, type(module), id(module)) for name, module in model.named_modules()]
    copy = device_copy(model, torch.device("cpu"))
    assert [(name, type(module), id(module)) for name, module in model.named_modules()] == before
    assert not {id(module) for module in copy.modules()} & {identity for _, _, identity in before}


def test_an_edit_of_a_split_model_is_saved(tmp_path):
    plain, examples = tiny.model("gpt2"), coar.Examples(inputs=tiny.inputs("gpt2"), targets=torch.arange(5))
    model = split(deepcopy(plain), tmp_path, "cpu")
    study = coar.Study(
        model=model, examples=examples, components=parts(model), ablation=coar.Mean(calibration=examples)
    )
    edit = coar.Edit.of(study, study.components.names[:2], device="cpu")
    expected = oracles.forward(edit.apply(plain), examples.inputs)
    edit.save_state_dict(model, tmp_path / "edited.safetensors", examples)
    torch.testing.assert_close(
        oracles.forward(coar.load_weights(deepcopy(plain), tmp_path / "edited.safetensors"), examples.inputs), expected
    )
    edit.save_pretrained(model, tmp_path / "edited", examples)
    plain.body = GPT2Model.from_pretrained(tmp_path / "edited", attn_implementation="eager")
    torch.testing.assert_close(oracles.forward(plain.eval(), examples.inputs), expected)


class Uncopied(nn.Module):
    """A module whose deep copy is itself, as singletons of some libraries are."""

    def __deepcopy__(self, memo):
        return self


def test_a_model_that_deepcopy_does_not_copy_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), Uncopied()).train()
    with pytest.raises(WeightsError, match=r"shares the module '1' with it"):
        device_copy(model, torch.device("cpu"))
    assert all(module.training for module in model.modules())  # the refused copy has not touched it
    components = coar.neurons(model)
    edit = coar.Edit(components[:1], (0.0,), (1.0,), None, "Mean", {}, weights_fingerprint(model))
    with pytest.raises(WeightsError, match=r"shares the module '1' with it"):
        edit.apply(model)
