"""The estimated cost of a run, from a few timed passes and a small pilot run."""

import dataclasses
import logging
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from coar.collection.collect import blocks_of, collect
from coar.collection.execution import DEFAULTS, Execution
from coar.collection.preparation import BatchSettings, RunRequest, fast_runner, prepare
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
from coar.store.lock import write_lock
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
        seconds_to_prepare: To copy and check the model, to compute constants and to read the examples, on each worker.
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
    seconds_to_prepare: float
    passes: float
    hours: float
    disk_bytes: float
    fit_bytes: float
    pilot: RunQuality | None = None
    passes_per_hundredth: float = math.nan


class PassSeconds(NamedTuple):
    """Seconds over all examples of a study.

    Attributes:
        mask: One mask.
        gradient: One mask gradient; NaN if they are not measured.
        load: Reading the examples.
    """

    mask: float
    gradient: float
    load: float


def has_gradients(study: Study, *, device: str = "auto") -> bool:
    """Return whether mask gradients exist: parameter slices have no gate to differentiate by, some outputs detach."""
    try:
        check_gradients(Findings(study.accept), study, device_copy(study.model, device, study.examples))
    except AblationError as error:
        log.info("without mask gradients: %s", error)
        return False
    return True


@memory_kept()
def measure(
    study: Study, run: Run, *, gradients: bool, device: str = "auto", batch_size: int | None = None
) -> PassSeconds:
    """Return the seconds of passes over all examples, from timed passes over a block of them.

    Args:
        study: The study.
        run: A run of it, or of some of its examples.
        gradients: Whether to measure mask gradients.
        device: Where to compute.
        batch_size: Most examples per forward pass.
    """
    worker = fast_runner(study, run, device_copy(study.model, device, study.examples), batch_size=batch_size)
    examples = min(run.blocks[1], len(study.examples))
    scale, start = len(study.examples) / examples, time.perf_counter()
    block = worker.load(study.examples, 0, examples)
    load = (time.perf_counter() - start) * scale
    masks = run.sampler.masks("train", range(TIMED_MASKS), run.n_components)
    seconds = _timed(lambda: worker.outputs(block, masks)) / TIMED_MASKS * scale
    if not gradients:
        return PassSeconds(seconds, math.nan, load)
    mask_groups = np.arange(examples) % TIMED_GRADIENTS
    keeps = run.sampler.masks("gradient", range(TIMED_GRADIENTS**2), run.n_components)
    keeps = keeps.reshape(TIMED_GRADIENTS, TIMED_GRADIENTS, -1)
    taken = _timed(lambda: worker.mask_gradients(block, keeps, mask_groups)) / TIMED_GRADIENTS * scale
    return PassSeconds(seconds, taken, load)


@memory_kept()
def prepare_timed(
    study: Study, place: Path, *, gradients: bool, device: str, precision: str, execution: Execution
) -> float:
    """Create a run with validation masks and perhaps the first mask gradients; return the seconds without its passes.

    Args:
        study: The study.
        place: A path that does not exist yet.
        gradients: Whether the run has mask gradients, which are checked first.
        device: Where to compute.
        precision: `float32`, `bf16` or `auto`.
        execution: Batches and memory.
    """
    start = time.perf_counter()
    model = device_copy(study.model, device, study.examples)
    batches = BatchSettings.choose(study, model, execution, gradients=gradients)
    order = RunRequest(
        requested={("validation", study.sampler.ablated_fraction): VALIDATION_MASKS},
        gradients=FIRST_GRADIENTS if gradients else 0,
        blocks=blocks_of(VALIDATION_MASKS, len(study.examples), execution.mask_block, execution.example_block),
        memory_limit=execution.memory_limit,
        precision=precision,
        tolerance=execution.precision_tolerance,
        round_gradients=execution.round_gradients,
    )
    with write_lock(place):
        prepare(study, place, model, order, batches)
    return time.perf_counter() - start


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
    differentiable, half = bool(gradients) or has_gradients(study, device=device), FIRST_MASKS // 2
    how: dict[str, Any] = {"device": device, "precision": precision, "execution": execution}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "pilot.zarr"
        preparation = prepare_timed(small, place, gradients=bool(gradients), **how)
        run = collect(
            small,
            place,
            gradients=FIRST_GRADIENTS if differentiable else 0,
            masks=0 if differentiable else FIRST_MASKS,
            validation_masks=VALIDATION_MASKS,
            **how,
        )
        batch_size = execution.batch_size
        per_mask, per_gradient, load = measure(
            study, run, gradients=differentiable, device=device, batch_size=batch_size
        )
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
    unablated = per_mask if masks + test_masks else 0.0
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
        seconds_to_prepare=preparation + load,
        passes=seconds / per_mask,
        hours=(preparation + load + (seconds + unablated) / workers) / 3600,
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
