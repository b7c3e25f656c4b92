"""Fits a run: reads it once, solves for every example, and writes the attributions back into it."""

import math
from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from coar.attributions import Attributions
from coar.errors import RegressionError, SettingsError
from coar.progress import progress_bar
from coar.regression.ridge import LinearFit, Spectrum, solve
from coar.regression.sums import Gram, accumulate, batches
from coar.store import Run
from coar.store.fits import FitWriter, check_name, chunk_rows, fit_facts

METHODS = ("ridge", "ols")
MOMENT_BYTES = 256 * 2**20  # of X'Y held at a time; more examples than fit take another reading of the masks
FIELDS = ("weight", "intercept", "standard_error", "penalty")


def fit(
    run: Run,
    *,
    method: str = "ridge",
    masks: int | None = None,
    name: str | None = None,
    refit: bool = False,
    progress: bool = True,
) -> Attributions:
    """Fit one linear model per example from masks to outputs and write it into the run.

    Args:
        run: A complete run; only its training masks are read.
        method: `ridge`, with a penalty per example chosen by generalised cross-validation, or `ols`.
        masks: Use only the first so many training masks.
        name: Name of the fit in the run; by default the method.
        refit: Fit again even when the run already holds this fit.
        progress: Show a progress bar.

    Returns:
        The attributions, read lazily from the run.

    Raises:
        IncompleteRunError: When units are missing.
        RegressionError: When there are fewer than two masks, or too few for least squares.
    """
    if method not in METHODS:
        raise SettingsError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    run.require_complete()
    rows = run.plan.rows("train", run.sampler.ablated_fraction)
    if masks is not None and not 2 <= masks <= len(rows):
        raise RegressionError(f"a fit on {masks} masks was asked for; the run has {len(rows)}: choose 2 to {len(rows)}")
    rows = rows[:masks]
    if len(rows) < 2:
        raise RegressionError(
            f"a fit needs at least two training masks and {run.path} has {len(rows)}; collect with --masks"
        )
    label = check_name(name or method)
    facts = {"method": method, "masks": len(rows), "ablated_fraction": run.sampler.ablated_fraction}
    known = fit_facts(run, label)
    if refit or {key: known.get(key) for key in facts} != facts or known.get("state") != "ready":
        with run.lock():
            solutions = _solutions(run, rows, method, chunk_rows(run))
            first = next(solutions)  # what cannot be fitted raises here, before the stored fit is replaced
            writer = FitWriter(run, label, FIELDS, facts)
            for examples, result in progress_bar(
                chain([first], solutions), desc=f"fit {label}", unit="block", shown=progress
            ):
                writer.write(examples, **{field: getattr(result, field).numpy() for field in FIELDS})
            writer.finish()
    return Attributions.open(run, label)


def _solutions(run: Run, rows: np.ndarray, method: str, step: int) -> Iterator[tuple[slice, LinearFit]]:
    """Yield solved blocks of `step` examples, holding the sums of as many blocks as memory allows."""
    d, n = len(run.components), run.n_examples
    wide = max(MOMENT_BYTES // (8 * max(d, len(rows) if len(rows) <= d else d)), 1)
    group = max(wide // step, 1) * step
    blocks = [slice(start, min(start + group, n)) for start in range(0, n, group)]
    yield from _dual(run, rows, method, step, blocks) if len(rows) <= d else _primal(run, rows, method, step, blocks)


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
