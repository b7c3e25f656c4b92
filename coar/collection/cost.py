"""The estimated cost of a run, from a few timed passes and a small pilot run."""

import dataclasses
import logging
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from coar.collection.collect import collect
from coar.collection.execution import DEFAULTS, Execution
from coar.collection.preparation import fast_runner
from coar.collection.quality import FIRST_GRADIENTS, FIRST_MASKS, VALIDATION_MASKS, RunQuality, quality_of
from coar.errors import AblationError, SettingsError
from coar.forward.copies import device_copy
from coar.forward.malloc import memory_kept
from coar.preflight.findings import Findings
from coar.preflight.gradients import check_gradients
from coar.regression.fitting import fit
from coar.regression.memory import limit_of, plan_fit
from coar.renamed import new_arguments_only
from coar.store.fits import fit_names, rows_of_chunk
from coar.store.gradients import ARRAYS, MaskGradients, next_rounds
from coar.store.run import Run
from coar.study import Study

log = logging.getLogger(__name__)

PILOT_EXAMPLES = 64
LEAST_LIMIT = 4 * 2**30  # bytes of memory that a fit is planned for, at least


TIMED_MASKS, TIMED_GRADIENTS, REPETITIONS = 8, 4, 3


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated cost of a run.

    Attributes:
        seconds_per_mask, seconds_per_gradient: For all examples, on one worker; the second is NaN without gradients.
        passes: Forward passes over all examples, a mask gradient counted by its measured time.
        hours: On all workers.
        disk_bytes: Size of the run with one fit.
        fit_bytes: Memory of a fit.
        pilot: Quality of a small run of some examples; None when none was made.
        passes_per_hundredth: Passes that raise the correlation by another 0.01 after the pilot; infinite when the
            linear model's ceiling is nearer.
    """

    seconds_per_mask: float
    seconds_per_gradient: float
    passes: float
    hours: float
    disk_bytes: float
    fit_bytes: float
    pilot: RunQuality | None = None
    passes_per_hundredth: float = math.nan


def has_gradients(study: Study, *, device: str = "auto") -> bool:
    """Return whether mask gradients exist: parameter slices have no gate to differentiate by, some outputs detach."""
    try:
        check_gradients(Findings(study.accept), study, device_copy(study.model, device, study.examples))
    except AblationError as error:
        log.info("without mask gradients: %s", error)
        return False
    return True


@memory_kept()
def measure(study: Study, run: Run, *, device: str = "auto", batch_size: int | None = None) -> tuple[float, float]:
    """Return the seconds of one mask and one mask gradient over all examples; the latter is NaN without gradients."""
    worker = fast_runner(study, run, device_copy(study.model, device, study.examples), batch_size=batch_size)
    examples = min(run.blocks[1], len(study.examples))
    block = worker.load(study.examples, 0, examples)
    scale = len(study.examples) / examples
    masks = run.sampler.masks("train", range(TIMED_MASKS), run.n_components)
    seconds = _timed(lambda: worker.outputs(block, masks)) / TIMED_MASKS * scale
    if not has_gradients(study, device=device):
        return seconds, math.nan
    mask_groups = np.arange(examples) % TIMED_GRADIENTS
    keeps = run.sampler.masks("gradient", range(TIMED_GRADIENTS**2), run.n_components)
    keeps = keeps.reshape(TIMED_GRADIENTS, TIMED_GRADIENTS, -1)
    return seconds, _timed(lambda: worker.mask_gradients(block, keeps, mask_groups)) / TIMED_GRADIENTS * scale


@new_arguments_only
def estimate(
    study: Study,
    *,
    masks: int,
    gradients: int = 0,
    test_masks: int = 0,
    workers: int = 1,
    device: str = "auto",
    precision: str = "float32",
    execution: Execution = DEFAULTS,
) -> Estimate:
    """Estimate the cost of a run from a few timed passes and a pilot run on some of the examples.

    Args:
        study: The study.
        masks: Training masks.
        gradients: Mask gradients.
        test_masks: Held-out masks.
        workers: Number of machines like this one that share the work.
        device: Where to compute.
        precision: `float32`, `bf16` or `auto`.
        execution: Batches and memory.

    Raises:
        SettingsError: When a number is out of range.
        AblationError: When mask gradients are requested and the components or the output have no gradient.
    """
    counts = (masks, gradients, test_masks, workers)
    whole = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
    if not whole or not workers or not masks + gradients:
        raise SettingsError(
            f"{masks} masks, {gradients} mask gradients, {test_masks} test masks on {workers} workers make no "
            f"run; ask for masks "
            f"or mask gradients, and one worker or more"
        )
    if gradients:
        check_gradients(Findings(study.accept), study, device_copy(study.model, device, study.examples))
    n, d = len(study.examples), len(study.components)
    few = np.unique(np.linspace(0, n - 1, min(n, PILOT_EXAMPLES)).astype(int))
    small = dataclasses.replace(study, examples=study.examples.subset(few))
    differentiable, half = has_gradients(study, device=device), FIRST_MASKS // 2
    with tempfile.TemporaryDirectory() as folder:
        run = collect(
            small,
            Path(folder) / "pilot.zarr",
            gradients=FIRST_GRADIENTS if differentiable else 0,
            masks=0 if differentiable else FIRST_MASKS,
            validation_masks=VALIDATION_MASKS,
            device=device,
            precision=precision,
            execution=execution,
        )
        per_mask, per_gradient = measure(study, run, device=device, batch_size=execution.batch_size)
        before = (
            None if differentiable else quality_of(fit(run, masks=half, name="half", progress=False), 0, half, None)
        )
        pilot = quality_of(
            fit(run, progress=False), MaskGradients(run).count, 0 if differentiable else FIRST_MASKS, before
        )
        disk = _disk_bytes(
            run, Path(folder), examples=n, rows=masks + test_masks, rounds=len(next_rounds(0, gradients))
        )
    seconds = per_mask * (masks + test_masks) + (per_gradient * gradients if gradients else 0.0)
    method, device_of_fit = ("informed" if gradients else "ridge"), torch.device("cpu")
    memory = plan_fit(
        method,
        masks=masks,
        components=d,
        examples=n,
        chunk=rows_of_chunk(n, d),
        limit=max(limit_of(None, device_of_fit), LEAST_LIMIT),
        device=device_of_fit,
        gradients=gradients,
        sites=len(study.components.sites()),
    )
    return Estimate(
        seconds_per_mask=per_mask,
        seconds_per_gradient=per_gradient,
        passes=seconds / per_mask,
        hours=seconds / workers / 3600,
        disk_bytes=disk,
        fit_bytes=float(memory.needed),
        pilot=pilot,
        passes_per_hundredth=_passes_for(0.01, pilot, d, per_gradient / per_mask),
    )


def _disk_bytes(pilot: Run, folder: Path, *, examples: int, rows: int, rounds: int) -> float:
    """Return the bytes of a run with one fit, from what arrays of a pilot run take on disk after compression.

    Args:
        pilot: The pilot run, with its fits.
        folder: The folder that has it alone.
        examples: Number of examples of the run.
        rows: Number of its masks.
        rounds: Number of its rounds of mask gradients.
    """
    stored = Counter[str]()
    for file in folder.rglob("*"):
        if file.is_file():
            stored[file.relative_to(folder).parts[1]] += file.stat().st_size
    more = examples / pilot.n_examples
    by_masks, by_rounds = rows / len(pilot.plan), rounds / max(len(MaskGradients(pilot).rounds), 1)
    growth = {"outputs": more * by_masks, "masks": by_masks, "base_output": more, "example": more}
    growth |= dict.fromkeys(ARRAYS, more * by_rounds) | {"attributions": more / len(fit_names(pilot))}
    return sum(size * growth.get(name, 1.0) for name, size in stored.items())


def _passes_for(rise: float, now: RunQuality, components: int, ratio: float) -> float:
    """Return the number of passes that promise a rise, in steps of 10 %; infinite when it is out of reach."""
    passes = 1.0
    while passes < 1e7:
        by_gradients = now.rise(int(passes / ratio), 0, components) if now.gradients else 0.0
        if max(by_gradients, now.rise(0, int(passes), components)) >= rise:
            return passes
        passes *= 1.1
    return math.inf


def _timed(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of a few calls, after a warm-up call."""
    work()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
