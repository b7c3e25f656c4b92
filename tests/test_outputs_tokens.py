"""Outputs of language models against loops over plain numbers, with padding on either side, and what they refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

import coar
from coar.errors import ExamplesError, OutputError, SettingsError
from tests import oracles

WORDS = 11
SIDES = ["left", "right"]
FUNCTIONS = {
    **{
        f"margin {against} {reduction}": (coar.TokenMargin(against=against, reduction=reduction), against, reduction)
        for against in ("logsumexp", "largest")
        for reduction in ("mean", "last")
    },
    **{
        f"log-probability {reduction}": (coar.TokenLogProbability(reduction=reduction), "loss", reduction)
        for reduction in ("mean", "sum", "last")
    },
}
repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def expected(texts, logits, kind, reduction):
    """What a function reads of unpadded texts, whose (length, vocabulary) logits are given, token by token."""
    values = []
    for text, rows in zip(texts, logits, strict=True):
        found = [oracles.OUTPUTS[kind](rows[i], text[i + 1]) for i in range(len(text) - 1)]
        found = [-value for value in found] if kind == "loss" else found  # a log-probability is less the loss
        values.append({"mean": sum(found) / len(found), "sum": sum(found), "last": found[-1]}[reduction])
    return values


def padded(texts, side, filler=0):
    """Tokens and mask (texts, longest) with padding on one side."""
    longest = max(map(len, texts))
    gaps = [[filler] * (longest - len(text)) for text in texts]
    rows = [[*gap, *text] if side == "left" else [*text, *gap] for text, gap in zip(texts, gaps, strict=True)]
    mask = [[int(side == "right")] * longest for _ in texts]
    for row, gap in zip(mask, gaps, strict=True):
        for i in range(len(row)):
            row[i] = int(i >= len(gap)) if side == "left" else int(i < len(row) - len(gap))
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def unpadded(logits, texts, side):
    """The logits of every text's own positions, as lists."""
    return [
        (row[len(row) - len(text) :] if side == "left" else row[: len(text)]).tolist()
        for row, text in zip(logits, texts, strict=True)
    ]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FUNCTIONS)
@given(
    texts=st.lists(st.lists(st.integers(0, WORDS - 1), min_size=2, max_size=7), min_size=1, max_size=4),
    seed=st.integers(0, 1_000),
)
@repeatable
def test_only_the_tokens_that_are_there_count(name, side, texts, seed):
    function, kind, reduction = FUNCTIONS[name]
    examples = coar.token_examples(padded(texts, side))
    shape = (*examples.targets.shape, WORDS)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4
    values = function(logits, examples.targets)
    assert values.dtype == torch.float32
    found = expected(texts, unpadded(logits, texts, side), kind, reduction)
    np.testing.assert_allclose(values, found, rtol=1e-4, atol=1e-4)


