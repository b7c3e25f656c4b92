"""The pipeline of language models: a folder and a text of one's own, and the small model that is trained here."""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import coar
from coar.errors import PipelineError, SettingsError
from coar.pipeline import load_pipeline
from pipelines import gpt2
from tests import oracles

FILE = Path(__file__).parent.parent / "pipelines" / "gpt2.py"
WORDS = 400
SMALL = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": WORDS}
LLAMA = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=64, **SMALL)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True, **SMALL)),
}
FEATURES = {"gpt2": 2 * (3 * 24 + 96), "llama": 2 * (6 * 24 + 32)}  # by hand: what the layers of two blocks read


@pytest.fixture(params=MODELS)
def own(request, tmp_path, monkeypatch):
    """A model and its tokenizer in a folder as save_pretrained writes them, and a text in a file."""
    torch.manual_seed(0)
    oracles.rough(MODELS[request.param]()).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(gpt2, "VOCABULARY", WORDS)
    gpt2.byte_pairs(topics["assert"]).save_pretrained(tmp_path / "model")
    monkeypatch.setenv("COAR_GPT2", str(tmp_path / "model"))
    monkeypatch.setenv("COAR_GPT2_TEXT", str(tmp_path / "text.txt"))
    (tmp_path / "text.txt").write_text("\n".join(topics[name] for name in ("for", "while", "with", "try", "assert")))
    return request.param


def every_part():
    return {part: gpt2.examples(part) for part in ("train", "studied", "judge")}


def test_passages_are_the_text_and_no_two_parts_share_one(own):
    tokens, text = gpt2.tokenizer(), gpt2.text()
    ids = tokens.encode(text)
    assert tokens.decode(ids) == text
    found = {}
    for part in every_part().values():
        for number, passage, words in zip(
            part.metadata["id"].tolist(), part.inputs["input_ids"].tolist(), part.metadata["text"].tolist(), strict=True
        ):
            assert number not in found
            assert words == tokens.decode(passage)
            found[number] = passage
    count = len(ids) // 64
    assert sorted(found) == list(range(count))
    assert [token for number in range(count) for token in found[number]] == ids[: count * 64]
    assert len(every_part()["studied"]) >= 2


@pytest.mark.parametrize("reduction", ["mean", "last"])
def test_a_run_on_a_model_and_a_text_of_ones_own(own, reduction, tmp_path):
    study = gpt2.study(ablation="zero", reduction=reduction)
    assert set(study.components.kinds) == {"input feature"}
    assert len(study.components) == FEATURES[own]
    run = coar.collect(study, tmp_path / "run.zarr", masks=1, gradients=4, device="cpu", progress=False)
    plain = MODELS[own]().from_pretrained(tmp_path / "model").eval()
    gone = [(c.site, c.position) for c, kept in zip(study.components, run.masks(0, 1)[0], strict=True) if not kept]
    for net, stored in ((plain, "base_output"), (oracles.features_zeroed(plain, gone), "outputs")):
        for i, passage in enumerate(study.examples.inputs["input_ids"].tolist()):
            with torch.no_grad():
                logits = net(torch.tensor([passage])).logits[0].tolist()
            margins = [
                oracles.OUTPUTS["logsumexp"](row, token) for row, token in zip(logits, passage[1:], strict=False)
            ]
            expected = margins[-1] if reduction == "last" else sum(margins) / len(margins)
            assert run.array(stored)[:].reshape(-1)[i] == pytest.approx(expected, abs=1e-4)


def test_heads_by_option(own, monkeypatch):
    monkeypatch.setenv("COAR_GPT2_COMPONENTS", "heads")
    assert list(gpt2.study(ablation="zero").components.kinds) == ["attention head"] * 8
    monkeypatch.setenv("COAR_GPT2_COMPONENTS", "neurons")
    with pytest.raises(SettingsError, match="COAR_GPT2_COMPONENTS is 'neurons'; choose one of inputs, heads"):
        gpt2.study()


def test_optimal_constants_keep_down_the_loss_that_the_model_was_trained_on(own):
    study = gpt2.study(ablation="optimal")
    model = study.model.eval()
    inputs, targets = study.examples.block(0, 6)
    with torch.inference_mode():
        found = study.ablation.loss(model(**inputs), targets)
        logits = model(**inputs).logits.double()[:, :-1].log_softmax(2)
        next_tokens = inputs["input_ids"][:, 1:, None]
    np.testing.assert_allclose(found, -logits.gather(2, next_tokens)[..., 0].mean(1), rtol=1e-5)


def test_options_reach_the_study(own):
    loaded = load_pipeline(FILE)
    assert (loaded.masks, loaded.test_masks, loaded.test_fractions) == (3_000, 300, (0.05,))
    made = loaded.study(ablation="mean", ablated_fraction=0.02, seed=9)
    assert made.sampler == coar.BernoulliSampler(ablated_fraction=0.02, seed=9)
    assert made.ablation.calibration.fingerprint() == gpt2.examples("train").fingerprint()
    assert made.fingerprint() == loaded.study(ablation="mean", ablated_fraction=0.02, seed=9).fingerprint()
    assert loaded.judge().fingerprint() == gpt2.examples("judge").fingerprint()


@pytest.mark.parametrize("part", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_folder_with_a_part_gone_or_cut(own, tmp_path, part, damage):
    file = tmp_path / "model" / part
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(PipelineError, match=r"cannot load a causal language model from '.*': .*; set COAR_GPT2 to a"):
        gpt2.study()


def test_tokenizer_of_another_model(own, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt2, "VOCABULARY", WORDS + 1)
    gpt2.byte_pairs(topics["for"]).save_pretrained(tmp_path / "model")
    with pytest.raises(PipelineError, match="the tokenizer has 401 words where the model has 400"):
        gpt2.study()


@pytest.mark.parametrize("damage", ["gone", "bytes", "short"])
def test_text_that_cannot_be_used(own, tmp_path, damage):
    file = tmp_path / "text.txt"
    file.unlink()
    if damage != "gone":
        file.write_bytes(b"\xff\xfe" if damage == "bytes" else b"too short")
    with pytest.raises(PipelineError, match=r"COAR_GPT2_TEXT to a (longer )?file"):
        gpt2.judge()


def test_without_the_extra_a_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PipelineError, match=r"needs transformers, .* pip install '\.\[text\]'"):
        load_pipeline(FILE)


@pytest.mark.slow
def test_the_small_model_has_learnt_and_is_kept(monkeypatch):
    """On passages that it has not seen its loss is far below that of tokens' frequencies, which need no model."""
    net = gpt2.model()
    inputs, targets = gpt2.examples("judge").block(0, 10_000)
    with torch.no_grad():
        loss = float(gpt2.next_token_loss(net, inputs, targets))
    counts = np.bincount(gpt2.examples("train").inputs["input_ids"].flatten(), minlength=gpt2.VOCABULARY) + 1
    read = targets[targets >= 0].numpy()
    assert loss < -np.log(counts / counts.sum())[read].mean() - 2
    study = gpt2.study()
    assert len(study.components) == 3 * (3 * 128 + 4 * 128)
    monkeypatch.setattr(gpt2.training, "fit", None)  # the second time it comes from its file
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in gpt2.model().state_dict().items())
