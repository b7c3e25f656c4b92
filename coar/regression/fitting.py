"""Fits a run: reads it once, solves for every example, and writes the attributions back into it."""

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coar.attributions import Attributions
from coar.errors import IncompleteRunError, RegressionError, SettingsError
from coar.evaluation import score
from coar.progress import progress_bar
from coar.regression.informed import informed
from coar.regression.lasso import SparseFit, sparse
from coar.regression.ridge import LinearFit, Spectrum, solve
from coar.regression.sums import Gram, accumulate, batches
from coar.store import Probes, Run
from coar.store.fits import FitWriter, add_fit_facts, check_name, chunk_rows, fit_facts

METHODS = ("ridge", "ols", "lasso", "informed")
MOMENT_BYTES = 256 * 2**20  # of X'Y held at a time; more examples than fit take another reading of the masks
FIELDS = ("weight", "intercept", "standard_error", "penalty")
LACKING = {"informed": "penalty", "lasso": "standard_error"}  # what a method does not give


def fit(
    run: Run,
    *,
    method: str = "auto",
    masks: int | None = None,
    probes: int | None = None,
    name: str | None = None,
    refit: bool = False,
    progress: bool = True,
) -> Attributions:
    """Fit one linear model per example from masks to outputs and write it into the run.

    Args:
        run: A complete run; its test masks are not read.
        method: `ridge`, with a penalty per example chosen by generalised cross-validation; `ols`; `lasso`, with sparse
            weights, its penalties chosen likewise; `informed`, which starts from probes and corrects by masks, if there
            are any; or `auto`: `ridge` where there are no probes, else `informed`, and where the run has validation
            masks whichever of the two predicts those better.
        masks: Use only the first so many training masks.
        probes: Use only the first so many probes, a whole number of the rounds in which they were collected.
        name: Name of the fit in the run; by default the method.
        refit: Fit again even when the run already holds this fit.
        progress: Show a progress bar.

    Returns:
        The attributions, read lazily from the run.

    Raises:
        IncompleteRunError: When units are missing.
        RegressionError: When there are fewer than two masks, or too few for least squares, or too few probes; when
            lasso does not converge, or this machine has no room for its Gram matrix.
    """
    if method not in (*METHODS, "auto"):
        raise SettingsError(f"unknown method {method!r}; choose auto or one of {', '.join(METHODS)}")
    if len(run.plan) or not Probes(run).count:
        run.require_complete()
    rounds = _rounds(run, probes, method)
    rows = _rows(run, masks, none_will_do=rounds > 0)
    common = {"refit": refit, "progress": progress}
    if method != "auto":
        return _fit(run, method, rows, rounds, name or method, **common)
    if not rounds:
        return _fit(run, "ridge", rows, 0, name or "ridge", **common)
    informed_fit = _fit(run, "informed", rows, rounds, name or "informed", **common)
    if len(rows) < 2 or name or not run.plan.count("validation", run.sampler.ablated_fraction) >= 2:
        return informed_fit
    ridge_fit = _fit(run, "ridge", rows, 0, "ridge", **common)
    return max(informed_fit, ridge_fit, key=lambda fitted: fitted.facts["fit"]["validation"])


def _rows(run: Run, masks: int | None, *, none_will_do: bool) -> np.ndarray:
    rows = run.plan.rows("train", run.sampler.ablated_fraction)
    if masks is not None and not (2 <= masks <= len(rows) or (masks == 0 and none_will_do)):
        raise RegressionError(f"a fit on {masks} masks was asked for; the run has {len(rows)}: choose 2 to {len(rows)}")
    return rows[:masks]


def _rounds(run: Run, probes: int | None, method: str) -> int:
    """Return how many rounds of probes to use, all of them collected."""
    found = Probes(run)
    if method not in ("informed", "auto"):
        return 0
    missing = found.missing_units()
    if missing:
        raise IncompleteRunError(
            f"{len(missing)} of {len(found.units())} units of probes of {run.path} have not been collected; run 'coar "
            f"collect' again to finish the run"
        )
    if method == "informed" and not found.count:
        raise RegressionError(f"an informed fit needs probes and {run.path} has none; collect with --probes, 64 or so")
    return found.whole_rounds(probes)


