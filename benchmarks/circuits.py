"""Circuits of a language model by several methods: held-out divergence by the number of edges, at measured cost.

    OMP_NUM_THREADS=1 python benchmarks/circuits.py --task ioi --out benchmarks/results/circuits-ioi.csv
    python benchmarks/circuits.py --task greater_than --ablations mean counterfactual optimal --seeds 3

A row is a method, a seed, an ablation and a size. Constants of every circuit are trained in the same way, except under
counterfactuals, which have none. With `--curves`, CPR and CMD at MIB's ten sizes follow, without any training. Rows
are written as they come, and what a file has is not computed again. EAP-IG with ten steps, and gradual pruning with
ten gradients for every learning prompt, cost the same; UGS has ten times as many by default.
"""

import argparse
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import coar

SIZES = (100, 200, 500, 1000, 2000, 5000)
STEPS = 10  # gradients for every learning prompt
MASKS = 16  # of UGS and HCGS per step: 4 examples under 4 masks


def methods_of(prompts: int, seed: int) -> dict[str, dict[str, Any]]:
    """Return the settings of each method; all but `eap`, `random`, `ugs` and `hcgs` take the same number of passes."""
    per_step = 16
    learned = {"examples": 4, "masks": MASKS // 4, "steps": 10 * STEPS * prompts // MASKS, "seed": seed}
    return {
        "gradual": {"steps": STEPS * prompts // per_step, "examples": per_step, "seed": seed},
        "eap": {},
        "eap_ig": {"steps": STEPS},
        "random_masks": {"passes": STEPS, "seed": seed},
        "ugs": learned,
        "hcgs": learned,
        "random": {"seed": seed},
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="ioi", help="a pipeline: ioi, greater_than or induction")
    parser.add_argument("--methods", nargs="+", default=["gradual", "eap", "eap_ig", "random"])
    parser.add_argument("--ablations", nargs="+", default=["mean"])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--prompts", type=int, help="use the first so many learning prompts")
    parser.add_argument("--constant-steps", type=int, default=40)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("reports/circuits.csv"))
    given = parser.parse_args()
    pipeline = importlib.import_module(f"pipelines.{given.task}")
    held_out = pipeline.judge()
    for ablation in given.ablations:
        study = pipeline.study(ablation=ablation)
        if given.prompts:
            study = replace(study, examples=study.examples.subset(range(given.prompts)))
        evaluator = coar.CircuitEvaluator(study, device=given.device)
        for seed in range(given.seeds):
            for method in given.methods:
                key = {"task": given.task, "ablation": ablation, "seed": seed, "method": method}
                if not done(given.out, key):
                    settings = methods_of(len(study.examples), seed)[method]
                    append(given.out, rows_of(evaluator, held_out, method, settings, given), key)


def rows_of(
    evaluator: coar.CircuitEvaluator, held_out: coar.Examples, method: str, settings: dict[str, Any], given: Any
) -> pd.DataFrame:
    """Return one row per size, and with `--curves` the two areas in each."""
    found = coar.compare_methods(
        evaluator, held_out, {method: settings}, given.sizes, constant_steps=given.constant_steps
    ).table
    if given.curves:
        scores = coar.circuit_scores(evaluator.study, method, evaluator=evaluator, **settings)
        curve = coar.faithfulness_curve(scores, held_out)
        found = found.assign(cpr=curve.cpr, cmd=curve.cmd)
    return found.assign(cpr=np.nan, cmd=np.nan) if not given.curves else found


def done(file: Path, key: dict[str, Any]) -> bool:
    """Return whether a file has rows of this task, ablation, seed and method."""
    if not file.is_file():
        return False
    there = pd.read_csv(file)
    return bool(np.logical_and.reduce([there[name] == value for name, value in key.items()]).any())


def append(file: Path, rows: pd.DataFrame, key: dict[str, Any]) -> None:
    """Add rows to a file, and print them."""
    labelled = rows.drop(columns="method").assign(**key)[[*key, *rows.columns.drop("method")]]
    print(labelled.to_string(index=False, float_format=lambda value: f"{value:.4g}"), flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    labelled.to_csv(file, mode="a", header=not file.is_file(), index=False)


if __name__ == "__main__":
    main()
