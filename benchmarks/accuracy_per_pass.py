"""Held-out correlation against cost: informed fits, regressions, gradients and published peers under one evaluator.

    COAR_DATA=/path/to/folder python benchmarks/accuracy_per_pass.py                        # everything: hours
    COAR_DATA=/path/to/folder python benchmarks/accuracy_per_pass.py --models digits resnet20 --seeds 0

Zero weight, ablated fraction 0.10, 8,000 training masks, 512 test masks, three seeds of masks and mask gradients; 400
digits, 256 pictures for ResNet-20 and 128 for ResNet-44, 48 pairs for MiniLM (2,000 masks, 256 test masks;
leave-one-out would take 9,288 passes and is left out, and so is lasso, whose Gram matrix makes it take hours). Every
method is judged on the same test masks of its seed. Cost is counted in forward passes over the examples. A mask
gradient counts as its measured time on this machine in the same precision, and alternatively as 2.5 passes. Runs are
kept in runs/passes/ with the measured times, and resumed if they exist. Tables are printed, and written with the
figures to reports/benchmarks/. Models may be run separately, with `--out`, and combined by passes_report.py.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import torch

import coar
from benchmarks import passes_report
from coar.collection.cost import measure
from coar.evaluation import correlation
from coar.peers import PathMethod, path_scores
from coar.regression.informed.prior import learn_prior
from coar.store.gradients import MaskGradients
from coar.store.run import Run
from pipelines import cifar10, digits, sentence_embeddings

RUNS, OUT = Path("runs/passes"), Path("reports/benchmarks")
MASKS, STAGES = (250, 500, 1000, 2000, 4000, 8000), (40, 80, 120, 160, 240)
STEP = 40  # mask gradients per call of collect, whose last round ends there, so that fits may use any multiple of 40
PEER_EXAMPLES, PEER_STEPS = 32, 10


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model: its study by seed, and the sizes of fits."""

    study: Callable[[int], coar.Study]
    masks: tuple[int, ...]
    gradients: tuple[int, ...]
    test_masks: int = 512
    validation_masks: int = 128
    embedding: str | None = None
    leave_one_out: bool = True
    lasso: bool = True


def resnet44(seed: int) -> coar.Study:
    """Study ResNet-44 on half as many pictures."""
    study = cifar10.study(ablation="zero", seed=seed, layers=44)
    return dataclasses.replace(study, examples=study.examples.subset(range(128)))


SUBJECTS = {
    "digits": Subject(lambda seed: digits.study(ablation="zero", seed=seed), MASKS, STAGES[:3]),
    "resnet20": Subject(lambda seed: cifar10.study(ablation="zero", seed=seed), MASKS, STAGES),
    "resnet44": Subject(resnet44, MASKS[1:], STAGES[:4]),
    "minilm": Subject(
        lambda seed: sentence_embeddings.study(seed=seed),
        MASKS[:4],
        (40, 56, 72, 80),  # ends of rounds when 40 are collected at a time
        test_masks=256,
        validation_masks=64,
        embedding="minilm.embeddings.word_embeddings",
        leave_one_out=False,
        lasso=False,
    ),
}


class Judge:
    """Scores (examples, components) weights on one run's test masks."""

    def __init__(self, run: Run) -> None:
        rows = run.plan.rows("test", run.sampler.ablated_fraction)
        self._masks = run.masks_at(rows).astype(np.float32)
        self._outputs = run.outputs_at(rows, slice(None))

    def __call__(self, weights: np.ndarray) -> float:
        """Return the mean correlation over the examples of the weights."""
        return float(np.nanmean(correlation(self._masks @ weights.T, self._outputs[:, : len(weights)])))


def collect(study: coar.Study, subject: Subject, path: Path, precision: str) -> Run:
    """Collect all masks and mask gradients, the mask gradients a few rounds at a time."""
    held = {"test_masks": subject.test_masks, "validation_masks": subject.validation_masks}
    for mask_gradients in range(STEP, subject.gradients[-1] + 1, STEP):
        coar.collect(study, path, gradients=mask_gradients, precision="auto" if path.exists() else precision, **held)
    return coar.collect(study, path, masks=subject.masks[-1], precision="auto", **held)


def prices(study: coar.Study, run: Run, file: Path) -> tuple[float, float]:
    """Return the seconds of a mask and of a mask gradient, measured once on an otherwise idle machine."""
    if not file.exists():
        file.write_text(json.dumps(measure(study, run)))
    per_mask, per_gradient = json.loads(file.read_text())
    return per_mask, per_gradient


def regressions(run: Run, subject: Subject, judge: Judge) -> list[dict[str, object]]:
    """Fit and judge least squares, ridge and lasso at each number of masks."""
    rows = []
    for masks in subject.masks:
        for method in ("ols", "ridge", "lasso"):
            if (method == "ols" and masks < run.n_components + 2) or (method == "lasso" and not subject.lasso):
                continue
            fitted = coar.fit(run, method=method, masks=masks, name=f"{method}-{masks}", progress=False)
            rows.append({"method": method, "gradients": 0, "masks": masks, "r": judge(fitted.weights(slice(None)))})
    return rows