def _fit(
    run: Run, method: str, rows: np.ndarray, rounds: int, name: str, *, refit: bool, progress: bool
) -> Attributions:
    if method != "informed" and len(rows) < 2:
        raise RegressionError(
            f"a fit needs at least two training masks and {run.path} has {len(rows)}; collect with --masks"
        )
    label = check_name(name)
    facts: dict[str, Any] = {"method": method, "masks": len(rows), "ablated_fraction": run.sampler.ablated_fraction}
    if method == "informed":
        facts["probes"] = sum(Probes(run).rounds[:rounds])
    known = fit_facts(run, label)
    if refit or {key: known.get(key) for key in facts} != facts or known.get("state") != "ready":
        with run.lock():
            fields = tuple(field for field in FIELDS if field != LACKING.get(method))
            solutions: Iterator[tuple[slice, LinearFit | SparseFit]]
            if method == "informed":
                learned, solutions = informed(run, rows, rounds, chunk_rows(run))
            else:
                learned, solutions = {}, _solutions(run, rows, method, chunk_rows(run))
            first = next(solutions)  # what cannot be fitted raises here, before the stored fit is replaced
            writer = FitWriter(run, label, fields, facts | learned)
            for examples, result in progress_bar(
                chain([first], solutions), desc=f"fit {label}", unit="block", shown=progress
            ):
                writer.write(examples, **{field: getattr(result, field).numpy() for field in fields})
            writer.finish()
    _validate(run, label)
    return Attributions.open(run, label)


def _validate(run: Run, label: str) -> None:
    """Keep the fit's mean correlation on all validation masks, where there are any, beside it."""
    fraction = run.sampler.ablated_fraction
    count = run.plan.count("validation", fraction)
    if count >= 2 and fit_facts(run, label).get("validation_masks") != count:
        scores = score(Attributions.open(run, label), run, fraction, split="validation")
        with run.lock():
            add_fit_facts(run, label, validation=float(scores["pearson"].mean()), validation_masks=count)


def _solutions(run: Run, rows: np.ndarray, method: str, step: int) -> Iterator[tuple[slice, LinearFit | SparseFit]]:
    """Yield solved blocks of `step` examples, holding the sums of as many blocks as memory allows."""
    d, n = len(run.components), run.n_examples
    wide = max(MOMENT_BYTES // (8 * max(d, len(rows) if len(rows) <= d else d)), 1)
    group = max(wide // step, 1) * step
    blocks = [slice(start, min(start + group, n)) for start in range(0, n, group)]
    if method == "lasso":
        yield from sparse(run, rows, step, blocks)
    elif len(rows) <= d:
        yield from _dual(run, rows, method, step, blocks)
    else:
        yield from _primal(run, rows, method, step, blocks)


def _primal(
    run: Run, rows: np.ndarray, method: str, step: int, blocks: list[slice]
) -> Iterator[tuple[slice, LinearFit]]:
    gram: Gram | None = None
    spectrum: Spectrum | None = None
    for block in blocks:
        gram, moments = accumulate(run, rows, block, gram=gram)
        spectrum = spectrum or Spectrum.primal(gram)
        scores = spectrum.scores_primal(gram, moments)
        yield from _blocks(spectrum, scores, moments.mean(), moments.variation(), method, step, block)


def _dual(run: Run, rows: np.ndarray, method: str, step: int, blocks: list[slice]) -> Iterator[tuple[slice, LinearFit]]:
    spectrum: Spectrum | None = None
    left = torch.empty(0)
    for block in blocks:
        parts = list(batches(run, rows, block))
        if spectrum is None:
            spectrum, left = Spectrum.dual(torch.cat([x[:, :-1] for x, _ in parts]))
        outputs = torch.cat([y for _, y in parts]).double()  # (masks, examples)
        mean = outputs.mean(0)
        outputs -= mean
        yield from _blocks(spectrum, left.T @ outputs, mean, (outputs**2).sum(0), method, step, block)


def _blocks(
    spectrum: Spectrum, scores: Tensor, mean: Tensor, variation: Tensor, method: str, step: int, block: slice
) -> Iterator[tuple[slice, LinearFit]]:
    for at in range(0, math.ceil((block.stop - block.start) / step) * step, step):
        part = slice(at, min(at + step, block.stop - block.start))
        result = solve(spectrum, scores[:, part], mean[part], variation[part], method=method)
        yield slice(block.start + part.start, block.start + part.stop), result
