"""Answers less wrong answers, and named positions, against loops over plain numbers; and what is refused."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import coar
from coar.errors import ExamplesError, OutputError
from tests import oracles

WORDS = 11
TEXTS = [[7, 3, 9, 4, 1], [5, 8], [2, 2, 6, 10]]
ANSWERS, WRONG = [[3], [4, 9], [0, 1, 2]], [[8, 10], [1], [5]]
PLACE = [2, 0, -2]  # of the named position, in each text
SIDES = ["left", "right"]


def padded(side):
    """The texts with padding on one side, by hand."""
    rows, mask = [], []
    for text in TEXTS:
        gap = [6] * (5 - len(text))
        rows.append([*gap, *text] if side == "left" else [*text, *gap])
        mask.append([0] * len(gap) + [1] * len(text) if side == "left" else [1] * len(text) + [0] * len(gap))
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def differences(logits_alone, places):
    """What is read of the (length, vocabulary) logits of every text alone, in plain loops."""
    found = []
    for rows, place, own, others in zip(logits_alone, places, ANSWERS, WRONG, strict=True):
        row = rows[place]
        found.append(sum(row[a] for a in own) / len(own) - sum(row[w] for w in others) / len(others))
    return found


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager", "use_cache": False}
    net = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=WORDS, n_positions=8, **ends)).eval()
    return oracles.rough(net)


@pytest.mark.parametrize("read", [None, "middle"])
@pytest.mark.parametrize("side", SIDES)
def test_outputs_are_those_of_single_texts_under_every_mask(gpt2, side, read, tmp_path):
    """In plain passes, and in a run that shortens texts and computes few logits."""
    examples = coar.token_examples(padded(side), answers=ANSWERS, wrong=WRONG, positions={"middle": PLACE}, read=read)
    places = [-1, -1, -1] if read is None else PLACE
    output = coar.LogitDifference()
    with torch.no_grad():
        alone = [gpt2(torch.tensor([text])).logits[0].tolist() for text in TEXTS]
        found = output(gpt2(**examples.inputs), examples.targets)
    np.testing.assert_allclose(found, differences(alone, places), rtol=1e-4, atol=1e-4)
    features = coar.input_features(gpt2, exclude="lm_head")
    study = coar.Study(model=gpt2, examples=examples, components=features, output=output)
    run = coar.collect(study, tmp_path / "run.zarr", masks=2, gradients=4, device="cpu", progress=False)
    for row in range(2):
        mask, stored = run.masks(row, row + 1)[0], run.array("outputs")[row]
        copy = oracles.features_zeroed(
            gpt2, [(c.site, c.position) for c, kept in zip(features, mask, strict=True) if not kept]
        )
        with torch.no_grad():
            alone = [copy(torch.tensor([text])).logits[0].tolist() for text in TEXTS]
        np.testing.assert_allclose(stored, differences(alone, places), rtol=1e-4, atol=1e-4)


def test_the_gradient_is_a_share_of_each_answer():
    examples = coar.token_examples(padded("right"), answers=ANSWERS, wrong=WRONG)
    logits = torch.randn(3, 5, WORDS).requires_grad_()
    coar.LogitDifference()(logits, examples.targets).sum().backward()
    expected = torch.zeros(3, 5, WORDS)
    for row, (text, own, others) in enumerate(zip(TEXTS, ANSWERS, WRONG, strict=True)):
        expected[row, len(text) - 1, own] = 1 / len(own)
        expected[row, len(text) - 1, others] = -1 / len(others)
    assert torch.equal(logits.grad, expected)


@pytest.mark.parametrize("side", SIDES)
def test_named_positions_are_those_of_the_unpadded_texts(side):
    tokens = padded(side)
    examples = coar.token_examples(tokens, positions={"middle": PLACE, "first": torch.zeros(3, dtype=torch.int32)})
    for row, (text, place) in enumerate(zip(TEXTS, PLACE, strict=True)):
        assert int(tokens["input_ids"][row, examples.positions["middle"][row]]) == text[place]
        assert int(tokens["input_ids"][row, examples.positions["first"][row]]) == text[0]
    assert examples.subset([2, 0]).positions["middle"].tolist() == examples.positions["middle"][[2, 0]].tolist()
    read = coar.token_examples(tokens, positions={"middle": PLACE}, read="middle")
    for row, (text, place) in enumerate(zip(TEXTS, PLACE, strict=True)):
        (column,) = (read.targets[row] != -100).nonzero()
        assert int(column) == read.positions["middle"][row]
        assert int(read.targets[row, column]) == text[place + 1]


def test_positions_are_part_of_the_fingerprint():
    none, one, other, named = (
        coar.token_examples(padded("right"), positions=positions).fingerprint()
        for positions in ({}, {"a": PLACE}, {"a": [2, 1, -2]}, {"b": PLACE})
    )
    assert len({none, one, other, named}) == 4
    assert coar.token_examples(padded("right"), positions={"a": [2, 0, 2]}).fingerprint() == one


def test_outputs_of_one_token_read_the_answer():
    one = [3, 4, 0]
    alone = coar.token_examples(padded("left"), answers=one)
    compared = coar.token_examples(padded("left"), answers=[[token] for token in one], wrong=WRONG)
    logits = torch.randn(3, 5, WORDS)
    for output in (coar.TokenMargin(), coar.TokenLogProbability(), coar.ChoiceMargin(answers=(0, 3, 4, 9))):
        assert torch.equal(output(logits, alone.targets), output(logits, compared.targets))
    with pytest.raises(OutputError, match=r"example 1 of this batch has several answers, .* coar.LogitDifference, or"):
        coar.TokenMargin()(logits, coar.token_examples(padded("left"), answers=ANSWERS, wrong=WRONG).targets)


def test_edits_may_be_judged_by_the_sign():
    """With one answer and one wrong answer it is positive exactly where the answer would be chosen of the two."""
    own, others = [3, 4, 0], [1, 2, 9]
    logits = torch.randn(3, 5, WORDS)
    targets = coar.token_examples(padded("right"), answers=own, wrong=others).targets
    chosen = [
        int(logits[row, len(TEXTS[row]) - 1, [a, w]].argmax()) == 0
        for row, (a, w) in enumerate(zip(own, others, strict=True))
    ]
    for output in coar.LogitDifference().hard_and_smooth():
        assert (output(logits, targets) > 0).tolist() == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers": ANSWERS}, r"example 1 has 2 answers, \[4, 9\], and one is expected; .* as wrong="),
        ({"wrong": WRONG}, "wrong answers were given without the correct ones; give answers="),
        ({"answers": ANSWERS, "wrong": [[8], [9], [1]]}, "token 9 of example 1 is both an answer and a wrong answer"),
        ({"answers": ANSWERS, "wrong": [[8], [], [5]]}, "wrong are a list; give one token, a whole number, or with"),
        ({"answers": ANSWERS, "wrong": [[8], [-1], [5]]}, "wrong are a list; give one token"),
        ({"answers": ANSWERS[:2], "wrong": WRONG}, "answers are a list; .* for each of the 3 examples"),
        ({"answers": [1, 2, "x"]}, "answers are a list; give one token"),
        ({"answers": [True, 2.5, 1]}, "answers are a list; give one token"),
        ({"positions": {"a": [0, 2, 0]}}, "'a' of example 1 is 2, and its text has 2 tokens; count them from 0, or"),
        ({"positions": {"a": [0, 0, -5]}}, "'a' of example 2 is -5, and its text has 4 tokens"),
        ({"positions": {"a": [0, 1]}}, r"'a' has shape \(2,\) and type int64; .* each of the 3 examples"),
        ({"positions": {"a": [0.0, 1.0, 1.0]}}, "float64; give the number of a token"),
        ({"positions": {"a b": PLACE}}, "'a b' has shape .* under a name of one word"),
        ({"positions": {"a": PLACE}, "read": "b"}, r"the position to read, 'b', has no numbers; .* or one of \['a'\]"),
        ({"positions": {"a": [0, -1, 0]}, "read": "a"}, "is the last token of example 1, which has no next token"),
    ],
)
def test_answers_and_positions_that_do_not_fit(options, message):
    with pytest.raises(ExamplesError, match=message):
        coar.token_examples(padded("left"), **options)


@pytest.mark.parametrize(
    ("inputs", "positions", "message"),
    [
        ({"input_ids": torch.ones(2, 3)}, {"a": [0, 3]}, "'a' of example 1 is 3, outside of the 3 positions"),
        ({"input_ids": torch.ones(2, 3)}, {"a": [-1, 0]}, "'a' of example 0 is -1, outside"),
        (torch.ones(2, 3), {"a": [0, 0]}, "outside of the 0 positions of input_ids"),
        ({"input_ids": torch.ones(2, 3)}, {"a": [[0], [0]]}, r"'a' has shape \(2, 1\)"),
    ],
)
def test_positions_of_examples_that_do_not_fit(inputs, positions, message):
    with pytest.raises(ExamplesError, match=message):
        coar.Examples(inputs=inputs, targets=torch.zeros(2), positions=positions)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(1, 2, WORDS), torch.tensor([[-100, 3]]), "LogitDifference compares answers with wrong answers"),
        (torch.zeros(1, 2, WORDS), torch.full((1, 2, 2, 1), -100), "example 0 of this batch has no token to read"),
        (torch.zeros(1, 1, WORDS), torch.tensor([[[[1, 2], [11, -100]]]]), "token 11 is outside .* first in example 0"),
        (torch.zeros(1, 2, WORDS), torch.tensor([[[[1], [2]]]]), r"\(1, 2, 11\) and the targets \(1, 1, 2, 1\)"),
    ],
)
def test_what_does_not_fit_is_an_error(logits, targets, message):
    with pytest.raises(OutputError, match=message):
        coar.LogitDifference()(logits, targets)
