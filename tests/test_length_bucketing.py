"""Texts in batches of like length: the outputs and gradients of each text alone, and when padding stays."""

import logging
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import coar
from coar.forward.length_bucketing import cut, ends_of
from coar.forward.runner import FastRunner, ReferenceRunner
from coar.outputs.base import Output
from tests.tiny import GPT2, TEXT, lively

WORDS, LENGTH, TEXTS = 50, 48, 30
CPU = torch.device("cpu")
repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=80)


class Body(nn.Module):
    """BERT's states of texts that lie along any number of axes, averaged over what the mask shows, or over all."""

    def __init__(self, *, blind=False):
        super().__init__()
        self.blind = blind
        self.bert = BertModel(BertConfig(**TEXT | {"max_position_embeddings": 64}), add_pooling_layer=False)

    def forward(self, input_ids, attention_mask):
        ids, mask = input_ids.flatten(0, -2), attention_mask.flatten(0, -2)
        states = self.bert(ids, attention_mask=mask).last_hidden_state
        weights = torch.ones_like(mask)[..., None] if self.blind else mask[..., None]
        return ((states * weights).sum(1) / weights.sum(1)).unflatten(0, input_ids.shape[:-1])


class FirstNumber(Output):
    """The first number of what a model returns for an example."""

    def __call__(self, result, targets):
        return result.flatten(1)[:, 0]


