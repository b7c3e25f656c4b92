"""Indirect object identification: which of two names comes next, on SmolLM2-135M or a language model of your own.

    coar collect pipelines/ioi.py --ablation counterfactual --gradients 32

    export COAR_LANGUAGE_MODEL=/path/to/model   # optional: a folder, or a name on the hub of Hugging Face
    export COAR_PROMPTS_COMPONENTS=heads        # optional: attention heads, or nodes, instead of edges

The task is that of Wang et al. (2023, "Interpretability in the wild"): "When Mary and John went to the store, John gave
a drink to" is followed by Mary. Both prompts of a pair differ in the name that is repeated, so the answer of one is the
wrong answer of the other; each is the other's counterfactual. The output is the logit difference of both names. Only
pairs of which the model gets both prompts right are used. Prompts for judging have names of their own.
"""

import random
import re
from typing import Any, Literal

from torch import nn

import coar
from pipelines import language_models, prompts

GRADIENTS, TEST_MASKS = 32, 50

TEMPLATES = (  # of Wang et al. (2023); {b} is repeated and {a} is the answer
    "Then, {first} and {second} went to the {place}. {b} gave a {object} to",
    "Then, {first} and {second} had a lot of fun at the {place}. {b} gave a {object} to",
    "Then, {first} and {second} were working at the {place}. {b} decided to give a {object} to",
    "Then, {first} and {second} were thinking about going to the {place}. {b} wanted to give a {object} to",
    "Then, {first} and {second} had a long argument, and afterwards {b} said to",
    "After {first} and {second} went to the {place}, {b} gave a {object} to",
    "When {first} and {second} got a {object} at the {place}, {b} decided to give it to",
    "While {first} and {second} were working at the {place}, {b} gave a {object} to",
    "While {first} and {second} were commuting to the {place}, {b} gave a {object} to",
    "After the lunch, {first} and {second} went to the {place}. {b} gave a {object} to",
    "Friends {first} and {second} found a {object} at the {place}. {b} gave it to",
)
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
OBJECTS = ("ring", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack")
NAMES = """
    Mary John Tom James Dan Martin Amy Emma Anna Paul Mark Laura Sarah Kate Peter David Michael Alice Robert Susan Jack
    Lisa Emily Jennifer Jessica William Henry George Charles Thomas Daniel Matthew Andrew Joseph Kevin Brian Jason Eric
    Adam Ryan Alex Max Sam Ben Luke Rachel Julia Jane Grace Helen Claire Lucy Rose Ruth Maria Carol Simon Scott Frank
"""
PAIRS = {"studied": 32, "calibration": 32, "judge": 32}  # of prompts, after those that the model gets wrong
FEWEST_NAMES = 8
SPARE = 1.5  # pairs tried for one that is used
Part = Literal["studied", "calibration", "judge"]


def pairs(part: Part, tokenizer: Any) -> list[prompts.Pair]:
    """Return pairs of prompts; those for judging have other names than the others."""
    names = prompts.single_tokens([f" {name}" for name in NAMES.split()], tokenizer)
    if len(names) < FEWEST_NAMES:
        raise coar.errors.PipelineError(
            f"{len(names)} names are single tokens and {FEWEST_NAMES} are needed; set COAR_LANGUAGE_MODEL to another "
            f"model"
        )
    own = names[1::2] if part == "judge" else names[::2]
    draw = random.Random(f"ioi {part}")  # noqa: S311
    found = []
    for number in range(round(SPARE * PAIRS[part])):
        first, second = (name[1:] for name in draw.sample(own, 2))
        words = {"first": first, "second": second, "place": draw.choice(PLACES), "object": draw.choice(OBJECTS)}
        template = TEMPLATES[number % len(TEMPLATES)]
        found.append((prompt(template, words, second, first), prompt(template, words, first, second)))
    return found


def prompt(template: str, words: dict[str, str], b: str, a: str) -> prompts.Prompt:
    """Return the prompt that repeats name b, and is followed by name a."""
    before, after = template.split("{b}")
    start = before.format(**words)
    ends = {found.group(): found.end() for found in re.finditer(rf"\b({a}|{b})\b", start)}
    return prompts.Prompt(
        text=start + b + after.format(**words),
        answers=[f" {a}"],
        wrong=[f" {b}"],
        positions={"answer": ends[a], "subject": ends[b], "subject_again": len(start + b)},
    )


def examples(part: Part, net: nn.Module) -> coar.Examples:
    """Return the prompts of a part that the model gets right."""
    tokenizer = language_models.tokenizer()
    made = prompts.examples_of(pairs(part, tokenizer), tokenizer)
    return prompts.right_pairs(net, made, most=PAIRS[part], what="IOI")


def study(*, ablation: str = "counterfactual", ablated_fraction: float = 0.02, seed: int = 0) -> coar.Study:
    """Define the study of 64 prompts; constants are computed on 64 other prompts with the same names."""
    net = language_models.model()
    sampler = coar.BernoulliSampler(ablated_fraction=ablated_fraction, seed=seed)
    return prompts.study_of(net, examples("studied", net), examples("calibration", net), ablation, sampler)


def judge() -> coar.Examples:
    """Return prompts with other names, which no attribution has seen."""
    return examples("judge", language_models.model())


def tokenizer() -> Any:
    """Return the model's tokenizer, which shows texts in words on a page."""
    return language_models.tokenizer()
