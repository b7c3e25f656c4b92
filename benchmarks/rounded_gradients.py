"""Effect of storing mask gradients with the precision of bfloat16 on informed fits of a trained model.

    python -m benchmarks.rounded_gradients                        # digits: 336 filters, 100 scans
    python -m benchmarks.rounded_gradients --seeds 3 --examples 400

For each seed it collects the same mask gradients twice, as they are and rounded, fits both without masks and with some,
and prints the mean correlations with outputs under held-out masks, their difference, and bytes on disk.
"""

import argparse
import importlib
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import coar

ARRAYS = ("gradient_kept", "gradient_ablated")


def size_of(run: coar.Run) -> int:
    """Return the bytes of the stored mean gradients."""
    files = [file for name in ARRAYS for file in (Path(str(run.path)) / name / "c").rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    """Collect, fit, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="digits", help="a module of pipelines/")
    parser.add_argument("--examples", type=int, default=100, help="number of examples, the first ones")
    parser.add_argument("--gradients", type=int, default=64)
    parser.add_argument("--masks", type=int, default=200)
    parser.add_argument("--test-masks", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = importlib.import_module(f"pipelines.{options.pipeline}").study()
    study = replace(study, examples=study.examples.subset(range(options.examples)))
    print("| seed | masks | correlation | rounded | mean difference | largest of an example | bytes | rounded |")
    for seed in range(options.seeds):
        own = replace(study, sampler=coar.BernoulliSampler(ablated_fraction=0.1, seed=seed))
        with tempfile.TemporaryDirectory() as folder:
            runs = [
                coar.collect(
                    own,
                    Path(folder) / f"{rounded}.zarr",
                    gradients=options.gradients,
                    masks=options.masks,
                    test_masks=options.test_masks,
                    device="cpu",
                    execution=coar.Execution(round_gradients=rounded),
                    progress=False,
                )
                for rounded in (False, True)
            ]
            for masks in (0, options.masks):
                name = f"masks-{masks}"
                for run in runs:
                    coar.fit(run, method="informed", masks=masks, name=name, device="cpu", progress=False)
                plain, rounded = (correlations(run, name) for run in runs)
                more = rounded - plain
                print(
                    f"| {seed} | {masks} | {plain.mean():.5f} | {rounded.mean():.5f} | {more.mean():+.6f} | "
                    f"{np.abs(more).max():.5f} | {size_of(runs[0]):,} | {size_of(runs[1]):,} |",
                    flush=True,
                )


def correlations(run: coar.Run, fit: str) -> np.ndarray:
    """Return (examples,) correlations of predictions and outputs under test masks."""
    return np.asarray(coar.evaluate(run, fits=[fit]).per_example["pearson"])


if __name__ == "__main__":
    main()
