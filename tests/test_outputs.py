"""Output functions against plain loops, and what they refuse."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coar
from coar.errors import OutputError, SettingsError
from coar.outputs.base import Output
from tests import oracles

FUNCTIONS = {
    "logsumexp": coar.CorrectClassMargin(),
    "largest": coar.CorrectClassMargin(against="largest"),
    "logit": coar.ClassLogit(),
    "loss": coar.CrossEntropy(),
}
repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=60)


@dataclass
class Result:
    """What some models return: an object with logits among its attributes."""

    logits: object


def drawn(rows=12, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, classes, generator=generator) * 4,
        torch.randint(classes, (rows,), generator=generator),
    )


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_outputs_are_those_of_plain_loops(kind):
    logits, targets = drawn()
    values = FUNCTIONS[kind](logits, targets)
    assert values.shape == (12,)
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values, oracles.read_outputs(logits, targets, kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FUNCTIONS)
@given(row=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=12), data=st.data())
@repeatable
def test_outputs_of_any_logits_are_those_of_plain_loops(kind, row, data):
    target = data.draw(st.integers(0, len(row) - 1))
    value = FUNCTIONS[kind](torch.tensor([row]), torch.tensor([target]))
    np.testing.assert_allclose(value, oracles.read_outputs(torch.tensor([row]), [target], kind), rtol=1e-5, atol=1e-4)


def test_the_largest_margin_is_positive_exactly_where_the_class_is_predicted():
    logits, targets = drawn(rows=200)
    margins = coar.CorrectClassMargin(against="largest")(logits, targets)
    assert torch.equal(margins > 0, logits.argmax(1) == targets)
    assert (margins > 0).any()
    assert (margins < 0).any()


def test_the_margin_is_the_log_odds_of_the_correct_class():
    logits, targets = drawn()
    probability = logits.softmax(1)[range(12), targets].double()
    odds = torch.log(probability / (1 - probability))
    torch.testing.assert_close(coar.CorrectClassMargin()(logits, targets).double(), odds, rtol=1e-3, atol=1e-3)


def test_one_class_may_be_read_for_all():
    logits, targets = drawn()
    assert torch.equal(coar.ClassLogit(label=3)(logits, targets), logits[:, 3])
    with pytest.raises(OutputError, match="label 5 is outside the model's 5 classes"):
        coar.ClassLogit(label=5)(logits, targets)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_objects_with_logits_are_read(kind):
    logits, targets = drawn()
    assert torch.equal(FUNCTIONS[kind](Result(logits), targets), FUNCTIONS[kind](logits, targets))


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_float32(kind, dtype):
    logits, targets = drawn()
    values = FUNCTIONS[kind](logits.to(dtype), targets)
    assert values.dtype == torch.float32
    assert torch.equal(values, FUNCTIONS[kind](logits.to(dtype).float(), targets))


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_whole_number_type_are_read(kind, dtype):
    logits, targets = drawn()
    assert torch.equal(FUNCTIONS[kind](logits, targets.to(dtype)), FUNCTIONS[kind](logits, targets))


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize(
    ("result", "targets", "message"),
    [
        (torch.zeros(3, 4), torch.tensor([0, 4, 1]), r"label 4 is outside .* 4 classes \(0 to 3\), .* position 1"),
        (torch.zeros(3, 4), torch.tensor([0, 1, -1]), "label -1 .* position 2"),
        (torch.zeros(3, 4), torch.tensor([0.0, 1.0, 2.0]), "float32"),
        (torch.zeros(3, 4), torch.tensor([0, 1]), r"\(3, 4\) and the targets \(2,\)"),
        (torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.long), r"\(3, 1\)"),
        (torch.zeros(3), torch.tensor([0, 1, 2]), r"\(3,\)"),
        (
            torch.zeros(3, 4, 5),
            torch.tensor([0, 1, 2]),
            r"\(3, 4, 5\), like logits of tokens, .* with coar.TokenMargin",
        ),
        ((None, torch.zeros(3, 4)), torch.tensor([0, 1, 2]), "tuple without logits"),
        ({"scores": torch.zeros(3, 4)}, torch.tensor([0, 1, 2]), "dict without logits"),
        (Result(None), torch.tensor([0, 1, 2]), "Result without logits"),
        (None, torch.tensor([0, 1, 2]), "NoneType without logits"),
    ],
)
def test_what_does_not_fit_is_an_error(kind, result, targets, message):
    with pytest.raises(OutputError, match=message):
        FUNCTIONS[kind](result, targets)


def test_truth_values_are_no_labels():
    with pytest.raises(OutputError, match="bool"):
        coar.ClassLogit()(torch.zeros(2, 2), torch.tensor([True, False]))


def test_settings_distinguish_output_functions():
    every = [*FUNCTIONS.values(), coar.ClassLogit(label=0), coar.ClassLogit(label=1)]
    assert len({tuple(function.settings().items()) for function in every}) == len(every)
    for wrong in ({"against": "mean"}, {"rival": "largest"}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            coar.CorrectClassMargin(**wrong)


def test_gradients_reach_the_logits():
    logits, targets = drawn()
    for function in FUNCTIONS.values():
        live = logits.clone().requires_grad_()
        function(live, targets).sum().backward()
        assert torch.isfinite(live.grad).all()
        assert live.grad.abs().sum() > 0


def test_similarity_is_the_cosine_of_the_two_embeddings():
    pairs = torch.randn(7, 2, 5, generator=torch.Generator().manual_seed(0)) * 3
    values = coar.CosineSimilarity()(pairs, torch.zeros(7))
    assert values.shape == (7,)
    expected = [
        sum(a * b for a, b in zip(one, other, strict=True))
        / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))
        for one, other in pairs.tolist()
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    low = coar.CosineSimilarity()(pairs.bfloat16(), torch.zeros(7))
    assert low.dtype == torch.float32
    live = pairs.clone().requires_grad_()
    coar.CosineSimilarity()(live, torch.zeros(7)).sum().backward()
    assert live.grad.abs().sum() > 0
    assert coar.CosineSimilarity().settings() == {"name": "CosineSimilarity"}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(3, 5), r"a tensor of shape \(3, 5\) for 3 pairs"),
        (torch.zeros(6, 2, 5), r"\(6, 2, 5\) for 3 pairs"),
        (torch.zeros(3, 3, 5), r"\(3, 3, 5\)"),
        (torch.zeros(3, 2, 5, 1), r"\(3, 2, 5, 1\)"),
        (Result(torch.zeros(3, 2, 5)), "a Result for 3 pairs"),
    ],
)
def test_what_holds_no_two_embeddings_of_each_pair_is_an_error(result, message):
    with pytest.raises(OutputError, match=message):
        coar.CosineSimilarity()(result, torch.zeros(3))


def zero_shot(pictures, prompts, targets, scale, against):
    """Margins from plain numbers, one picture and one prompt at a time."""
    found = []
    for picture, target in zip(pictures.tolist(), targets, strict=True):
        row = [
            scale
            * sum(a * b for a, b in zip(picture, prompt, strict=True))
            / math.hypot(*picture)
            / math.hypot(*prompt)
            for prompt in prompts.tolist()
        ]
        found.append(oracles.OUTPUTS[against](row, int(target)))
    return found


@dataclass
class Embedded:
    """What models return that embed pictures."""

    image_embeds: object


@pytest.mark.parametrize("against", ["logsumexp", "largest"])
def test_zero_shot_margin_is_that_of_plain_loops(against):
    pictures, prompts = torch.randn(9, 6) * 3, torch.randn(4, 6) * 2
    targets = torch.arange(9) % 4
    function = coar.ZeroShotMargin(prompts=prompts, scale=20.0, against=against)
    expected = zero_shot(pictures, prompts, targets, 20.0, against)
    for result in (Embedded(pictures), {"image_embeds": pictures}):
        np.testing.assert_allclose(function(result, targets), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(function(Embedded(pictures), targets), expected, rtol=1e-4, atol=1e-4)
    live = pictures.clone().requires_grad_()
    function(Embedded(live), targets).sum().backward()
    assert (live.grad.abs().sum(1) > 0).all()


def test_zero_shot_margin_is_identified_by_its_prompts():
    prompts = torch.randn(4, 6)
    other = prompts.clone()
    other[3, 5] += 1e-3
    every = [coar.ZeroShotMargin(prompts=prompts), coar.ZeroShotMargin(prompts=other)]
    every += [coar.ZeroShotMargin(prompts=prompts, scale=1.0), coar.ZeroShotMargin(prompts=prompts, against="largest")]
    assert len({tuple(function.settings().items()) for function in every}) == 4
    assert coar.ZeroShotMargin(prompts=prompts * 2).settings() == every[0].settings()  # lengths do not matter


@pytest.mark.parametrize(
    "prompts", [torch.randn(6), torch.randn(1, 6), torch.zeros(3, 6), torch.ones(3, 6).long(), [1]]
)
def test_prompts_that_are_no_embeddings(prompts):
    with pytest.raises(SettingsError, match="prompts"):
        coar.ZeroShotMargin(prompts=prompts)


@pytest.mark.parametrize(
    ("result", "targets", "message"),
    [
        (torch.zeros(2, 6), [0, 1], "returned no image_embeds in a Tensor"),
        ({"logits": torch.zeros(2, 6)}, [0, 1], "no image_embeds in a dict"),
        (
            Embedded(torch.zeros(2, 5)),
            [0, 1],
            r"image_embeds \(2, 5\) in a Embedded; .* \(examples, 6\), as wide as",
        ),
        (Embedded(torch.zeros(2, 3, 6)), [0, 1], r"\(2, 3, 6\)"),
        (Embedded(torch.ones(2, 6)), [0, 4], "label 4 is outside the model's 4 classes"),
        (Embedded(torch.ones(2, 6)), [0], r"\(2, 4\) and the targets \(1,\)"),
    ],
)
def test_what_holds_no_embeddings_of_pictures_is_an_error(result, targets, message):
    with pytest.raises(OutputError, match=message):
        coar.ZeroShotMargin(prompts=torch.randn(4, 6))(result, torch.tensor(targets))


OWN = {
    "a column": lambda logits: logits[:, :1],
    "all": lambda logits: logits,
    "a mean over examples": lambda logits: logits.mean(),
    "the first": lambda logits: logits[:1, 0],
    "too few": lambda logits: logits[:-1, 0],
    "a plain number": lambda logits: 1.0,
    "complex numbers": lambda logits: logits[:, 0].to(torch.complex64),
    "an array": lambda logits: logits[:, 0].detach().numpy(),
}


class Own(Output):
    """An output of a user's own."""

    kind: str

    def __call__(self, result, targets):
        return OWN[self.kind](result)


@pytest.mark.parametrize("passes", ["masks", "gradients"])
@pytest.mark.parametrize("kind", OWN)
def test_what_is_not_one_number_per_example_is_an_error_and_no_run(kind, passes, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    examples = coar.Examples(inputs=torch.randn(5, 4), targets=torch.tensor([0, 1, 2, 0, 1]))
    study = coar.Study(model=net, examples=examples, components=coar.neurons(net), output=Own(kind=kind))
    message = r"Own returned (.* for \d examples; .* return one number per example|.*complex64 numbers; real ones)"
    with pytest.raises(OutputError, match=message):
        coar.collect(study, tmp_path / "run.zarr", device="cpu", progress=False, **{passes: 4})
    assert not (tmp_path / "run.zarr").exists()
