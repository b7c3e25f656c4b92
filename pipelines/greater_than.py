"""Greater-than: a year after the year named, on SmolLM2-135M or a language model of your own.

    coar collect pipelines/greater_than.py --ablation counterfactual --gradients 32

    export COAR_LANGUAGE_MODEL=/path/to/model   # optional: a folder, or a name on the hub of Hugging Face
    export COAR_PROMPTS_COMPONENTS=heads        # optional: attention heads, or nodes, instead of edges

The task is that of Hanna et al. (2023, "How does GPT-2 compute greater-than?"): "The war lasted from the year 1732 to
the year 17" is followed by a number above 32. A tokenizer of single digits, such as SmolLM2's, has the tens next:
answers are digits above 3, wrong answers those below. Where 32 is one token, as in GPT-2, answers are the two-digit
numbers above it. The output is the mean logit of the answers less that of the wrong answers.

The published counterfactual has the year 1701, which no year of its century comes before. Here both prompts of a pair
are prompts of the task: one year is in the first half of its century and the other in the second half. Only pairs of
which the model gets both prompts right are used. Prompts for judging have nouns of their own.
"""

import random
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

import coar
from pipelines import language_model, prompts

GRADIENTS, TEST_MASKS = 32, 50

NOUNS = """
    war siege expedition dispute plague voyage reign rule marriage rivalry campaign conflict project journey trial
    dynasty kingdom epidemic investigation tradition construction captivity friendship invasion alliance competition
    decline expansion insurgency partnership practice quest relationship riot romance sanctions strike study tour treaty
"""
CENTURIES = range(11, 18)
PAIRS = {"studied": 32, "calibration": 32, "learning": 128, "judge": 32}  # of prompts that the model gets right
SPARE = 2  # pairs tried for one that is used
Part = Literal["studied", "calibration", "learning", "judge"]
Continuations = tuple[list[str], list[str]]  # right and wrong ones


def pairs(part: Part, tokenizer: Any) -> list[prompts.Pair]:
    """Return pairs of prompts; those for judging have other nouns than the others."""
    after = continuations_of(tokenizer)
    nouns = NOUNS.split()[part == "judge" :: 2]
    draw = random.Random(f"greater-than {part}")  # noqa: S311
    found = []
    for _ in range(SPARE * PAIRS[part]):
        noun, century = draw.choice(nouns), draw.choice(CENTURIES)
        tens, ones = draw.randint(1, 4), draw.randint(0, 9)
        early, late = (10 * t + ones for t in (tens, tens + 4))
        found.append((prompt(noun, century, early, after), prompt(noun, century, late, after)))
    return found


def prompt(noun: str, century: int, year: int, after: Callable[[int], Continuations]) -> prompts.Prompt:
    """Return the prompt with a year of a century."""
    start = f"The {noun} lasted from the year {century}{year}"
    answers, wrong = after(year)
    text = f"{start} to the year {century}"
    return prompts.Prompt(text=text, answers=answers, wrong=wrong, positions={"year": len(start)})


def continuations_of(tokenizer: Any) -> Callable[[int], Continuations]:
    """Return what gives right and wrong next tokens after a century, for the two last digits of the first year.

    Raises:
        PipelineError: When the tokenizer cuts years into neither single digits nor a century and a two-digit number.
    """
    tokens = tokenizer.encode("the year 1732", add_special_tokens=False)
    pieces = [tokenizer.decode([token]).strip() for token in tokens]
    if pieces[-4:] == ["1", "7", "3", "2"]:
        return digits
    if pieces[-2:] == ["17", "32"]:
        known = set(prompts.single_tokens([f"{number:02d}" for number in range(100)], tokenizer))
        return lambda year: numbers(year, known)
    raise coar.errors.PipelineError(
        f"the tokenizer cuts the year 1732 into {pieces[2:]}; set COAR_LANGUAGE_MODEL to a model that has single "
        f"digits, or 17 and 32"
    )


def digits(year: int) -> Continuations:
    """Return the tens above and below those of a year; equal ones depend on the digit after."""
    tens = year // 10
    return [str(digit) for digit in range(tens + 1, 10)], [str(digit) for digit in range(tens)]


def numbers(year: int, known: set[str]) -> Continuations:
    """Return the known two-digit numbers above and below a year."""
    above, below = ([f"{number:02d}" for number in span] for span in (range(year + 1, 100), range(year)))
    return [number for number in above if number in known], [number for number in below if number in known]


def examples(part: Part, net: nn.Module) -> coar.Examples:
    """Return the prompts of a part that the model gets right."""
    tokenizer = language_model.tokenizer()
    made = prompts.examples_of(pairs(part, tokenizer), tokenizer)
    return prompts.right_pairs(net, made, most=PAIRS[part], what="greater-than")


def study(*, ablation: str = "counterfactual", ablated_fraction: float = 0.02, seed: int = 0) -> coar.Study:
    """Define the study of 64 prompts; constants are computed on 64 other prompts with the same nouns."""
    net = language_model.model()
    sampler = coar.BernoulliSampler(ablated_fraction=ablated_fraction, seed=seed)
    return prompts.study_of(net, examples("studied", net), examples("calibration", net), ablation, sampler)


def learning() -> coar.Examples:
    """Return the prompts that circuits are found on: more than those studied, since constants are trained on them."""
    return examples("learning", language_model.model())


def judge() -> coar.Examples:
    """Return prompts with other nouns, which no attribution has seen."""
    return examples("judge", language_model.model())


def tokenizer() -> Any:
    """Return the model's tokenizer, which shows texts in words on a page."""
    return language_model.tokenizer()
