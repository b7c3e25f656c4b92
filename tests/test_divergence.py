"""The divergence from the unablated model against sums over plain numbers, in runs and as a loss; and bad input."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import coar
from coar.errors import OutputError
from coar.forward.runner import FastRunner, ReferenceRunner
from tests import oracles
from tests.faults.helpers import grouped
from tests.tiny import lively

WORDS = 11
TEXTS = [[7, 3, 9, 4, 1], [5, 8], [2, 2, 6, 10], [1, 5, 3], [9, 9]]
REDUCTIONS = ["mean", "sum", "last"]


def padded(side):
    """The texts with padding on one side, by hand."""
    rows, mask = [], []
    for text in TEXTS:
        gap = [6] * (5 - len(text))
        rows.append([*gap, *text] if side == "left" else [*text, *gap])
        mask.append([0] * len(gap) + [1] * len(text) if side == "left" else [1] * len(text) + [0] * len(gap))
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def probabilities(row):
    """The softmax of a list of logits."""
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    return [weight / sum(weights) for weight in weights]


def divergence(expected, found):
    """The divergence of the second logits' probabilities from the first's, term by term."""
    return sum(
        q * (math.log(q) - math.log(p)) for q, p in zip(probabilities(expected), probabilities(found), strict=True)
    )


def of_texts(model, ablated, reduction):
    """What is read of each text alone: every position but the last has a next token."""
    values = []
    for text in TEXTS:
        with torch.no_grad():
            pair = [net(torch.tensor([text])).logits[0, :-1].tolist() for net in (model, ablated)]
        terms = [divergence(*rows) for rows in zip(*pair, strict=True)]
        values.append({"mean": sum(terms) / len(terms), "sum": sum(terms), "last": terms[-1]}[reduction])
    return values


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager", "use_cache": False}
    net = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=WORDS, n_positions=8, **ends)).eval()
    return lively(net)


def study_of(model, side="right", reduction="mean"):
    return coar.Study(
        model=model,
        examples=coar.token_examples(padded(side)),
        components=coar.input_features(model, exclude="lm_head"),
        output=coar.KLDivergence(reduction=reduction),
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_outputs_of_a_run_are_those_of_single_texts(gpt2, side, reduction, tmp_path):
    """In several units, of which a later call does some; the unablated model has none."""
    study = study_of(gpt2, side, reduction)
    sizes = grouped({"mask_block": 2, "example_block": 2, "batch_size": 2, "device": "cpu", "progress": False})
    coar.collect(study, tmp_path / "run.zarr", masks=2, **sizes)
    run = coar.collect(study, tmp_path / "run.zarr", masks=3, gradients=4, **sizes)
    np.testing.assert_allclose(run.array("base_output")[:], 0, atol=1e-6)
    masks, stored = run.masks(0, 3), run.array("outputs")[:]
    for mask, found in zip(masks, stored, strict=True):
        gone = [(c.site, c.position) for c, kept in zip(study.components, mask, strict=True) if not kept]
        expected = of_texts(gpt2, oracles.features_zeroed(gpt2, gone), reduction)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert stored.min() > 1e-3


def test_short_texts_lose_their_padding():
    """Batches by length, with the outputs of plain passes; a cut is confirmed by logits, since all outputs are 0."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([3, 40] * 20)
    mask = (torch.arange(40) < lengths[:, None]).long()
    ids = torch.randint(1, WORDS, mask.shape, generator=draw) * mask
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager", "use_cache": False}
    net = lively(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=WORDS, n_positions=40, **ends)))
    examples = coar.token_examples({"input_ids": ids, "attention_mask": mask})
    parts = net, coar.input_features(net, exclude="lm_head"), torch.zeros(112), coar.KLDivergence()
    fast, plain = FastRunner(*parts), ReferenceRunner(*parts)
    masks = coar.BernoulliSampler(ablated_fraction=0.2).masks("train", range(2), len(parts[1]))
    block = fast.load(examples, 0, 40)
    assert [inputs["input_ids"].shape[1] for inputs, _ in block.batches] == [3, 40]
    assert not fast.fallbacks
    expected = plain.outputs(plain.load(examples, 0, 40), masks)
    np.testing.assert_allclose(fast.outputs(block, masks), expected, rtol=1e-3, atol=1e-5)
    assert expected.min() > 1e-4


def test_two_workers_store_what_one_does(gpt2, tmp_path):
    sizes = grouped({"mask_block": 2, "example_block": 2, "device": "cpu", "progress": False})
    one = coar.collect(study_of(gpt2), tmp_path / "one.zarr", masks=4, gradients=2, **sizes)
    for worker in ((1, 2), (2, 2)):
        two = coar.collect(study_of(gpt2), tmp_path / "two.zarr", masks=4, gradients=2, worker=worker, **sizes)
    for name in ("outputs", "gradient_outputs"):
        np.testing.assert_allclose(two.array(name)[:], one.array(name)[:], rtol=1e-4, atol=1e-5)


def test_the_gradient_by_logits_is_the_difference_of_probabilities():
    examples = coar.token_examples(padded("right"))
    plain, logits = torch.randn(5, 5, WORDS), torch.randn(5, 5, WORDS).requires_grad_()
    output = coar.KLDivergence()
    output(logits, output.reference(plain, examples.targets)).sum().backward()
    expected = torch.zeros(5, 5, WORDS)
    for row, text in enumerate(TEXTS):
        read = len(text) - 1
        expected[row, :read] = (logits[row, :read].softmax(1) - plain[row, :read].softmax(1)).detach() / read
    torch.testing.assert_close(logits.grad, expected)


