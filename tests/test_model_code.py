"""What a model computes besides its weights: any change that changes outputs changes a hash, and nothing else does."""

import copy
import functools
import importlib.util
import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from coar.model_code import differences, model_code


def net(activation=nn.GELU, stride=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=stride), activation(), nn.Flatten())


def tiny_gpt2(**settings):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**(config | settings)))


def test_copies_and_other_weights_have_equal_code():
    model = net()
    assert model_code(model) == model_code(copy.deepcopy(model)) == model_code(net())
    other = net()
    with torch.no_grad():
        other[0].weight.mul_(2)
    assert differences(model_code(model), model_code(other)) == []
    assert model_code(model.train()) == model_code(model.eval())


def test_a_pass_leaves_the_code_as_it_was():
    for model, inputs in ((net(), torch.randn(2, 3, 8, 8)), (tiny_gpt2(), torch.randint(2, 40, (2, 5)))):
        before = model_code(model)
        model(inputs)
        assert model_code(model) == before


def test_saving_loading_and_other_attention_kernels_elsewhere_leave_the_code_as_it_was(tmp_path):
    model = tiny_gpt2()
    before = model_code(model)
    model.save_pretrained(tmp_path / "one")  # which sets fields of the configuration
    loaded = type(model).from_pretrained(tmp_path / "one")
    loaded.set_attn_implementation("eager")  # which sets an attribute of the class
    assert differences(before, model_code(model)) == []
    (tmp_path / "one").rename(tmp_path / "two")
    assert differences(before, model_code(type(model).from_pretrained(tmp_path / "two"))) == []


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        (net, lambda: net(nn.ReLU), "module '1'"),
        (net, lambda: net(stride=2), "module '0'"),
        (tiny_gpt2, lambda: tiny_gpt2(n_head=4), "attn"),
        (tiny_gpt2, lambda: tiny_gpt2(activation_function="relu"), "mlp.act"),
        (tiny_gpt2, lambda: tiny_gpt2(scale_attn_by_inverse_layer_idx=True), "attn"),
        (tiny_gpt2, lambda: tiny_gpt2(layer_norm_epsilon=1e-3), "ln_1"),
    ],
)
def test_the_same_weights_under_another_forward_differ_and_the_place_is_named(first, second, word):
    a, b = first(), second()
    assert [tuple(p.shape) for p in a.parameters()] == [tuple(p.shape) for p in b.parameters()]
    found = differences(model_code(a), model_code(b))
    assert any(word in one for one in found), found


SOURCE = """
from torch import nn
def helper(x):
    return inner(x) {sign} 1
def inner(x):
    return x * {factor}
class Base(nn.Module):
    scale = {scale}
class Net(Base):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
    def forward(self, x):
        '''{words}'''
        return helper(self.layer(x))
def unused():
    return {unused}
"""


