"""Logits only where they are read: the same outputs and gradients as of all logits, and when it is not done."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import coar
from coar.forward.copies import device_copy
from coar.forward.execution_plan import ExecutionPlan
from coar.forward.logit_positions import select_positions
from coar.forward.runner import FastRunner, ReferenceRunner
from coar.gates.gates import Gates
from coar.outputs.base import Output
from tests.tiny import GPT2, TEXT, lively

WORDS, LENGTH, ANSWERS = 50, 9, (3, 17, 41)
CPU = torch.device("cpu")
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2, head_dim=8)),
}
OUTPUTS = {
    "last token": coar.TokenMargin(reduction="last"),
    "continuation": coar.TokenLogProbability(reduction="sum"),
    "answer": coar.ChoiceMargin(answers=ANSWERS),
    "difference": coar.LogitDifference(),
}
MOST = {"last token": 1, "continuation": 3, "answer": 1, "difference": 1}  # positions that get logits


def examples(kind, side, count=6):
    """Texts of different lengths, padded on one side, with the targets that an output reads."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(1, WORDS, (count, LENGTH), generator=draw)
    lengths = 5 + torch.arange(count) % 5
    places = torch.arange(LENGTH).expand(count, -1)
    mask = (places >= LENGTH - lengths[:, None] if side == "left" else places < lengths[:, None]).long()
    tokens = {"input_ids": ids * mask, "attention_mask": mask}
    answers = torch.tensor(ANSWERS).repeat(count)[:count] if kind in ("answer", "difference") else None
    wrong = [[5, 9][: 1 + i % 2] for i in range(count)] if kind == "difference" else None
    found = coar.token_examples(tokens, answers=answers, wrong=wrong)
    if kind == "continuation":  # of two tokens, or three
        ends = (found.targets != -100) & (found.targets.flip(1) != -100).cumsum(1).flip(1).le(2 + lengths[:, None] % 2)
        found = coar.Examples(inputs=found.inputs, targets=found.targets.where(ends, -100))
    return found


def study(name="gpt2", kind="answer", side="right", *, head=False, model=None):
    """A study of feed-forward neurons and heads, of the vocabulary's product too where that is asked for."""
    net = lively((model or MODELS[name])())
    include = {"gpt2": "*.mlp.c_proj", "llama": "*.mlp.down_proj"}[name]
    components = coar.attention_heads(net) + coar.input_features(net, include=[include, *["lm_head"] * head])
    return coar.Study(model=net, examples=examples(kind, side), components=components, output=OUTPUTS[kind])


def worker(study, **options):
    zeros = torch.zeros(study.components.width)
    return FastRunner(device_copy(study.model, CPU), study.components, zeros, study.output, **options)


def hooks(study, model):
    return Gates(model, study.components, torch.zeros(study.components.width), use_hooks=True)


def masks_of(study, count=5):
    return study.sampler.masks("train", range(count), len(study.components))


def every_logit(study, model, masks):
    """(masks, examples) outputs read off logits of all positions, under gates in hooks."""
    rows = []
    with torch.no_grad(), hooks(study, model) as gates:
        for mask in torch.from_numpy(masks):
            gates.set(mask)
            rows.append(study.output(model(**study.examples.inputs), study.examples.targets))
    return torch.stack(rows).numpy()


def positions_of(block):
    """How many positions get logits in each batch."""
    return [inputs["logits_to_keep"].shape[1] if "logits_to_keep" in inputs else LENGTH for inputs, _ in block.batches]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_all_logits(name, kind, side):
    asked = study(name, kind, side)
    here, masks, seen = worker(asked, plan=ExecutionPlan(batch_size=4)), masks_of(asked), []
    head = here.model.get_output_embeddings()
    block = here.load(asked.examples, 0, 6)
    assert positions_of(block) == [MOST[kind]] * 2
    head.register_forward_hook(lambda _m, args, _y: seen.append(args[0].shape[1]))
    found = here.outputs(block, masks)
    assert set(seen) == {MOST[kind]}
    np.testing.assert_allclose(found, every_logit(asked, here.model, masks), rtol=1e-4, atol=1e-5)
    assert found.std(0).min() > 1e-3

    kept, ablated, _ = here.mask_gradients(block, masks[:, None], np.zeros(6, dtype=np.int64))
    with hooks(asked, here.model) as gates:
        gates.set(keep := torch.ones(6, len(asked.components), requires_grad=True))
        asked.output(here.model(**asked.examples.inputs), asked.examples.targets).sum().backward()
    np.testing.assert_allclose(here.full_model_gradients(block), keep.grad, rtol=1e-3, atol=1e-5)
    assert np.isfinite(kept).any()
    assert np.isfinite(ablated).any()


