"""Copies of models on a device: the same numbers, and the user's own model as it was."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import FastGELUActivation, NewGELUActivation

import coar
from coar.forward.copies import device_copy
from coar.forward.runner import FastRunner
from tests.tiny import GPT2, lively

CPU = torch.device("cpu")
SPELLED_OUT = {"gelu_new": NewGELUActivation, "gelu_fast": FastGELUActivation}


def language_model(activation):
    return lively(GPT2LMHeadModel(GPT2Config(**GPT2 | {"activation_function": activation})))


def activations(model):
    return [type(block.mlp.act) for block in model.transformer.h]


@pytest.mark.parametrize("name", SPELLED_OUT)
def test_an_activation_in_one_kernel_gives_the_same(name):
    model = language_model(name)
    made, tokens = device_copy(model, CPU), torch.arange(40).view(4, 10)
    assert activations(made) == [nn.GELU] * 2
    assert activations(model) == [SPELLED_OUT[name]] * 2
    expected = model(tokens).logits.detach()
    torch.testing.assert_close(made(tokens).logits, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    x = torch.linspace(-12, 12, 10_001, dtype=torch.float64)
    torch.testing.assert_close(made.transformer.h[0].mlp.act(x), SPELLED_OUT[name]()(x), rtol=0, atol=1e-9)


def test_other_activations_and_coarser_models_stay_as_they_are():
    assert activations(device_copy(language_model("relu"), CPU)) == [nn.ReLU] * 2
    assert activations(device_copy(language_model("gelu_new").bfloat16(), CPU)) == [NewGELUActivation] * 2


def test_an_activation_with_hooks_keeps_them():
    model = language_model("gelu_new")
    plain = copy.deepcopy(model)
    model.transformer.h[1].mlp.act.register_forward_hook(lambda _m, _args, y: 2 * y)
    made, tokens = device_copy(model, CPU), torch.arange(20).view(2, 10)
    assert activations(made) == [nn.GELU, NewGELUActivation]
    torch.testing.assert_close(made(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert float((made(tokens).logits - plain(tokens).logits).detach().abs().max()) > 0.1


def test_whole_activations_can_be_ablated():
    model, tokens = language_model("gelu_new"), torch.arange(30).view(3, 10)
    examples = coar.token_examples({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    components = coar.modules(model, "*.mlp.act")
    worker = FastRunner(device_copy(model, CPU), components, torch.zeros(components.width), coar.TokenMargin())
    masks = np.array([[True, True], [False, True], [False, False]])
    found = worker.outputs(worker.load(examples, 0, 3), masks)
    for row, mask in zip(found, masks, strict=True):
        plain = copy.deepcopy(model)
        for block in [block for block, keep in zip(plain.transformer.h, mask, strict=True) if not keep]:
            block.mlp.act.register_forward_hook(lambda _m, _args, y: 0 * y)
        expected = coar.TokenMargin()(plain(tokens), examples.targets).detach().numpy()
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found[1:] - found[0]).min() > 0.01