def test_a_classifier(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    x = torch.randn(7, 6)
    examples = coar.Examples(inputs=x, targets=torch.zeros(7, dtype=torch.long))
    features = coar.input_features(net)
    study = coar.Study(model=net, examples=examples, components=features, output=coar.KLDivergence())
    run = coar.collect(study, tmp_path / "run.zarr", masks=3, device="cpu", progress=False)
    for mask, found in zip(run.masks(0, 3), run.array("outputs")[:], strict=True):
        gone = [(c.site, c.position) for c, kept in zip(features, mask, strict=True) if not kept]
        pairs = zip(net(x).tolist(), oracles.features_zeroed(net, gone)(x).tolist(), strict=True)
        np.testing.assert_allclose(found, [divergence(*pair) for pair in pairs], rtol=1e-3, atol=1e-5)


class Cost(coar.Output):
    """The same divergence from log-probabilities that are the targets."""

    def __call__(self, result, targets):
        return (targets.exp() * (targets - result.log_softmax(1))).sum(1)


def test_as_a_loss_it_needs_no_targets():
    """Optimal constants are those of a loss that is given the unablated log-probabilities as targets."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    x = torch.randn(40, 6)
    features = coar.input_features(net)
    found = []
    for loss, targets in (
        (coar.KLDivergence(), torch.zeros(40, dtype=torch.long)),
        (Cost(), net(x).detach().log_softmax(1)),
    ):
        examples = coar.Examples(inputs=x, targets=targets)
        optimal = coar.Optimal(calibration=examples, loss=loss, steps=30, examples_per_step=16)
        found.append(optimal.replacements(net, features, batch_size=16))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_what_a_block_keeps_is_within_the_memory_limit(gpt2, tmp_path):
    """Each of 200 texts keeps 1,000 numbers of four bytes, so 25 of them take 100 kB."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1_000)).eval()
    examples = coar.Examples(inputs=torch.randn(200, 3), targets=torch.zeros(200, dtype=torch.long))
    features = coar.input_features(net)
    for output, expected in ((coar.KLDivergence(), 25), (coar.CrossEntropy(), 200)):
        study = coar.Study(model=net, examples=examples, components=features, output=output)
        place = tmp_path / f"{expected}.zarr"
        limited = grouped({"memory_limit": 100_000, "device": "cpu", "progress": False})
        assert coar.collect(study, place, masks=2, **limited).blocks[1] == expected


def test_small_divergences_are_exact():
    """Changes of logits by a ten-thousandth, in double precision by the formula."""
    plain = torch.randn(6, 9)
    moved = plain + 1e-4 * torch.randn(6, 9)
    output = coar.KLDivergence()
    found = output(moved, output.reference(plain, torch.zeros(6, dtype=torch.long)))
    expected = [divergence(*rows) for rows in zip(plain.tolist(), moved.tolist(), strict=True)]
    assert max(expected) < 1e-7
    np.testing.assert_allclose(found, expected, rtol=1e-2)


def test_large_differences_do_not_overflow():
    plain, moved = torch.tensor([[0.0, -200.0, -50.0]]), torch.tensor([[-200.0, 0.0, 0.0]]).requires_grad_()
    output = coar.KLDivergence()
    value = output(moved, output.reference(plain, torch.zeros(1, dtype=torch.long)))
    assert float(value.detach()) == pytest.approx(200 + math.log(2))
    value.sum().backward()
    torch.testing.assert_close(moved.grad, torch.tensor([[-1.0, 0.5, 0.5]]))


class Change(coar.RelativeOutput):
    """How far the first logit moves."""

    def reference(self, result, targets):
        return result[:, 0]

    def __call__(self, result, targets):
        return result[:, 0] - targets


def test_an_output_of_ones_own(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    x = torch.randn(7, 6)
    examples = coar.Examples(inputs=x, targets=torch.zeros(7))
    features = coar.input_features(net)
    study = coar.Study(model=net, examples=examples, components=features, output=Change())
    run = coar.collect(study, tmp_path / "run.zarr", masks=2, device="cpu", progress=False)
    gone = [(c.site, c.position) for c, kept in zip(features, run.masks(0, 1)[0], strict=True) if not kept]
    expected = oracles.features_zeroed(net, gone)(x)[:, 0] - net(x)[:, 0]
    np.testing.assert_allclose(run.array("outputs")[0], expected.detach(), rtol=1e-4, atol=1e-5)


def test_impossible_tokens_add_nothing():
    plain, found = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[1.0, 1.0, 0.0]])
    output = coar.KLDivergence()
    value = output(found, output.reference(plain, torch.zeros(1, dtype=torch.long)))
    q, p = probabilities([0.0, 1.0]), probabilities([1.0, 1.0, 0.0])
    assert float(value) == pytest.approx(sum(a * math.log(a / b) for a, b in zip(q, p[:2], strict=True)), rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3, WORDS), torch.tensor([[1, 1, 1], [-100, -100, -100]]), "example 1 of this batch has no pos"),
        (torch.zeros(2, 3, WORDS), torch.tensor([1, 2]), r"\(2, 3, 11\) and the targets \(2,\)"),
        (torch.zeros(2, WORDS), torch.tensor([1, 2, 3]), r"\(2, 11\) and the targets \(3,\)"),
        (torch.zeros(2), torch.tensor([1, 2]), r"\(2,\) and the targets \(2,\)"),
    ],
)
def test_a_reference_that_does_not_fit(logits, targets, message):
    with pytest.raises(OutputError, match=message):
        coar.KLDivergence().reference(logits, targets)


@pytest.mark.parametrize("targets", [torch.tensor([[1, 2, -100]]), torch.zeros(1, 2, WORDS)])
def test_targets_that_are_no_reference(targets):
    with pytest.raises(OutputError, match=r"give KLDivergence what its reference\(result, targets\) returned"):
        coar.KLDivergence()(torch.zeros(1, 3, WORDS), targets)
