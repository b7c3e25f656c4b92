"""Whether causal tracing finds the layer that holds a fact: facts are taught to the MLP of one layer of a small GPT-2.

    python -m benchmarks.tracing_truth
    python -m benchmarks.tracing_truth --base facts

A GPT-2 of six layers learns to read sentences about people, and then a copy learns where sixty people live and what
they do, by training the MLP of layer k alone, for every k. A trace of these facts is right at a place if it ranks the
MLP of layer k first among the MLPs there. Effects are of facts that no constant was trained on.

There are two kinds of bases. `form` knows no facts: the last word of its sentences is drawn anew every time, a city or
job, or one of the names. So it has the names at hand where the answer is predicted, and nothing but the MLP of layer k
can recall a fact. `facts` has learned facts about four hundred other people, so its other MLPs have parts in recalling
facts: those before layer k tell people apart, and those after it raise an answer that is there.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import coar

LAYERS, WIDTH, HEADS = 6, 96, 4
FIRST_NAMES = LAST_NAMES = 40
CITIES, JOBS = 20, 20
START, LIVES, IN, WORKS, AS = range(5)
NAMES = 5
PLACES = NAMES + FIRST_NAMES + LAST_NAMES
TASKS = PLACES + CITIES
WORDS = TASKS + JOBS
TAUGHT = range(LAYERS)
CORRUPTIONS = ("optimal", "noise", "mean", "resample", "optimal, one per cell")
PLACES_RESTORED = ("subject", "last", "all")
BATCH, RATE = 128, 1e-3
ENOUGH = 0.02  # loss at which training ends
Draw = Callable[[torch.Generator], Tensor]  # the sentences of a step


def people(count: int, seed: int, but: set[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
    """Return people with names of two tokens, each different from the others and from those in `but`."""
    pairs = [(a, b) for a in range(FIRST_NAMES) for b in range(LAST_NAMES) if (a, b) not in (but or set())]
    order = np.random.default_rng(seed).permutation(len(pairs))[:count]
    return [(NAMES + pairs[i][0], NAMES + FIRST_NAMES + pairs[i][1]) for i in order]


def sentences(who: list[tuple[int, int]], seed: int) -> Tensor:
    """Return (2 * people, 6) tokens: where each lives, and what each works as."""
    generator, rows = np.random.default_rng(seed), []
    for first, last in who:
        rows.append([START, first, last, LIVES, IN, PLACES + int(generator.integers(CITIES))])
        rows.append([START, first, last, WORKS, AS, TASKS + int(generator.integers(JOBS))])
    return torch.tensor(rows)


def some_of(data: Tensor) -> Draw:
    """Return what draws a batch of these sentences."""
    return lambda generator: data[torch.randint(len(data), (BATCH,), generator=generator)]


def without_facts(generator: torch.Generator) -> Tensor:
    """Return a batch of sentences that end in a random city or job, or in one of their names."""

    def draw(first: int, count: int) -> Tensor:
        return first + torch.randint(count, (BATCH,), generator=generator)

    first, last = draw(NAMES, FIRST_NAMES), draw(NAMES + FIRST_NAMES, LAST_NAMES)
    relation = draw(0, 2)  # to a city, or to a job
    random = torch.stack([draw(PLACES, CITIES), draw(TASKS, JOBS)])[relation, torch.arange(BATCH)]
    answer = torch.stack([random, first, last])[draw(0, 3), torch.arange(BATCH)]
    start, words = torch.full((BATCH,), START), torch.tensor([[LIVES, IN], [WORKS, AS]])[relation]
    return torch.column_stack([start, first, last, words, answer])


def train(model: nn.Module, draw: Draw, parameters: list[nn.Parameter], *, steps: int) -> None:
    """Train some parameters to predict the last word of sentences, until its loss is small."""
    adam, generator = torch.optim.Adam(parameters, lr=RATE), torch.Generator().manual_seed(0)
    model.train().requires_grad_(requires_grad=False)
    for parameter in parameters:
        parameter.requires_grad_()
    for step in range(steps):
        rows = draw(generator)
        loss = nn.functional.cross_entropy(model(rows).logits[:, -2], rows[:, -1])
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 50)
        adam.step()
        if loss < ENOUGH:
            break
    model.eval()


def recalled(model: nn.Module, data: Tensor) -> float:
    """Return the share of sentences whose last word is the model's most probable one."""
    with torch.no_grad():
        return float((model(data).logits[:, -2].argmax(1) == data[:, -1]).float().mean())