def informed(run: Run, subject: Subject, judge: Judge) -> list[dict[str, object]]:
    """Fit and judge informed attributions at each number of mask gradients, alone and with a few or many masks.

    For comparison, judge the gradients alone: their plain mean, the mean of both ends (the trapezoid rule), and both
    ends with factors per site learnt from the outputs.
    """
    rows = []
    for mask_gradients in subject.gradients:
        rounds = MaskGradients(run).whole_rounds(mask_gradients)
        gradients, counts = MaskGradients(run).means(range(rounds), slice(None))
        kept, ablated = np.where(counts > 0, gradients, gradients[::-1])
        mean = (gradients * counts).sum(0) / counts.sum(0)
        prior, _ = learn_prior(run, rounds, slice(0, run.n_examples), torch.device("cpu"))
        by_kept, by_ablated = prior.shared.placing.numpy()
        learned = by_kept * kept + by_ablated * ablated
        for name, weights in (("mean gradient", mean), ("trapezoid", (kept + ablated) / 2), ("learned ends", learned)):
            rows.append({"method": name, "gradients": mask_gradients, "masks": 0, "r": judge(weights)})
        for masks in (0, min(512, subject.masks[-1])):
            fitted = coar.fit(
                run,
                method="informed",
                gradients=mask_gradients,
                masks=masks,
                name=f"informed-{mask_gradients}-{masks}",
                progress=False,
            )
            rows.append(
                {
                    "method": "informed",
                    "gradients": mask_gradients,
                    "masks": masks,
                    "r": judge(fitted.weights(slice(None))),
                }
            )
    return rows


def baselines(study: coar.Study, run: Run, subject: Subject, judge: Judge, ratio: float) -> list[dict[str, object]]:
    """Judge leave-one-out, mask gradient, and captum's peers on some examples."""
    slopes = coar.mask_gradient(study, run, progress=False).weights(slice(None))
    rows = [{"method": "mask gradient", "gradients": 1, "masks": 0, "r": judge(slopes)}]
    if subject.leave_one_out:
        drops = coar.leave_one_out(study, run, progress=False).weights(slice(None))
        rows.append(
            {"method": "leave-one-out", "gradients": 0, "masks": 0, "r": judge(drops), "passes": run.n_components}
        )
    few = dataclasses.replace(study, examples=study.examples.subset(range(PEER_EXAMPLES)))
    for method in get_args(PathMethod):
        found = path_scores(few, method, PEER_STEPS, embedding=subject.embedding)
        passes = (found.forwards + found.backwards * (ratio - 1)) / found.sites  # the cost if all sites shared one path
        rows.append(
            {
                "method": method.replace("_", " "),
                "gradients": 0,
                "masks": 0,
                "r": judge(found.weights),
                "passes": passes,
            }
        )
    return rows


def coverage(run: Run, others: list[Run], masks: int) -> dict[str, float]:
    """Compare informed standard errors with least squares from all masks of other seeds, averaged."""
    fits = [coar.fit(other, method="ols", masks=masks, name=f"ols-{masks}", progress=False) for other in others]
    reference = np.mean([fitted.weights(slice(None)) for fitted in fits], axis=0)
    variance = np.mean([fitted.standard_errors(slice(None)) ** 2 for fitted in fits], axis=0) / len(fits)
    shares = {}
    for name in (name for name in run.group["attributions"].group_keys() if name.startswith("informed-")):
        fitted = coar.Attributions.open(run, name)
        own = fitted.standard_errors(slice(None)) ** 2
        distance = (fitted.weights(slice(None)) - reference) ** 2
        shares[name] = float((distance <= 1.96**2 * (own + variance)).mean())
    return shares


def examine(name: str, seeds: list[int], precision: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the curve of one model, and the coverage of its standard errors."""
    subject = SUBJECTS[name]
    rows, runs = [], []
    for seed in seeds:
        study = subject.study(seed)
        run = collect(study, subject, RUNS / f"{name}-{seed}.zarr", precision)
        runs.append(run)
        judge = Judge(run)
        per_mask, per_gradient = prices(study, run, RUNS / f"{name}-{seed}.json")
        ratio = per_gradient / per_mask
        found = regressions(run, subject, judge) + informed(run, subject, judge)
        found += baselines(study, run, subject, judge, ratio) if seed == seeds[0] else []
        for row in found:
            nominal = row.get("passes", row["masks"] + 2.5 * row["gradients"])
            passes = row.get("passes", row["masks"] + ratio * row["gradients"])
            rows.append(
                {"model": name, "components": run.n_components, "seed": seed, **row, "ratio": ratio}
                | {"nominal": nominal, "passes": passes, "seconds": passes * per_mask}
            )
        print(f"{name}, seed {seed}: a mask gradient takes {ratio:.2f} masks", file=sys.stderr, flush=True)
    shares = []
    if len(runs) > 1 and subject.masks[-1] >= runs[0].n_components + 2:
        found = coverage(runs[0], runs[1:], subject.masks[-1])
        shares = [{"model": name, "fit": fit, "coverage": share} for fit, share in found.items()]
    return pd.DataFrame(rows), pd.DataFrame(shares)


def main() -> None:
    """Print tables and write figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    parts = [examine(name, arguments.seeds, arguments.precision) for name in arguments.models]
    curves, shares = (pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
    arguments.out.mkdir(parents=True, exist_ok=True)
    curves.to_csv(arguments.out / "accuracy_per_pass.csv", index=False)
    shares.to_csv(arguments.out / "coverage.csv", index=False)
    passes_report.write(curves, shares, arguments.out)


if __name__ == "__main__":
    main()
