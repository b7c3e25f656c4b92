"""Leave-one-out with the prefix cache, compared with the same masks in whole passes.

    COAR_DATA=/path/to/folder python benchmarks/leave_one_out.py                     # alone on the machine: minutes
    python benchmarks/leave_one_out.py --models resnet18 --masks 16

A few components are taken, spread evenly over the table, so that the cost of caching weighs more than with all. The
upper bound of the gain follows from the share of products at or after a component's layer, and is printed too. Outputs
of both ways are compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import SUBJECTS
from coar.forward.copies import device_copy
from coar.forward.execution_plan import ExecutionPlan
from coar.forward.runner import FastRunner
from coar.study import Study


def floor(study: Study, rows: np.ndarray) -> float:
    """Return the mean share of a pass's products at or after a component's layer."""
    done: dict[str, int] = {}  # products before each layer
    with FlopCounterMode(display=False) as counter, torch.no_grad(), ExitStack() as stack:
        for site, _, _ in study.components.sites():

            def note(_module: nn.Module, _args: object, site: str = site) -> None:
                done.setdefault(site, counter.get_total_flops())

            stack.callback(study.model.get_submodule(site).register_forward_pre_hook(note).remove)
        inputs = study.examples.block(0, 1)[0]
        study.model(**inputs) if isinstance(inputs, dict) else study.model(inputs)
        total = counter.get_total_flops()
    return float(np.mean([1 - done[study.components[int(row)].site] / total for row in rows]))


def seconds(work: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Return the seconds of a call, and its result."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def compare(name: str, few: bool, count: int, rounds: int, precision: str) -> str:
    """Time both ways on a model; return a row of a Markdown table."""
    examples = SUBJECTS[name].examples[0 if few else 1]
    study = SUBJECTS[name].study(examples)
    model, d = device_copy(study.model, torch.device("cpu"), study.examples), len(study.components)
    zeros, plan = torch.zeros(study.components.width), ExecutionPlan(precision=precision)
    worker = FastRunner(model, study.components, zeros, study.output, plan)
    block = worker.load(study.examples, 0, examples)
    rows = np.linspace(0, d - 1, count).round().astype(int)
    masks = np.ones((count, d), dtype=bool)
    masks[np.arange(count), rows] = False

    def alone() -> np.ndarray:
        return np.concatenate([worker.outputs(block, mask[None]) for mask in masks])

    def shared() -> np.ndarray:
        return worker.outputs(block, masks)

    worker.outputs(block, masks[[0, -1]])  # gates, kernels and the one comparison with a plain pass
    ratios, difference = [], 0.0
    for _ in range(rounds):
        (plain, expected), (fast, found) = seconds(alone), seconds(shared)
        ratios.append(plain / fast)
        difference = max(difference, float(np.abs(found - expected).max() / np.abs(expected).max()))
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {name} | {d:,} | {examples} | {spread} | {1 / floor(study, rows):.2f} | {difference:.0e} |"


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", choices=SUBJECTS, nargs="+", default=list(SUBJECTS))
    parser.add_argument("--masks", type=int, default=48, help="number of components to leave out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--many", action="store_true", help="many examples instead of few")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    arguments = parser.parse_args()
    print("| model | components | examples | times as fast | at most, by products | largest difference |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in arguments.models:
        print(compare(name, not arguments.many, arguments.masks, arguments.rounds, arguments.precision), flush=True)


if __name__ == "__main__":
    main()
