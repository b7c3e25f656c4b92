"""Edited models on disk: the code given with them loads them without this package, and they compute what hooks do."""

import json
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import coar
from coar.errors import EditError, WeightsError
from coar.weights import weights_fingerprint

WORDS, TEXTS = 40, 4
SMALL = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}
GPT2 = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0}


def text(model, **settings):
    """Return a language model with large weights and biases, so that an edit moves its outputs."""
    torch.manual_seed(0)
    kind, config = model
    built = kind(config(**settings)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(5) if parameter.ndim == 2 else parameter.add_(0.1)
    return built


LANGUAGE = {
    "gpt2": (lambda: text((GPT2LMHeadModel, GPT2Config), **GPT2), "*.mlp.c_proj"),
    "llama": (lambda: text((LlamaForCausalLM, LlamaConfig), **SMALL), "*_proj"),
    "llama in bfloat16": (lambda: text((LlamaForCausalLM, LlamaConfig), **SMALL).bfloat16(), "*.down_proj"),
    "qwen2": (lambda: text((Qwen2ForCausalLM, Qwen2Config), **SMALL, tie_word_embeddings=True), "*.down_proj"),
    "t5": (lambda: text((T5ForConditionalGeneration, T5Config), **T5), "*.wo"),
}


def texts(name):
    inputs = {"input_ids": torch.randint(2, WORDS, (TEXTS, 6)), "attention_mask": torch.ones(TEXTS, 6).long()}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.randint(2, WORDS, (TEXTS, 3))
    return coar.Examples(inputs=inputs, targets=torch.zeros(TEXTS, dtype=torch.long))


def edit_of(model, components, constants, batch_norms=None):
    scores = (1.0,) * len(components)
    return coar.Edit(
        tuple(components), tuple(constants), scores, None, "Mean", batch_norms or {}, weights_fingerprint(model)
    )


def replaced(model, components, constants, run):
    """Return what the model returns when hooks replace channels of inputs or outputs: no weight is changed."""

    def hook(component, constant):
        def change(value):
            value = value.clone()
            value.narrow(component.axis, component.position, component.size).fill_(constant)
            return value

        module = model.get_submodule(component.site)
        if component.side == "input":
            return module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
        return module.register_forward_hook(lambda _, __, output: change(output))

    handles = [hook(*pair) for pair in zip(components, constants, strict=True)]
    try:
        with torch.no_grad():
            return run(model)
    finally:
        for handle in handles:
            handle.remove()


def language_case(name):
    build, sites = LANGUAGE[name]
    model, examples = build(), texts(name)
    table = coar.input_features(model, include=sites)
    components = [table[0], table[3], table[len(table) - 1]]
    edit = edit_of(model, components, (0.5, -1.0, 2.0))

    def run(one):
        return one(**examples.inputs).logits

    return model, examples, edit, replaced(model, components, edit.replacements, run), run


def executed(saved, **names):
    """Run the code that loads a saved model, and return the model."""
    exec(saved.loading, names)
    return names["model"].eval()


def close(found, expected, model):
    tolerance = 5e-2 if next(model.parameters()).dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance * expected.abs().max())


@pytest.mark.parametrize(
    ("name", "way"),
    [("gpt2", "plain"), ("llama", "options"), ("llama in bfloat16", "options"), ("qwen2", "code"), ("t5", "code")],
)
def test_transformers_loads_an_edited_language_model(name, way, tmp_path):
    model, examples, edit, expected, run = language_case(name)
    with torch.no_grad():
        assert (run(model) - expected).abs().max() > 0.02 * expected.abs().max()  # the edit does something
    saved = edit.save_pretrained(model, tmp_path / "model", examples)
    loaded = executed(saved)
    assert loaded.dtype == model.dtype
    with torch.no_grad():
        close(run(loaded), expected, model)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    biases = len({component.site for component in edit.components})
    assert len(saved.new_parameters) == (0 if way == "plain" else biases)
    assert saved.new_parameters == edit.new_parameters(model)
    assert (config.get("mlp_bias") is True) == (way == "options")
    assert ("trust_remote_code" in saved.loading) == (tmp_path / "model/modeling_edited.py").exists() == (way == "code")
    assert "coar" not in saved.loading.replace(str(tmp_path), "")
    assert not (tmp_path / "model.partial").exists()
    assert set(model.state_dict()).isdisjoint(saved.new_parameters)  # the user's model is as it was


def test_padding_on_the_left_does_not_count_where_the_attention_kernel_is_not_saved(tmp_path):
    model = text((GPT2LMHeadModel, GPT2Config), **GPT2, attn_implementation="eager")
    ids, mask = torch.randint(2, WORDS, (TEXTS, 6)), torch.ones(TEXTS, 6).long()
    mask[:, :3] = 0  # what kernels compute for tokens that attend to nothing is their own affair
    examples = coar.token_examples({"input_ids": ids, "attention_mask": mask})
    study = coar.Study(model=model, examples=examples, components=coar.mlp_neurons(model), output=coar.TokenMargin())
    made = coar.Edit.of(study, study.components.names[:20], ablation=coar.ZeroActivation())
    folder = made.save_pretrained(model, tmp_path / "edited", examples).path
    loaded = GPT2LMHeadModel.from_pretrained(folder).eval()
    expected = made.apply(model)(ids, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(loaded(ids, attention_mask=mask).logits[:, 3:], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "warned"), [("gpt2", False), ("llama", True)])
