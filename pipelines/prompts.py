"""Pairs of prompts for language models: examples with answers and wrong answers, of which a model gets both right."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

import coar

log = logging.getLogger("coar.pipelines")  # the commands show this logger's messages

BATCH = 32  # prompts per pass of the filter


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, and what should follow it.

    Attributes:
        text: The prompt.
        answers: Right continuations of one token each, with the space before them if they have one.
        wrong: Wrong ones.
        positions: Ends of named parts of the text, as numbers of characters.
    """

    text: str
    answers: Sequence[str]
    wrong: Sequence[str]
    positions: Mapping[str, int] = field(default_factory=dict)


KINDS = {"edges": coar.edges, "nodes": coar.nodes, "heads": coar.attention_heads}
Pair = tuple[Prompt, Prompt]  # each the counterfactual of the other


def single_tokens(words: Sequence[str], tokenizer: Any) -> list[str]:
    """Return the words that are one token, in their order."""
    return [word for word in words if len(tokenizer.encode(word, add_special_tokens=False)) == 1]


def examples_of(pairs: Sequence[Pair], tokenizer: Any) -> coar.Examples:
    """Return the prompts of all pairs as examples, with metadata columns `pair` and `text`.

    Raises:
        PipelineError: When a continuation is not one token, both prompts of a pair differ in length, or a named part
            does not end where a token does.
    """
    prompts = [prompt for pair in pairs for prompt in pair]
    texts = [prompt.text for prompt in prompts]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", return_offsets_mapping=True)
    ends = tokens["offset_mapping"][:, :, 1]
    mask = tokens["attention_mask"]
    lengths = mask.sum(1).view(-1, 2)
    unequal = (lengths[:, 0] != lengths[:, 1]).nonzero()
    if len(unequal):
        first, second = pairs[int(unequal[0])]
        raise _unusable(f"{first.text!r} and {second.text!r} have different numbers of tokens")
    positions: dict[str, list[int]] = {}
    for prompt, row, length in zip(prompts, ends.tolist(), mask.sum(1).tolist(), strict=True):
        for name, end in prompt.positions.items():
            if end not in row[:length]:
                raise _unusable(f"in {prompt.text!r} no token ends at character {end}, the end of the {name}")
            positions.setdefault(name, []).append(row.index(end))
    return coar.token_examples(
        {"input_ids": tokens["input_ids"], "attention_mask": mask},
        answers=[_tokens(prompt.answers, tokenizer) for prompt in prompts],
        wrong=[_tokens(prompt.wrong, tokenizer) for prompt in prompts],
        positions=positions,
        metadata={"pair": np.repeat(np.arange(len(pairs)), 2), "text": texts},
    )


def right_pairs(model: nn.Module, examples: coar.Examples, *, most: int, what: str) -> coar.Examples:
    """Return the first pairs of which the model gets both prompts right; the log says how many.

    A prompt is right if the answers' mean logit exceeds that of the wrong answers.

    Args:
        model: The model.
        examples: Pairs, side by side.
        most: The most pairs to return.
        what: The pairs' name in messages.

    Raises:
        PipelineError: When the model gets fewer than two pairs right.
    """
    output, right = coar.LogitDifference(), []
    with torch.inference_mode():
        for start in range(0, len(examples), BATCH):
            inputs, targets = examples.block(start, start + BATCH)
            right.append((output(model(**inputs), targets) > 0).cpu().numpy())
    both = np.concatenate(right).reshape(-1, 2).all(1)
    chosen = np.flatnonzero(both)[:most]
    log.info(
        "the model is right on both prompts of %d of %d pairs of %s; %d of them are used",
        both.sum(),
        len(both),
        what,
        len(chosen),
    )
    if len(chosen) < 2:
        raise _unusable(f"the model is right on both prompts of {both.sum()} of {len(both)} pairs of {what}")
    return examples.subset((2 * chosen[:, None] + [0, 1]).ravel())


def components(model: nn.Module) -> coar.Components:
    """Return the components that COAR_PROMPTS_COMPONENTS names: `edges`, the default, `nodes` or `heads`."""
    kind = os.environ.get("COAR_PROMPTS_COMPONENTS", "edges")
    if kind not in KINDS:
        raise coar.errors.SettingsError(f"COAR_PROMPTS_COMPONENTS is {kind!r}; choose one of {', '.join(KINDS)}")
    return KINDS[kind](model)


def ablation_of(label: str, calibration: coar.Examples) -> coar.Ablation:
    """Return an ablation by its label; optimal constants keep predictions near those of the unablated model."""
    if label == "optimal":
        return coar.Optimal(calibration=calibration, loss=coar.KLDivergence())
    return coar.choose_ablation(label, calibration=calibration)


def study_of(
    model: nn.Module, studied: coar.Examples, calibration: coar.Examples, ablation: str, sampler: coar.BernoulliSampler
) -> coar.Study:
    """Return the study of the logit differences of prompts, by the label of an ablation."""
    return coar.Study(
        model=model,
        examples=studied,
        components=components(model),
        output=coar.LogitDifference(),
        ablation=ablation_of(ablation, calibration),
        sampler=sampler,
    )


def _tokens(words: Sequence[str], tokenizer: Any) -> list[int]:
    found = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    for word, tokens in zip(words, found, strict=True):
        if len(tokens) != 1:
            raise _unusable(f"the answer {word!r} is {len(tokens)} tokens, {tokens}, and one is expected")
    return [tokens[0] for tokens in found]


def _unusable(reason: str) -> coar.CoarError:
    return coar.errors.PipelineError(f"{reason}; set COAR_LANGUAGE_MODEL to another model")