def made(tmp_path, name, **values):
    """Return the net of a file that, as a pipeline's file, is not among the imported modules."""
    values = {"sign": "+", "factor": 2, "scale": 3, "unused": 4, "words": "Net."} | values
    file = tmp_path / f"{name}.py"
    file.write_text(SOURCE.format(**values))
    spec = importlib.util.spec_from_file_location("model_file", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Net()


@pytest.mark.parametrize("change", [{"sign": "-"}, {"factor": 5}, {"scale": 7}])
def test_the_source_of_classes_bases_and_the_functions_they_call_counts(tmp_path, change):
    first, second = made(tmp_path, "a"), made(tmp_path, "b", **change)
    found = differences(model_code(first), model_code(second))
    assert found
    assert all("model_file" in one for one in found), found


USING = """
import torch
from torch import nn
import {helpers}
from {helpers} import SHIFT
FACTOR = {factor}
class Halved(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * {inside}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
    def forward(self, x):
        return {helpers}.helper(Halved.apply(self.layer(x)) * FACTOR + SHIFT)
"""


def using(tmp_path, monkeypatch, name, *, factor=2, inside=3, shift=4, added=5):
    """Return the net of a file that uses another file, a class that is no module, and plain values."""
    helpers = f"helpers_{name}"
    (tmp_path / f"{helpers}.py").write_text(f"SHIFT = {shift}\ndef helper(x):\n    return x + {added}\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / f"{name}.py"
    file.write_text(USING.format(helpers=helpers, factor=factor, inside=inside))
    spec = importlib.util.spec_from_file_location("model_file", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("change", [{"factor": 7}, {"inside": 7}, {"shift": 7}, {"added": 7}])
def test_values_classes_and_files_of_ones_own_that_a_class_uses_count(tmp_path, monkeypatch, change):
    name = next(iter(change))
    first = using(tmp_path, monkeypatch, f"first_{name}")
    before = model_code(first.Net())
    assert model_code(first.Net()) == before
    helpers = vars(first)[f"helpers_first_{name}"]
    after = using(tmp_path, monkeypatch, f"other_{name}", **change)
    if name == "factor":
        first.FACTOR = 7
    elif name == "shift":
        first.SHIFT = 7
    elif name == "inside":
        first.Halved = after.Halved
    else:
        helpers.helper = vars(after)[f"helpers_other_{name}"].helper
    assert differences(before, model_code(first.Net())) == ["the code of model_file.Net"]


def test_a_function_that_nothing_calls_does_not_count(tmp_path):
    assert model_code(made(tmp_path, "a")) == model_code(made(tmp_path, "b", unused=9))


def test_comments_docstrings_and_layout_do_not_count(tmp_path):
    assert model_code(made(tmp_path, "a")) == model_code(made(tmp_path, "b", words="Other words."))
    assert model_code(made(tmp_path, "a")) == model_code(made(tmp_path, "b", factor="(  2  )  # twice"))


def test_a_method_replaced_on_an_instance_counts():
    first, second = net(), net()
    second[1].forward = types.MethodType(lambda self, x: x.relu(), second[1])
    assert differences(model_code(first), model_code(second)) == ["the class or the settings of module '1'"]
    third = net()
    third[1].forward = functools.partial(nn.functional.relu)
    assert differences(model_code(first), model_code(third)) == ["the class or the settings of module '1'"]


def scaled(layer, factor):
    """Patch a layer's forward by a closure over a value."""
    plain = layer.forward
    layer.forward = lambda x: plain(x) * factor
    return layer


@pytest.mark.parametrize(
    ("one", "other"),
    [(2.0, 3.0), (torch.ones(3), torch.zeros(3)), ([1, {"a": 2}], [1, {"a": 3}]), (torch.float16, torch.float32)],
)
def test_values_in_the_closure_of_a_replaced_method_count(one, other):
    first, same, second = net(), net(), net()
    scaled(first[0], one), scaled(same[0], copy.deepcopy(one)), scaled(second[0], other)
    assert model_code(first) == model_code(same)
    assert differences(model_code(first), model_code(second)) == ["the class or the settings of module '0'"]


def test_defaults_of_a_replaced_method_count():
    nets = net(), net(), net()
    for one, factor in zip(nets, (2, 2, 3), strict=True):
        one[1].forward = lambda x, factor=factor: x * factor
    codes = [model_code(one) for one in nets]
    assert codes[0] == codes[1] != codes[2]


def test_other_models_in_a_closure_count_by_their_weights_and_the_models_own_modules_do_not():
    def replaced(scale, own):
        model, other = net(), nn.Linear(2, 2)
        with torch.no_grad():
            other.weight.fill_(scale), model[0].weight.fill_(own)
        layer = model[0]
        model[2].forward = lambda x: other(layer(x))
        return model_code(model)

    assert replaced(1, 1) == replaced(1, 2)
    assert replaced(1, 1) != replaced(2, 1)


def test_a_function_that_captures_itself_has_a_hash():
    def forward(x, depth=0):
        return x if depth else forward(x, 1)

    model = net()
    model[1].forward = forward
    assert model_code(model) == model_code(model)


def test_versions_of_libraries_are_named():
    code = model_code(net())
    assert code["libraries"] == {"torch": torch.__version__.partition("+")[0]} or "torch" in code["libraries"]
    other = {**code, "libraries": {"torch": "0.0"}}
    assert "0.0 before" in differences(other, code)[0]


def test_code_without_source_has_the_same_hash_in_every_process():
    """A set of strings among the constants has another order in every process."""
    code = "def forward(x, kind=0):\\n    return x if kind in {'a', 'b', 'c', 'd'} else -x"
    program = (
        "from torch import nn; from coar.model_code import model_code; model, scope = nn.ReLU(), {}; "
        f'exec("{code}", scope); model.forward = scope["forward"]; print(model_code(model)["modules"])'
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1