def test_an_applied_edit_warns_where_from_pretrained_would_leave_a_bias_out(name, warned, caplog, tmp_path):
    model, examples, edit, *_ = language_case(name)
    edit.keep(model).save_pretrained(model, tmp_path / "model", examples)
    assert "from_pretrained leaves" not in caplog.text
    edit.apply(model)
    assert ("leaves them out; save it with edit.save_pretrained" in caplog.text) == warned


def test_options_that_are_not_needed_stay_off(tmp_path):
    model, examples = LANGUAGE["llama"][0](), texts("llama")
    table = coar.input_features(model, include="*.down_proj")
    edit_of(model, [table[0]], [0.5]).save_pretrained(model, tmp_path / "model", examples)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["mlp_bias"]
    assert not config["attention_bias"]


class Config(PreTrainedConfig):
    """A configuration whose option for biases also changes the output."""

    model_type = "own"
    bias: bool = False


class Own(PreTrainedModel):
    """A model of transformers that transformers does not have."""

    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3, bias=config.bias)
        self.post_init()

    def forward(self, x):
        return self.second(self.first(x).relu()) * (2 if self.config.bias else 1)


def test_nothing_is_written_where_a_loaded_model_would_differ(tmp_path):
    model = Own(Config()).eval()
    examples = coar.Examples(inputs=torch.randn(5, 4), targets=torch.zeros(5, dtype=torch.long))
    edit = edit_of(model, [coar.input_features(model, include="second")[1]], [1.5])
    with pytest.raises(EditError, match=r"options of its configuration, outputs differ by .*not part of transformers"):
        edit.save_pretrained(model, tmp_path / "model", examples)
    assert list(tmp_path.iterdir()) == []
    zero = edit_of(model, edit.components, [0.0])
    loaded = executed(zero.save_pretrained(model, tmp_path / "model", examples))
    expected = replaced(model, edit.components, [0.0], lambda one: one(examples.inputs))
    torch.testing.assert_close(loaded(examples.inputs), expected)


class Fixed(Own):
    """A model of which from_pretrained refuses what save_pretrained wrote."""

    @classmethod
    def from_pretrained(cls, *args, **options):
        raise RuntimeError("sizes do not match\nsee the report above")


def test_a_folder_that_the_library_does_not_load_is_refused_in_words(tmp_path):
    model = Fixed(Config()).eval()
    examples = coar.Examples(inputs=torch.randn(5, 4), targets=torch.zeros(5, dtype=torch.long))
    zero = edit_of(model, [coar.input_features(model, include="second")[1]], [0.0])
    with pytest.raises(EditError, match=r"from_pretrained fails \(RuntimeError: sizes do not match\)"):
        zero.save_pretrained(model, tmp_path / "model", examples)
    assert list(tmp_path.iterdir()) == []


class Wrapped(nn.Module):
    """A linear layer on the mean logits of a language model."""

    def __init__(self, body):
        super().__init__()
        self.body, self.last = body, nn.Linear(WORDS, 3)

    def forward(self, **inputs):
        return self.last(self.body(**inputs).logits.mean(1))


def test_of_a_wrapper_the_model_of_transformers_is_written_and_nothing_if_the_edit_changes_more(tmp_path):
    model, examples = Wrapped(LANGUAGE["llama"][0]()).eval(), texts("llama")
    table = coar.input_features(model, include="*.down_proj")
    edit = edit_of(model, [table[0], table[3]], [0.5, 2.0])
    expected = replaced(model, edit.components, edit.replacements, lambda one: one(**examples.inputs))
    saved = edit.save_pretrained(model, tmp_path / "model", examples)
    whole = Wrapped(executed(saved)).eval()
    whole.last.load_state_dict(model.last.state_dict())
    with torch.no_grad():
        close(whole(**examples.inputs), expected, model)
        assert (model(**examples.inputs) - expected).abs().max() > 1e-3
    more = edit_of(model, [table[0], coar.neurons(model, include="last")[1]], [0.5, 2.0])
    with pytest.raises(EditError, match=r"changes last\.weight, and save_pretrained writes the module 'body'"):
        more.save_pretrained(model, tmp_path / "other", examples)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_module_without_save_pretrained_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    examples = coar.Examples(inputs=torch.randn(5, 4), targets=torch.zeros(5, dtype=torch.long))
    with pytest.raises(EditError, match=r"a Sequential has no save_pretrained.*edit\.save_state_dict"):
        edit_of(model, [coar.neurons(model)[0]], [0.5]).save_pretrained(model, tmp_path / "model", examples)


