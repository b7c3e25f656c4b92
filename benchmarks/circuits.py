"""Circuits of a language model by several methods: held-out divergence by the number of edges, at measured cost.

    OMP_NUM_THREADS=1 python benchmarks/circuits.py --task ioi --precision bf16 --tokens 15 --out circuits.csv
    python benchmarks/circuits.py --task induction --methods gradual eap exact ugs hcgs --ablations mean counterfactual

A row is a method, a seed, an ablation and a size. All methods but `random`, `exact` and `acdc` take about as many
gradients: ten for each of `--prompts` learning prompts, which is the cost of EAP-IG with ten steps. EAP, which needs
one gradient per prompt, takes ten times as many prompts where there are as many. UGS and HCGS take `--times` as many
gradients. Constants of every circuit are trained in the same way, with `--constant-steps` steps on the same prompts,
the largest circuit first; each starts from the best of the ablation's constants, those of the method, and those of the
next larger circuit. Ablations by other prompts' activations have none. With `--curves`, CPR and CMD at MIB's ten sizes
follow, without any training. Rows are written as they come, and what a file has is not computed again. Seconds are of
the process.
"""

import argparse
import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import coar

SIZES = (100, 200, 500, 1000, 2000, 5000)
STEPS = 10  # gradients for every prompt
BATCH = 8  # examples per step of gradual pruning
MASKS = 16  # of UGS and HCGS per step: 4 examples under 4 masks


def methods_of(prompts: int, times: int, seed: int, largest: float = 0.8) -> dict[str, dict[str, Any]]:
    """Return the settings of each method."""
    learned = {"examples": 4, "masks": MASKS // 4, "steps": times * STEPS * prompts // MASKS, "seed": seed}
    return {
        "gradual": {
            "first": prompts,
            "steps": (STEPS - 1) * prompts // BATCH,
            "examples": BATCH,
            "largest": largest,
            "seed": seed,
        },
        "eap": {"most": STEPS * prompts},
        "eap_ig": {"steps": STEPS, "most": prompts},
        "random_masks": {"passes": STEPS, "most": prompts, "seed": seed},
        "exact": {},
        "acdc": {},
        "ugs": learned,
        "hcgs": learned,
        "random": {"seed": seed},
    }


def of_length(examples: coar.Examples, most: int) -> coar.Examples:
    """Return the examples of at most so many tokens, without the padding that none of them needs."""
    lengths = examples.inputs["attention_mask"].sum(1)
    chosen = examples.subset(np.flatnonzero((lengths <= most).numpy()))
    width = int(lengths[lengths <= most].max())
    inputs = {name: values[:, :width] for name, values in chosen.inputs.items()}
    return coar.Examples(inputs=inputs, targets=chosen.targets[:, :width], metadata=chosen.metadata)


def shuffled(examples: coar.Examples, seed: int) -> coar.Examples:
    """Return examples in another order, with pairs side by side."""
    pairs = np.random.default_rng(seed).permutation(len(examples) // 2)
    return examples.subset((2 * pairs[:, None] + [0, 1]).ravel())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="ioi", help="a pipeline: ioi, greater_than or induction")
    parser.add_argument("--methods", nargs="+", default=["gradual", "eap", "eap_ig", "random_masks", "random"])
    parser.add_argument("--ablations", nargs="+", default=["mean"])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--prompts", type=int, default=32, help="prompts of EAP-IG, which set the cost of all")
    parser.add_argument("--times", type=int, default=1, help="gradients of UGS and HCGS, as multiples of that cost")
    parser.add_argument("--largest", type=float, default=0.8, help="share of edges where gradual pruning begins")
    parser.add_argument("--tokens", type=int, help="use prompts of at most so many tokens")
    parser.add_argument("--constant-steps", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("reports/circuits.csv"))
    given = parser.parse_args()
    pipeline = importlib.import_module(f"pipelines.{given.task}")
    held_out = pipeline.judge()
    for ablation in given.ablations:
        study = pipeline.study(ablation=ablation)
        learning = pipeline.learning() if hasattr(pipeline, "learning") else study.examples
        if given.tokens:
            held_out, learning = (of_length(part, given.tokens) for part in (held_out, learning))
        print(f"{given.task}, {ablation}: {len(learning)} learning, {len(held_out)} held-out prompts", flush=True)
        base = coar.CircuitEvaluator(study, device=given.device, precision=given.precision, batch_size=given.batch_size)
        judged = base.on(held_out)
        for seed in given.seeds:
            evaluator = base.on(shuffled(learning, seed))
            for method in given.methods:
                key = {"task": given.task, "ablation": ablation, "seed": seed, "method": method}
                if done(given.out, key) < len(given.sizes):
                    settings = methods_of(given.prompts, given.times, seed, given.largest)[method]
                    for row in rows_of(evaluator, judged, method, settings, given):
                        append(given.out, key | row)


def rows_of(
    evaluator: coar.CircuitEvaluator, judged: coar.CircuitEvaluator, method: str, settings: dict[str, Any], given: Any
) -> Iterator[dict[str, Any]]:
    """Yield a row for each size, the largest first, and with `--curves` the two areas in each."""
    began = time.process_time()
    scores = coar.circuit_scores(evaluator.study, method, evaluator=evaluator, progress=False, **settings)
    row: dict[str, Any] = {"passes": scores.passes, "seconds": time.process_time() - began}
    if given.curves:
        curve = coar.faithfulness_curve(scores, judged.study.examples, progress=False)
        row |= {"cpr": curve.cpr, "cmd": curve.cmd}
    larger = None
    for size in sorted(given.sizes, reverse=True):
        before, began = evaluator.passes, time.process_time()
        try:
            larger = coar.circuit(scores, edges=size, constant_steps=given.constant_steps, start=larger, progress=False)
        except coar.errors.CircuitError as error:  # no path among so few edges, nor among fewer
            print(f"{method}: {error}", flush=True)
            yield {"edges": size, "kept": 0, "kl": np.nan, "output": np.nan, "agreement": np.nan} | row
            continue
        spent = {"training_passes": evaluator.passes - before, "training_seconds": time.process_time() - began}
        keep = torch.from_numpy(larger.mask(evaluator.study.components)).float().to(judged.device)
        constants = None if larger.constants is None else torch.from_numpy(larger.constants)
        found = judged.measure(keep, constants=constants)
        measured = {name: float(getattr(found, name).mean()) for name in ("kl", "output", "agreement")}
        yield {"edges": size, "kept": len(larger)} | measured | row | spent


def done(file: Path, key: dict[str, Any]) -> int:
    """Return the number of rows of a task, ablation, seed and method in a file."""
    if not file.is_file():
        return 0
    there = pd.read_csv(file)
    return int(np.logical_and.reduce([there[name] == value for name, value in key.items()]).sum())


def append(file: Path, row: dict[str, Any]) -> None:
    """Add a row to a file, and print it."""
    shown = (f"{name}={value:.4g}" if isinstance(value, float) else f"{value}" for name, value in row.items())
    print(*shown, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([row]).to_csv(file, mode="a", header=not file.is_file(), index=False)


if __name__ == "__main__":
    main()
