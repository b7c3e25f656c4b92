"""Seconds of informed fits as a share of those of collecting their mask gradients, at the size of published models.

    python -m benchmarks.fit_share                             # ViT-B/16, GPT-2's size and ResNet-50; minutes
    python -m benchmarks.fit_share --models ResNet-50 --examples 4

The models have random weights. Each collects a few mask gradients of a few examples, which are then fitted: both are
measured beside each other. As many mask gradients and examples as a study has are generated instead, and their fit is
measured; the seconds of collecting them are extrapolated, by their number, from those of the few. Runs have as many
components and sites as the models, in sites of equal size. Times are CPU seconds.
"""

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import coar
from benchmarks.fit import generate
from benchmarks.fit_growth import apart, make, measure
from benchmarks.gpu import study_of, subjects
from coar.forward.copies import device_copy
from coar.forward.runner import FastRunner
from coar.store.gradients import MaskGradients

MODELS = ("ViT-B/16", "GPT-2", "ResNet-50")
FEW = 8  # mask gradients that are collected, as few as a fit takes
MANY, WIDE = 64, 16  # mask gradients and examples of the generated run
UNUSED = 2  # masks of the runs, which informed fits of gradients alone leave out


def collect(path: Path, name: str, examples: int) -> tuple[int, int, float]:
    """Collect `FEW` mask gradients into a run; return the numbers of components and sites, and the seconds."""
    torch.set_num_threads(1)
    study = study_of(replace(subjects(small=False)[name], examples=(examples, examples)), torch.device("cpu"))
    components = study.components
    sites = len(components.sites())
    run = generate(path, UNUSED, len(components), examples, sites=sites)
    stored = MaskGradients(run)
    stored.extend(FEW)
    model = device_copy(study.model, torch.device("cpu"), study.examples)
    runner = FastRunner(model, components, torch.zeros(components.width), study.output)
    start = time.process_time()
    block = runner.load(study.examples, 0, examples)
    for unit in stored.missing_units():
        groups = stored.group_of(stored.examples_of(unit))
        stored.write_unit(unit, *runner.mask_gradients(block, stored.masks(unit.round), groups))
    return len(components), sites, time.process_time() - start


def show(name: str, folder: Path, examples: int) -> None:
    """Measure a model, and print a row of a table."""
    path = folder / "few.zarr"
    components, sites, collecting = apart(collect, path, name, examples)
    few = apart(measure, path, "informed", None, 0)
    shutil.rmtree(path)
    each = collecting / (FEW * examples)
    path = folder / "many.zarr"
    apart(make, path, UNUSED, components, WIDE, MANY, sites)
    many = apart(measure, path, "informed", None, 0)
    shutil.rmtree(path)
    print(
        f"| {name} | {components:,} | {sites} | {collecting:.1f} | {few['seconds']:.1f} | "
        f"{few['seconds'] / collecting:.3f} | {each * MANY * WIDE:,.0f} | {many['seconds']:.1f} | "
        f"{many['seconds'] / (each * MANY * WIDE):.4f} | {many['gib']:.2f} |",
        flush=True,
    )


def main() -> None:
    """Measure the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--examples", type=int, default=2, help="examples whose mask gradients are collected")
    options = parser.parse_args()
    few = f"{FEW} x {options.examples}"
    print(f"torch {torch.__version__}, coar {coar.__version__}, one thread")
    print(f"| model | components | sites | collecting {few} | fit | share ", end="")
    print(f"| collecting {MANY} x {WIDE}, extrapolated | fit | share | its GiB |")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            show(name, Path(folder), options.examples)


if __name__ == "__main__":
    main()