TEXTS = [[7, 3, 9, 4, 1], [5, 8], [2, 2, 6, 10]]


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager", "use_cache": False}
    net = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=WORDS, n_positions=8, **ends)).eval()
    return oracles.rough(net)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_model_reads_padded_texts_as_it_reads_each_alone(gpt2, name, side):
    function, kind, reduction = FUNCTIONS[name]
    with torch.no_grad():
        alone = [gpt2(torch.tensor([text])).logits[0].tolist() for text in TEXTS]
        examples = coar.token_examples(padded(TEXTS, side, filler=6))
        values = function(gpt2(**examples.inputs), examples.targets)
    np.testing.assert_allclose(values, expected(TEXTS, alone, kind, reduction), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", SIDES)
def test_stored_outputs_are_those_of_single_texts(gpt2, side, tmp_path):
    examples = coar.token_examples(padded(TEXTS, side))
    features = coar.input_features(gpt2, exclude="lm_head")
    study = coar.Study(model=gpt2, examples=examples, components=features, output=coar.TokenMargin())
    run = coar.collect(study, tmp_path / "run.zarr", masks=2, gradients=4, device="cpu", progress=False)
    for row in range(2):
        mask, stored = run.masks(row, row + 1)[0], run.array("outputs")[row]
        gone = [(c.site, c.position) for c, kept in zip(features, mask, strict=True) if not kept]
        copy = oracles.features_zeroed(gpt2, gone)
        with torch.no_grad():
            alone = [copy(torch.tensor([text])).logits[0].tolist() for text in TEXTS]
        np.testing.assert_allclose(stored, expected(TEXTS, alone, "logsumexp", "mean"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("against", ["largest", "logsumexp"])
def test_choices_are_read_after_the_last_token(side, against):
    answers, correct = (4, 9, 0, 7), [9, 4, 7]
    examples = coar.token_examples(padded(TEXTS, side), answers=torch.tensor(correct))
    logits = torch.randn(3, 5, WORDS) * 4
    values = coar.ChoiceMargin(answers=answers, against=against)(logits, examples.targets)
    for value, rows, token in zip(values, unpadded(logits, TEXTS, side), correct, strict=True):
        last = [rows[-1][answer] for answer in answers]
        assert float(value) == pytest.approx(oracles.OUTPUTS[against](last, answers.index(token)), rel=1e-4, abs=1e-4)


def test_largest_choice_margin_is_positive_where_the_answer_would_be_chosen():
    answers = (1, 5, 6)
    logits = torch.randn(50, 3, WORDS)
    correct = torch.tensor(answers)[torch.arange(50) % 3]
    ones = torch.ones(50, 3, dtype=torch.long)
    examples = coar.token_examples({"input_ids": ones, "attention_mask": ones}, answers=correct)
    chosen = torch.tensor(answers)[logits[:, -1, list(answers)].argmax(1)]
    assert torch.equal(coar.ChoiceMargin(answers=answers)(logits, examples.targets) > 0, chosen == correct)
    assert 0 < int((chosen == correct).sum()) < 50


class Letters:
    """A tokenizer of letters: one token each."""

    def encode(self, text, *, add_special_tokens):
        return [0] * add_special_tokens + [ord(letter) - ord("a") for letter in text]


def test_answers_in_words():
    assert coar.ChoiceMargin.of(Letters(), ["c", "a"]) == coar.ChoiceMargin(answers=(2, 0))
    with pytest.raises(SettingsError, match=r"the answer 'dog' is 3 tokens, \[3, 14, 6\], and one is expected; choose"):
        coar.ChoiceMargin.of(Letters(), ["c", "dog"])
    with pytest.raises(SettingsError, match="the answer '' is 0 tokens"):
        coar.ChoiceMargin.of(Letters(), ["", "c"])
    with pytest.raises(SettingsError, match=r"\(2, 2\) are not two or more different tokens"):
        coar.ChoiceMargin.of(Letters(), ["c", "c"])


@pytest.mark.parametrize("answers", [(3,), (), (3, 3), (3, -1), ((1, 2), (3, 4)), ("A", "B")])
def test_answers_that_are_no_choice(answers):
    with pytest.raises(SettingsError, match="answers"):
        coar.ChoiceMargin(answers=answers)


def test_choices_that_do_not_fit():
    examples = coar.token_examples(padded(TEXTS, "right"), answers=torch.tensor([1, 2, 3]))
    with pytest.raises(OutputError, match=r"token 3 that example 2 .* is none of the answers \(1, 2\)"):
        coar.ChoiceMargin(answers=(1, 2))(torch.zeros(3, 5, WORDS), examples.targets)
    with pytest.raises(OutputError, match="answer 99 is outside the model's vocabulary of 11 tokens"):
        coar.ChoiceMargin(answers=(1, 2, 3, 99))(torch.zeros(3, 5, WORDS), examples.targets)


EVERY = [*(function for function, _, _ in FUNCTIONS.values()), coar.ChoiceMargin(answers=(1, 2, 4, 10))]


@pytest.mark.parametrize("function", EVERY, ids=str)
@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, WORDS), torch.tensor([1, 2]), r"\(2, 11\) and the targets \(2,\); .* coar.token_examples"),
        (torch.zeros(2, 1, WORDS), torch.zeros(2, 3, dtype=torch.long), r"\(2, 1, 11\) .* logits of all positions"),
        (torch.zeros(2, 3, WORDS), torch.full((2, 3), -100), "example 0 of this batch has no token to read"),
        (torch.zeros(1, 3, WORDS), torch.tensor([[1, 11, 1]]), "token 11 is outside .* 11 tokens, first in example 0"),
        (torch.zeros(1, 3, WORDS), torch.tensor([[1, -1, 1]]), "token -1 is outside"),
        (torch.zeros(1, 3, WORDS), torch.zeros(1, 3), "float32"),
        ({"scores": torch.zeros(1, 3, WORDS)}, torch.zeros(1, 3, dtype=torch.long), "dict without logits"),
    ],
)
def test_what_does_not_fit_is_an_error(function, logits, targets, message):
    with pytest.raises(OutputError, match=message):
        function(logits, targets)