PICTURES = {
    "torchvision": (lambda: torchvision.models.resnet18(num_classes=4), "layer1.0.conv1", "layer1.0.bn1"),
    "timm": (
        lambda: timm.create_model("resnet10t", num_classes=4, zero_init_last=False),
        "layer1.0.conv1",
        "layer1.0.bn1",
    ),
}


def picture_case(name, with_norm):
    build, site, norm = PICTURES[name]
    torch.manual_seed(0)
    model = build().eval()
    examples = coar.Examples(inputs=torch.randn(3, 3, 32, 32), targets=torch.zeros(3, dtype=torch.long))
    table = coar.conv_filters(model, include=site)
    components = [table[0], table[5]]
    edit = edit_of(model, components, (3.0, -2.0), {site: norm} if with_norm else {})

    def run(one):
        return one(examples.inputs)

    return model, examples, edit, replaced(model, components, edit.replacements, run), run


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("name", PICTURES)
def test_a_strict_load_takes_the_state_dict_after_the_code_that_is_given(name, with_norm, tmp_path):
    model, examples, edit, expected, run = picture_case(name, with_norm)
    saved = edit.save_state_dict(model, tmp_path / "edited.safetensors", examples)
    fresh = PICTURES[name][0]()
    if with_norm:
        assert saved.new_parameters == edit.new_parameters(model) == ()
        fresh.load_state_dict(load_file(saved.path))
    else:
        assert saved.new_parameters == edit.new_parameters(model) == ("layer1.0.conv1.bias",)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*layer1\.0\.conv1\.bias"):
            fresh.load_state_dict(load_file(saved.path))
        with pytest.raises(WeightsError, match=r"layer1\.0\.conv1\.bias is a bias .*new_parameters"):
            coar.load_weights(PICTURES[name][0](), saved.path)
    with torch.no_grad():
        assert (run(model) - expected).abs().max() > 1e-3
        close(run(executed(saved, model=PICTURES[name][0]())), expected, model)


def test_a_model_whose_modules_have_versions_is_loaded_too(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.mnasnet0_5(num_classes=3).eval()  # its own loading refuses weights without a version
    examples = coar.Examples(inputs=torch.randn(2, 3, 32, 32), targets=torch.zeros(2, dtype=torch.long))
    edit = edit_of(model, [coar.neurons(model)[0]], (3.0,), {})
    saved = edit.save_state_dict(model, tmp_path / "edited.safetensors", examples)
    fresh = executed(saved, model=torchvision.models.mnasnet0_5(num_classes=3))
    with torch.no_grad():
        torch.testing.assert_close(fresh(examples.inputs), edit.apply(model)(examples.inputs))


class Halved(nn.Linear):
    """A layer that writes half of its weight, so that a state dict does not restore it."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"] / 2


def test_a_file_that_does_not_give_the_edited_model_is_an_error(tmp_path):
    model = nn.Sequential(Halved(4, 6), nn.ReLU(), nn.Linear(6, 3))
    examples = coar.Examples(inputs=torch.randn(5, 4), targets=torch.zeros(5, dtype=torch.long))
    edit = edit_of(model, [coar.neurons(model)[0]], [0.5])
    with pytest.raises(EditError, match=r"0\.weight has other numbers"):
        edit.save_state_dict(model, tmp_path / "edited.safetensors", examples)
    with pytest.raises(EditError, match=r"edited\.pt was given.*safetensors"):
        edit.save_state_dict(model, tmp_path / "edited.pt", examples)


PROGRAM = """
import json, sys
from safetensors.torch import load_file, save_file
import torch
found = {}
for name, case in json.load(open("cases.json")).items():
    scope = {}
    exec(case["code"], scope)
    inputs = load_file(case["inputs"])
    with torch.no_grad():
        model = scope["model"].eval()
        found[name] = model(inputs["x"]) if "x" in inputs else model(**inputs).logits
save_file(found, "found.safetensors")
assert not any(name.partition(".")[0] == "coar" for name in sys.modules)
"""
FRESH = {
    "torchvision": "import torchvision\nmodel = torchvision.models.resnet18(num_classes=4)\n",
    "timm": "import timm\nmodel = timm.create_model('resnet10t', num_classes=4)\n",
}


@pytest.mark.slow
def test_another_process_loads_edited_models_without_this_package(tmp_path):
    cases, expected, models = {}, {}, {}
    for name in [*LANGUAGE, *PICTURES]:
        made = language_case(name) if name in LANGUAGE else picture_case(name, with_norm=False)
        models[name], examples, edit, expected[name], _ = made
        saving = edit.save_pretrained if name in LANGUAGE else edit.save_state_dict
        place = name.replace(" ", "_") + ("" if name in LANGUAGE else ".safetensors")
        saved = saving(models[name], tmp_path / place, examples)
        inputs = tmp_path / f"{name}.inputs"
        save_file(examples.inputs if name in LANGUAGE else {"x": examples.inputs}, inputs)
        cases[name] = {"code": FRESH.get(name, "") + saved.loading, "inputs": str(inputs)}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    home = {"HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, check=True, env=home)
    for name, found in load_file(tmp_path / "found.safetensors").items():
        close(found, expected[name], models[name])