def test_several_masks_in_a_pass_get_fewer_logits_too():
    asked = study("gpt2", "continuation", "left")
    here, masks = worker(asked), masks_of(asked)
    block = here.load(asked.examples, 0, 6)
    expected = every_logit(asked, here.model, masks)
    here = here.with_plan(ExecutionPlan(masks_per_forward=3))
    np.testing.assert_allclose(here.outputs(block, masks), expected, rtol=1e-4, atol=1e-5)


def test_resampling_gives_the_same_where_fewer_logits_are_computed():
    asked = study("gpt2", "answer", "left")
    sources = coar.Resample(seed=1).sources
    here, zeros = worker(asked, sources=sources), torch.zeros(asked.components.width)
    plain = ReferenceRunner(here.model, asked.components, zeros, asked.output, sources=sources)
    block, whole = here.load(asked.examples, 0, 6), plain.load(asked.examples, 0, 6)
    assert (positions_of(block), positions_of(whole)) == ([1], [LENGTH])
    masks, zeroed = masks_of(asked), worker(asked)
    found = here.outputs(block, masks)
    np.testing.assert_allclose(found, plain.outputs(whole, masks), rtol=1e-4, atol=1e-5)
    assert np.abs(found - zeroed.outputs(zeroed.load(asked.examples, 0, 6), masks)).max() > 0.01


def test_no_position_is_left_out_that_another_output_reads():
    asked = study("gpt2", "last token")
    whole = coar.Study(**{**asked.__dict__, "output": coar.TokenMargin(), "examples": examples("last token", "right")})
    assert positions_of(worker(whole).load(whole.examples, 0, 6)) == [LENGTH]


class Own(Output):
    """An output that says nothing of where it reads."""

    def __call__(self, result, targets):
        return result.logits.sum((1, 2))


class Askew(GPT2LMHeadModel):
    """Takes the first positions whatever it is asked for."""

    def forward(self, *args, logits_to_keep=0, **kwargs):
        made = super().forward(*args, **kwargs)
        if isinstance(logits_to_keep, torch.Tensor):
            made.logits = made.logits[:, : logits_to_keep.shape[1]]
        return made


class Deaf(Askew):
    """Gives all logits whatever it is asked for."""

    def forward(self, *args, logits_to_keep=0, **kwargs):
        return super().forward(*args, **kwargs)


class Failing(Askew):
    """Takes numbers alone, as older models do."""

    def forward(self, *args, logits_to_keep: int = 0, **kwargs):
        return super().forward(*args, logits_to_keep=None if logits_to_keep == 0 else logits_to_keep, **kwargs)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("own output", ""),
        ("head", "components receive or return tensors of other sizes"),
        (Askew, "outputs differ by"),
        (Deaf, "outputs differ by"),
        (Failing, "only where they are read is not used: the model fails"),
    ],
    ids=["own output", "head", "askew", "deaf", "failing"],
)
def test_all_logits_are_computed_where_some_would_not_do(case, said, caplog):
    caplog.set_level(logging.INFO, logger="coar")
    made = None if isinstance(case, str) else lambda: case(GPT2Config(**GPT2))
    asked = study("gpt2", "answer", head=case == "head", model=made)
    if case == "own output":
        asked = coar.Study(**{**asked.__dict__, "output": Own()})
    here, masks = worker(asked), masks_of(asked)
    block = here.load(asked.examples, 0, 6)
    assert positions_of(block) == [LENGTH]
    np.testing.assert_allclose(here.outputs(block, masks), every_logit(asked, here.model, masks), rtol=1e-4, atol=1e-5)
    assert said in caplog.text
    assert not any(module._forward_hooks for module in here.model.modules())


def test_a_text_without_a_target_is_an_error():
    asked = study()
    targets = asked.examples.targets.clone()
    targets[4] = -100
    bad = coar.Examples(inputs=asked.examples.inputs, targets=targets)
    here = worker(asked)
    with pytest.raises(coar.errors.OutputError, match="example 4 of this batch has no token to read"):
        here.outputs(here.load(bad, 0, 6), masks_of(asked))


def test_rows_are_filled_up_with_positions_that_are_not_read():
    targets = torch.tensor([[5, -100, 7, -100], [8, -100, -100, 9]])
    read = torch.tensor([[True, False, True, False], [False, False, False, True]])
    inputs, less = select_positions({"input_ids": torch.zeros(2, 4)}, targets, read)
    assert inputs["logits_to_keep"].tolist() == [[0, 2], [3, 0]]
    assert less.tolist() == [[5, 7], [9, -100]]


class Bare(nn.Module):
    """Has no such argument."""

    def __init__(self):
        super().__init__()
        self.gpt = GPT2LMHeadModel(GPT2Config(**GPT2))

    def forward(self, input_ids, attention_mask):
        return self.gpt(input_ids, attention_mask=attention_mask)


def test_a_model_without_the_argument_is_not_asked():
    asked = study(model=Bare)
    here = worker(asked)
    assert positions_of(here.load(asked.examples, 0, 6)) == [LENGTH]
