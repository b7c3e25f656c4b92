"""Seconds of an informed fit, compared with those of collecting its mask gradients.

    python -m benchmarks.informed_fit                         # digits: 336 filters, 400 scans, 64 mask gradients
    COAR_DATA=/path/to/folder python -m benchmarks.informed_fit --pipeline cifar10 --gradients 64 --examples 64

It prints wall seconds and this process's CPU seconds of both, and their ratio; a fit may take at most a third. A few
mask gradients are collected into another run first, so that first calls are not timed.
"""

import argparse
import importlib
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import coar

FIRST = 8  # mask gradients collected before timing starts


def main() -> None:
    """Collect, fit, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="digits", help="a module of pipelines/")
    parser.add_argument("--gradients", type=int, default=64)
    parser.add_argument("--masks", type=int, default=200)
    parser.add_argument("--examples", type=int, help="number of examples, the first ones; by default all")
    options = parser.parse_args()
    study = importlib.import_module(f"pipelines.{options.pipeline}").study()
    if options.examples:
        study = replace(study, examples=study.examples.subset(range(options.examples)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        coar.collect(study, Path(folder) / "first.zarr", gradients=FIRST, masks=0, progress=False)
        coar.collect(study, path, masks=options.masks, progress=False)
        clock = [times()]
        run = coar.collect(study, path, gradients=options.gradients, progress=False)
        clock.append(times())
        for name in ("first", "again"):
            coar.fit(run, method="informed", name=name, progress=False)
            clock.append(times())
    seconds = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(clock)]
    print(f"{run.n_components} components, {run.n_examples} examples, {options.gradients} mask gradients")
    print(f"{'':24}{'wall':>8}{'CPU':>8}   share of collecting (wall, CPU)")
    for label, (wall, cpu) in zip(("collecting gradients", "fit", "fit again"), seconds, strict=True):
        print(f"{label:24}{wall:8.2f}{cpu:8.2f}   {wall / seconds[0][0]:.2f}, {cpu / seconds[0][1]:.2f}")


def times() -> tuple[float, float]:
    """Return the seconds of the wall clock and of this process's CPU time."""
    return time.perf_counter(), time.process_time()


if __name__ == "__main__":
    main()
