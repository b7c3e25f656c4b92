"""Held-out correlation of attributions on cifar10's ResNet-20, fits and baselines under one evaluator.

    COAR_DATA=/path/to/folder python benchmarks/accuracy.py                     # both ablations, several minutes each
    COAR_DATA=/path/to/folder python benchmarks/accuracy.py --ablation zero

256 test pictures, 4,000 training masks at ablated fraction 0.10, 512 test masks at 0.10, 0.05 and 0.20, the margin
against the log-sum-exp of the other logits. Runs are written to runs/cifar10-*.zarr, where `make` finds them.
"""

import argparse

import pandas as pd

import coar
from pipelines import cifar10


def evaluate(ablation: str, precision: str) -> pd.DataFrame:
    """Collect, fit and evaluate one ablation; return the table of scores."""
    study = cifar10.study(ablation=ablation)
    run = coar.collect(
        study,
        f"runs/cifar10-{ablation}.zarr",
        masks=cifar10.MASKS,
        test_masks=cifar10.TEST_MASKS,
        test_fractions=cifar10.TEST_FRACTIONS,
        precision=precision,
    )
    for method in ("ols", "ridge"):
        coar.fit(run, method=method)
    for count in (1_000, 2_000):
        coar.fit(run, method="ridge", masks=count, name=f"ridge-{count}")
    coar.leave_one_out(study, run)
    coar.mask_gradient(study, run)
    table = coar.evaluate(run).table
    table.insert(0, "ablation", ablation)
    return table


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ablation", choices=("zero", "mean"), nargs="+", default=["zero", "mean"])
    parser.add_argument("--precision", default="float32")
    arguments = parser.parse_args()
    tables = [evaluate(ablation, arguments.precision) for ablation in arguments.ablation]
    with pd.option_context("display.width", 200):
        print(pd.concat(tables).to_string(index=False, float_format=lambda value: f"{value:.3f}"))


if __name__ == "__main__":
    main()