def facts_of(data: Tensor) -> coar.Examples:
    """Return sentences without their last word, which is the answer."""
    ids, n = data[:, :-1], len(data)
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return coar.token_examples(
        tokens, answers=data[:, -1], positions={"subject_first": [1] * n, "subject_last": [2] * n}
    )


def base_model(draw: Draw, steps: int, seed: int) -> nn.Module:
    """Return a GPT-2 trained on sentences."""
    torch.manual_seed(seed)
    sizes = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "vocab_size": WORDS, "n_positions": 8}
    nothing = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **nothing, bos_token_id=START, eos_token_id=START, use_cache=False))
    train(model, draw, list(model.parameters()), steps=steps)
    return model


def traced(model: nn.Module, facts: coar.Examples, taught: int, corruption: str) -> list[dict[str, object]]:
    """Return a row per place: the rank of the taught MLP, its effect, and the largest of the others."""
    kind, _, per_cell = corruption.partition(", ")
    start, rows = time.process_time(), []
    cells = {"kinds": ("mlp",), "places": PLACES_RESTORED, "per_cell": bool(per_cell), "progress": False}
    trace = coar.trace(model, facts, corruption=kind, **cells)
    for place, own in trace.table.groupby("place", sort=False):
        best = own.set_index("layer")["aie"].sort_values(ascending=False)
        row = {"taught": taught, "corruption": corruption, "place": place, "first": best.index[0]}
        row |= {"rank": list(best.index).index(taught) + 1, "aie": best[taught], "next": best.drop(taught).max()}
        row |= {"left": trace.per_fact["corrupted"].mean() / trace.per_fact["clean"].mean()}
        rows.append({**row, "seconds": time.process_time() - start})
    return rows


def main() -> None:
    """Train, teach, trace, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=("form", "facts"), default="form")
    parser.add_argument("--people", type=int, default=400, help="people whom the base of facts knows")
    parser.add_argument("--taught", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=TAUGHT)
    parser.add_argument("--corruptions", choices=CORRUPTIONS, nargs="+", default=CORRUPTIONS)
    parser.add_argument("--out", type=Path, default=Path("reports/tracing_truth.csv"))
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        known = people(args.people, seed)
        old = sentences(known, seed)
        base = base_model(without_facts, 800, seed) if args.base == "form" else base_model(some_of(old), 3000, seed)
        but = {(a - NAMES, b - NAMES - FIRST_NAMES) for a, b in known}
        new = sentences(people(args.taught, seed + 100, but), seed + 1)
        for taught in args.layers:
            model = copy.deepcopy(base)
            taught_mlp = list(model.transformer.h[taught].mlp.parameters())
            train(model, some_of(new), taught_mlp, steps=2000)
            share = recalled(model, new)
            for corruption in args.corruptions:
                found = traced(model, facts_of(new), taught, corruption)
                rows += [{"seed": seed, "recalled": share, **row} for row in found]
                print(pd.DataFrame(rows[-len(found) :]).round(3).to_string(header=False), flush=True)
    table = pd.DataFrame(rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False)
    for place, own in table.groupby("place", sort=False):
        print(place)
        ranks = own.pivot_table(index="corruption", columns="taught", values="rank", aggfunc=list, sort=False)
        print(ranks.to_string())


if __name__ == "__main__":
    main()