@pytest.mark.parametrize("function", EVERY, ids=str)
def test_gradients_reach_what_is_read_and_nothing_else(function):
    targets = torch.tensor([[-100, 4, 2, -100], [1, -100, -100, -100]])
    logits = torch.randn(2, 4, WORDS).requires_grad_()
    function(logits, targets).sum().backward()
    touched = (logits.grad != 0).any(2)
    last = getattr(function, "reduction", "last") == "last"
    assert touched.tolist() == [[False, not last, True, False], [True, False, False, False]]


def test_settings_distinguish_functions():
    every = [*EVERY, coar.ChoiceMargin(answers=(2, 1)), coar.ChoiceMargin(answers=(1, 2), against="logsumexp")]
    assert len({repr(sorted(function.settings().items())) for function in every}) == len(every)


def test_targets_are_the_tokens_that_come_next():
    tokens = padded([[7, 3, 9], [5, 8]], "left") | {"token_type_ids": torch.zeros(2, 3, dtype=torch.long)}
    examples = coar.token_examples(tokens, metadata={"topic": ["a", "b"]})
    assert examples.targets.tolist() == [[3, 9, -100], [-100, 8, -100]]
    assert set(examples.inputs) == {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
    assert examples.inputs["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1]]
    assert examples.metadata["topic"].tolist() == ["a", "b"]
    right = coar.token_examples(padded([[7, 3, 9], [5, 8]], "right"))
    assert right.targets.tolist() == [[3, 9, -100], [8, -100, -100]]
    assert set(right.inputs) == {"input_ids", "attention_mask"}
    one = coar.token_examples(padded([[7], [5, 8]], "right"), answers=torch.tensor([1, 2]))
    assert one.targets.tolist() == [[1, -100], [-100, 2]]


GOOD = padded([[7, 3, 9], [5, 8]], "right")


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (
            {"input_ids": GOOD["input_ids"]},
            {},
            "attention_mask is a NoneType .* padding cannot be distinguished",
        ),
        (GOOD | {"input_ids": [[7, 3, 9], [5, 8, 0]]}, {}, "input_ids is a list .* return_tensors='pt'"),
        (GOOD | {"attention_mask": torch.ones(2, 4)}, {}, r"shape \(2, 3\) and attention_mask \(2, 4\)"),
        (GOOD | {"attention_mask": torch.tensor([[1, 1, 1], [2, 1, 0]])}, {}, "the mask 1 where there is a token"),
        (GOOD | {"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}, {}, "example 1 has zeros between ones"),
        (padded([[7, 3, 9], [5]], "left"), {}, "example 1 has 1 tokens and at least 2 are needed"),
        (GOOD | {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, {"answers": torch.tensor([1, 2])}, "1 has 0"),
        (GOOD, {"answers": torch.tensor([1])}, r"answers are torch.int64 of shape \(1,\); .* each of the 2 examples"),
        (GOOD, {"answers": torch.tensor([1.0, 2.0])}, "torch.float32"),
        ({name: value[:0] for name, value in GOOD.items()}, {}, r"shape \(0, 3\)"),
    ],
)
def test_tokens_that_do_not_fit_are_an_error(tokens, options, message):
    with pytest.raises(ExamplesError, match=message):
        coar.token_examples(tokens, **options)
