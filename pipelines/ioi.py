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
from pipelines import language_model, prompts

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
    Aaron Abigail Adam Alan Albert Alex Alexander Alfred Alice Allen Allison Amanda Amelia Amy Andrea Andrew Angela
    Anna Anne Annie Anthony Antonio Arthur Ashley Barbara Barry Ben Benjamin Beth Betty Bill Billy Bob Bobby Brad
    Bradley Brian Bruce Bryan Calvin Cameron Carl Carlos Carol Caroline Catherine Charles Charlie Charlotte Chris
    Christian Christina Christine Christopher Claire Clara Clark Colin Craig Dan Daniel Dave David Deborah Dennis
    Diana Diane Don Donald Dorothy Doug Douglas Edgar Edith Edward Edwin Eleanor Elizabeth Ella Ellen Emily Emma
    Eric Erik Ethan Eugene Eva Florence Frances Francis Frank Franklin Fred Gabriel Gary George Gerald Gordon Grace
    Graham Greg Gregory Hannah Harold Harriet Harry Harvey Heather Helen Henry Holly Howard Hugh Ian Isaac Isabel
    Isabella Ivan Jack Jackie Jacob Jake James Jamie Jane Janet Jason Jay Jean Jeff Jeffrey Jennifer Jenny Jeremy
    Jerry Jesse Jessica Jim Jimmy Joan Joe Joel John Johnny Jonathan Joseph Josh Joshua Joyce Juan Judith Judy Julia
    Julian Julie Justin Karen Karl Kate Katherine Kathleen Katie Keith Kelly Kenneth Kevin Kim Larry Laura Lauren
    Lawrence Leonard Lewis Lily Linda Lisa Logan Louis Louise Lucas Lucy Luis Luke Lynn Marcus Margaret Maria Marie
    Marion Mark Martha Martin Mary Matt Matthew Max Melissa Michael Michelle Miguel Mike Mitchell Molly Monica Nancy
    Naomi Nathan Neil Nicholas Nick Nicole Nina Noah Norman Oliver Olivia Oscar Owen Patricia Patrick Paul Pedro
    Peter Phil Philip Rachel Ralph Raymond Rebecca Richard Rick Robert Roger Ron Ronald Rosa Rose Ross Roy Ruby
    Russell Ruth Ryan Sally Sam Samantha Samuel Sandra Sara Sarah Scott Sean Sebastian Shannon Sharon Shirley Simon
    Sophia Sophie Stanley Stephanie Stephen Steve Steven Stuart Sue Susan Theodore Thomas Tim Timothy Tom Tommy Tony
    Tyler Victor Victoria Vincent Virginia Walter Warren Wayne William
"""
PAIRS = {"studied": 32, "calibration": 32, "learning": 128, "judge": 32}  # of prompts that the model gets right
FEWEST_NAMES = 8
SPARE = 1.5  # pairs tried for one that is used
Part = Literal["studied", "calibration", "learning", "judge"]


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
    tokenizer = language_model.tokenizer()
    made = prompts.examples_of(pairs(part, tokenizer), tokenizer)
    return prompts.right_pairs(net, made, most=PAIRS[part], what="IOI")


def study(*, ablation: str = "counterfactual", ablated_fraction: float = 0.02, seed: int = 0) -> coar.Study:
    """Define the study of 64 prompts; constants are computed on 64 other prompts with the same names."""
    net = language_model.model()
    sampler = coar.BernoulliSampler(ablated_fraction=ablated_fraction, seed=seed)
    return prompts.study_of(net, examples("studied", net), examples("calibration", net), ablation, sampler)


def learning() -> coar.Examples:
    """Return the prompts that circuits are found on: more than those studied, since constants are trained on them."""
    return examples("learning", language_model.model())


def judge() -> coar.Examples:
    """Return prompts with other names, which no attribution has seen."""
    return examples("judge", language_model.model())


def tokenizer() -> Any:
    """Return the model's tokenizer, which shows texts in words on a page."""
    return language_model.tokenizer()