def tokens(count=TEXTS, texts=(), seed=1, *, left=False):
    """Tokens of texts of two to 48 tokens, padded on one side."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, LENGTH + 1, (count, *texts), generator=draw)
    lengths[0] = LENGTH
    mask = (torch.arange(LENGTH) < lengths[..., None]).long()
    mask = mask.flip(-1) if left else mask
    return {"input_ids": torch.randint(1, WORDS, mask.shape, generator=draw) * mask, "attention_mask": mask}


def study(kind):
    """A study of single texts, of pairs of texts, or of a language model."""
    if kind.startswith("language model"):
        net = lively(GPT2LMHeadModel(GPT2Config(**GPT2 | {"n_positions": 64})))
        components = coar.attention_heads(net) + coar.input_features(net, include="*.mlp.c_proj")
        texts = coar.token_examples(tokens(left="in front" in kind))
        return coar.Study(model=net, examples=texts, components=components, output=coar.TokenMargin())
    net = lively(Body(blind=kind == "blind"))
    inputs = tokens(texts=(2,) if kind == "pairs" else (), left=kind == "padded in front")
    return coar.Study(
        model=net,
        examples=coar.Examples(inputs=inputs, targets=torch.zeros(TEXTS)),
        components=coar.attention_heads(net)
        + coar.input_features(net, include="*.output.dense", exclude="*.attention.*"),
        output=coar.CosineSimilarity() if kind == "pairs" else FirstNumber(),
    )


def worker(study, **options):
    return FastRunner(study.model, study.components, torch.zeros(study.components.width), study.output, **options)


def reference(study):
    return ReferenceRunner(study.model, study.components, torch.zeros(study.components.width), study.output)


def masks_of(study, count=4):
    return study.sampler.masks("train", range(count), len(study.components))


def lengths(block):
    return [inputs["input_ids"].shape[-1] for inputs, _ in block.batches]


def alone(study, one):
    """Example number `one` without any padding that its own texts do not need."""
    inputs = {name: value[one : one + 1] for name, value in study.examples.inputs.items()}
    there = inputs["attention_mask"].flatten(0, -2).any(0)
    targets = study.examples.targets[one : one + 1]
    targets = targets[:, there] if targets.ndim == 2 else targets
    return coar.Examples(inputs={name: value[..., there] for name, value in inputs.items()}, targets=targets)


@pytest.mark.parametrize("kind", ["texts", "pairs", "language model", "language model, padded in front"])
def test_every_text_gets_what_it_gets_alone(kind):
    asked = study(kind)
    here, masks = worker(asked), masks_of(asked)
    block = here.load(asked.examples, 0, TEXTS)
    assert len(block.batches) > 1
    assert lengths(block) == sorted(lengths(block))
    assert lengths(block)[0] < LENGTH / 2 or kind == "pairs"
    plain = reference(asked)
    singly = [plain.load(alone(asked, one), 0, 1) for one in range(TEXTS)]
    expected = np.concatenate([plain.outputs(part, masks) for part in singly], axis=1)
    assert expected.std(0).min() > 1e-3
    np.testing.assert_allclose(here.outputs(block, masks), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        here.base_output(block), np.concatenate([plain.base_output(part) for part in singly]), rtol=1e-4, atol=1e-5
    )

    mask_groups = np.arange(TEXTS) % 3
    own = masks_of(asked, 6).reshape(2, 3, -1)
    found = here.mask_gradients(block, own, mask_groups)
    parts = [
        plain.mask_gradients(part, own[:, [mask_group]], np.zeros(1, dtype=np.int64))
        for part, mask_group in zip(singly, mask_groups, strict=True)
    ]
    for mine, theirs, axis in zip(found, zip(*parts, strict=True), (0, 0, 1), strict=True):
        np.testing.assert_allclose(mine, np.concatenate(theirs, axis=axis), rtol=1e-3, atol=1e-5)

    constants = np.zeros(asked.components.width, dtype=np.float32)
    weights = np.linspace(-1, 1, TEXTS, dtype=np.float32)
    outputs, by_constants, by_gates = here.weighted_gradients(block, masks[0], constants, lambda _: weights)
    np.testing.assert_allclose(outputs, expected[0], rtol=1e-4, atol=1e-5)
    pulled = [
        plain.weighted_gradients(part, masks[0], constants, lambda _, i=i: weights[i : i + 1])[1:]
        for i, part in enumerate(singly)
    ]
    np.testing.assert_allclose(by_constants, sum(one for one, _ in pulled), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(by_gates, sum(one for _, one in pulled), rtol=1e-3, atol=1e-4)


def test_a_run_is_that_of_padded_texts(tmp_path):
    asked = study("texts")
    kept = {name: torch.cat([value, value]) for name, value in asked.examples.inputs.items()}
    twice = coar.Study(**{**asked.__dict__, "examples": coar.Examples(inputs=kept, targets=torch.zeros(2 * TEXTS))})
    run = coar.collect(twice, tmp_path / "run.zarr", masks=6, gradients=8, progress=False)
    outputs = run.outputs(slice(0, 6), slice(0, 2 * TEXTS))
    np.testing.assert_allclose(outputs[:, :TEXTS], outputs[:, TEXTS:], rtol=1e-4, atol=1e-5)
    plain = reference(asked)
    expected = plain.outputs(plain.load(asked.examples, 0, TEXTS), masks_of(asked, 6))
    np.testing.assert_allclose(outputs[:, :TEXTS], expected, rtol=1e-4, atol=1e-5)


class Positions(nn.Module):
    """Has a module whose output's features are the positions of a text."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.turned = nn.Identity()

    def forward(self, input_ids, attention_mask):
        states = self.body.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        return (self.turned(states.transpose(1, 2)).transpose(1, 2) * attention_mask[..., None]).sum(1)


def test_components_that_are_positions_keep_their_padding(caplog):
    caplog.set_level(logging.INFO, logger="coar")
    asked = study("texts")
    net = lively(Positions())
    components = coar.Components(
        coar.Component(f"turned[{i}]", "module", "turned", "module", -1, i, 1) for i in range(LENGTH)
    )
    asked = coar.Study(**{**asked.__dict__, "model": net, "components": components})
    assert lengths(worker(asked).load(asked.examples, 0, TEXTS)) == [LENGTH]
    assert "components receive or return tensors of other sizes" in caplog.text


def test_a_model_that_reads_padding_gets_it(caplog):
    caplog.set_level(logging.INFO, logger="coar")
    asked = study("blind")
    here, plain, masks = worker(asked), reference(asked), masks_of(asked)
    block = here.load(asked.examples, 0, TEXTS)
    assert lengths(block) == [LENGTH]
    assert "length bucketing is not used: outputs differ by" in caplog.text
    np.testing.assert_allclose(here.outputs(block, masks), plain.outputs(block, masks), rtol=1e-4, atol=1e-5)


def test_a_model_that_counts_positions_from_the_padding_gets_it(caplog):
    caplog.set_level(logging.INFO, logger="coar")
    asked = study("padded in front")
    assert lengths(worker(asked).load(asked.examples, 0, TEXTS)) == [LENGTH]
    assert "length bucketing is not used: outputs differ by" in caplog.text


def test_positions_that_have_constants_of_their_own_do_not_move():
    for kind, cut_off in (("language model", True), ("language model, padded in front", False)):
        asked = study(kind)
        constants = torch.zeros(LENGTH, asked.components.width)
        here = FastRunner(asked.model, asked.components, constants, asked.output)
        assert (len(here.load(asked.examples, 0, TEXTS).batches) > 1) == cut_off


class Fixed(Body):
    """Takes texts of one length alone."""

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids.reshape(-1, LENGTH), attention_mask.reshape(-1, LENGTH))


def test_a_model_that_takes_one_length_gets_it(caplog):
    caplog.set_level(logging.INFO, logger="coar")
    asked = study("texts")
    asked = coar.Study(**{**asked.__dict__, "model": lively(Fixed())})
    assert lengths(worker(asked).load(asked.examples, 0, TEXTS)) == [LENGTH]
    assert "length bucketing is not used: the model fails" in caplog.text


def test_resampled_texts_keep_their_padding():
    asked = study("texts")
    asked = coar.Study(**{**asked.__dict__, "ablation": coar.Resample(seed=0)})
    block = worker(asked, sources=asked.ablation.sources).load(asked.examples, 0, TEXTS)
    assert lengths(block) == [LENGTH]
    assert block.order is None


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: inputs["attention_mask"][:, None, None, :],
        lambda inputs: inputs["attention_mask"].float().log(),
        lambda inputs: inputs["attention_mask"].sum(1),
    ],
    ids=["shaped for heads", "added to scores", "lengths"],
)
def test_no_length_is_read_off_other_masks(change):
    inputs = tokens()
    targets = torch.zeros(TEXTS)
    ends, starts = ends_of(inputs, targets)
    assert ends.tolist() == inputs["attention_mask"].sum(1).tolist()
    assert set(starts.tolist()) == {LENGTH}
    assert ends_of(inputs | {"attention_mask": change(inputs)}, targets) is None
    assert ends_of({"attention_mask": inputs["attention_mask"]}, targets) is None


def test_a_target_beyond_a_text_is_kept():
    inputs = {name: value[:3] for name, value in tokens().items()}
    targets = torch.full((3, LENGTH), -100)
    targets[1, 40] = 5
    found = ends_of(inputs, targets)[0].tolist()
    own = inputs["attention_mask"].sum(1).tolist()
    assert found == [own[0], max(own[1], 41), own[2]]


def cheapest(sizes, overhead):
    """The least cost of any cut of sorted sizes into stretches."""
    sizes, count = sorted(sizes), len(sizes)
    best = np.inf
    for number in range(count):
        for places in combinations(range(1, count), number):
            parts = [sizes[a:b] for a, b in zip((0, *places), (*places, count), strict=True)]
            best = min(best, sum(len(part) * part[-1] + overhead for part in parts))
    return best


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    most=st.integers(1, 9),
    overhead=st.floats(0, 30),
)
@repeatable
def test_no_cut_into_lengths_is_cheaper(sizes, most, overhead):
    cuts = cut(torch.tensor(sizes), most, overhead)
    assert sorted(i for rows, _ in cuts for i in rows.tolist()) == list(range(len(sizes)))
    assert all(len(rows) <= most and max(sizes[i] for i in rows) <= length for rows, length in cuts)
    cost = sum(len(rows) * length + overhead for rows, length in cuts)
    assert cost <= len(sizes) * max(sizes) + math.ceil(len(sizes) / most) * overhead + 1e-9  # as without any cut
    if most >= len(sizes):
        assert cost == pytest.approx(cheapest(sizes, overhead))
