"""Before and while money is spent: what a run will cost, what more passes would buy, and when to stop."""

import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from coar.attributions import Attributions
from coar.devices import choose_device, device_copy
from coar.engines import collect, try_probe, worker_of
from coar.errors import AblationError, SettingsError
from coar.memory import memory_kept
from coar.regression import fit
from coar.store import Probes, Run
from coar.store.layout import ROUND
from coar.store.probes import ROUNDS
from coar.study import Study

log = logging.getLogger(__name__)

FIRST_PROBES, FIRST_MASKS = 32, 256
VALIDATION_MASKS = 64
GROWTH = 1.5  # of the passes from one round to the next
FLAT = 0.005  # least rise in correlation that half as many passes again must promise
PILOT_EXAMPLES = 64
STEPS = 20
TIMED_MASKS, TIMED_PROBES, REPETITIONS = 8, 4, 3


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        probes, masks: How many there are.
        correlation: Mean correlation of the fit on validation masks.
        reachable: Estimated correlation of the best linear model; NaN where only masks are there to tell.
        deviation: Standard error of `reachable`, roughly; NaN likewise.
        error: Share of the outputs' variance that the weights' errors cost, estimated.
        explained: Share that they explain.
    """

    probes: int
    masks: int
    correlation: float
    reachable: float = math.nan
    deviation: float = math.nan
    error: float = math.nan
    explained: float = math.nan

    def rise(self, probes: int, masks: int, components: int) -> float:
        """Predict how far more probes or masks raise the correlation.

        Errors from probes fall as one over their number, and masks shrink them as ridge does for components alike, by
        1 / (1 + masks * error / (components * noise)). Without probes they fall as one over the number of masks.
        """
        gain = self._left(self.probes, self.masks, components)
        gain -= self._left(self.probes + probes, self.masks + masks, components)
        return math.sqrt(self.correlation**2 + max(gain, 0.0)) - self.correlation

    def ceiling(self) -> str:
        """Say how far the best linear model is estimated to reach."""
        if math.isnan(self.reachable):
            return "masks alone do not tell what is reachable"
        return f"the linear model's ceiling is estimated at {self.reachable:.3f} +- {self.deviation:.3f}"

    def _left(self, probes: int, masks: int, components: int) -> float:
        """Return the share of variance that errors still cost."""
        if not self.probes:
            return self.error * self.masks / max(masks, 1)
        noise = max(1 - self.explained - self.error, 1e-3)
        left = self.error * self.probes / probes
        return left / (1 + masks * left / (components * noise))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run would cost.

    Attributes:
        seconds_per_mask, seconds_per_probe: For all examples, on one worker; the second is NaN without gradients.
        passes: Forward passes over all examples, a probe counted by its measured time.
        hours: On all workers.
        disk_bytes: Size of the run with one fit.
        fit_bytes: Memory that fitting takes.
        pilot: What a small run of some examples reached, None when none was made.
        passes_per_hundredth: Passes that raise the correlation by another 0.01 after the pilot; infinite where the
            linear model's ceiling is nearer.
    """

    seconds_per_mask: float
    seconds_per_probe: float
    passes: float
    hours: float
    disk_bytes: float
    fit_bytes: float
    pilot: Progress | None = None
    passes_per_hundredth: float = math.nan


def has_gradients(study: Study, *, device: str = "auto") -> bool:
    """Say whether probes can be had: parameter slices have no gate that a gradient could pass, some outputs detach."""
    try:
        try_probe(study, device_copy(study.model, choose_device(device)))
    except AblationError as error:
        log.info("without probes: %s", error)
        return False
    return True


def collect_until(
    study: Study,
    path: str | Path,
    *,
    correlation: float | None = None,
    validation_masks: int = VALIDATION_MASKS,
    report: Callable[[Progress], None] | None = None,
    **options: Any,
) -> tuple[Run, str]:
    """Collect until validation masks are predicted well enough, or until more passes promise little.

    Each round spends half as many passes again as before, on probes or on masks, whichever promises more per pass. It
    ends when the correlation is reached, when the best promise is under 0.005, or when the linear model's estimated
    ceiling lies below the correlation by more than two standard errors.

    Args:
        study: What is examined.
        path: The run, new or old.
        correlation: Mean correlation on validation masks to reach; None to go on until it is flat.
        validation_masks: Masks to judge by.
        report: Called after each round.
        options: As for `coar.collect`.

    Returns:
        The run, and in words why collecting ended.

    Raises:
        SettingsError: When the correlation is outside (0, 1), or there are fewer than 16 validation masks.
    """
    if correlation is not None and not 0 < correlation < 1:
        raise SettingsError(f"a correlation of {correlation} was asked for; give a number between 0 and 1")
    if validation_masks < 16:
        raise SettingsError(f"{validation_masks} validation masks judge nothing; give 16 or more, 64 is usual")
    gradients, ratio = has_gradients(study, device=options.get("device", "auto")), 1.0
    probes, masks = (FIRST_PROBES, 0) if gradients else (0, FIRST_MASKS)
    before: Progress | None = None
    for _ in range(STEPS):
        run = collect(study, path, probes=probes, masks=masks, validation_masks=validation_masks, **options)
        probes, masks = Probes(run).count, run.plan.count("train", study.sampler.ablated_fraction)
        now = _progress(fit(run, progress=False), probes, masks, before)
        if report:
            report(now)
        if correlation is not None and now.correlation >= correlation:
            return run, f"reached {now.correlation:.3f}, and {correlation} was asked for"
        if before is None and gradients:
            per_mask, per_probe = measure(study, run, **_where(options))
            ratio = per_probe / per_mask
        more = _next(now, gradients, run.n_components, ratio)
        promise = now.rise(*more, run.n_components)
        if (
            correlation is not None
            and now.probes >= 2 * FIRST_PROBES
            and now.reachable + 2 * now.deviation < correlation
        ):
            return run, f"stopped at {now.correlation:.3f} short of {correlation}: {now.ceiling()}"
        if promise < FLAT:
            short = (
                f"stopped at {now.correlation:.3f} short of {correlation}"
                if correlation
                else f"flat at {now.correlation:.3f}"
            )
            return run, f"{short}: half as many passes again promise {promise:+.4f}; {now.ceiling()}"
        probes, masks, before = probes + more[0], masks + more[1], now
    return run, f"stopped at {now.correlation:.3f} after {STEPS} rounds"


@memory_kept()
def measure(study: Study, run: Run, *, device: str = "auto", batch_size: int | None = None) -> tuple[float, float]:
    """Return the seconds that one mask and one probe take over all examples, NaN for a probe without gradients."""
    worker = worker_of(study, run, device_copy(study.model, choose_device(device)), batch_size=batch_size)
    examples = min(run.blocks[1], len(study.examples))
    block = worker.load(study.examples, 0, examples)
    scale = len(study.examples) / examples
    masks = run.sampler.masks("train", range(TIMED_MASKS), run.n_components)
    seconds = _timed(lambda: worker.outputs(block, masks)) / TIMED_MASKS * scale
    if not has_gradients(study, device=device):
        return seconds, math.nan
    slots = np.arange(examples) % TIMED_PROBES
    probes = run.sampler.masks("probe", range(TIMED_PROBES**2), run.n_components)
    probes = probes.reshape(TIMED_PROBES, TIMED_PROBES, -1)
    return seconds, _timed(lambda: worker.probe(block, probes, slots)) / TIMED_PROBES * scale


def estimate(
    study: Study,
    *,
    masks: int,
    probes: int = 0,
    test_masks: int = 0,
    workers: int = 1,
    device: str = "auto",
    precision: str = "float32",
    batch_size: int | None = None,
) -> Estimate:
    """Say what a run will cost, from timing a few passes and a pilot on some of the examples.

    Args:
        study: What will be examined.
        masks: Training masks.
        probes: Probes.
        test_masks: Held-out masks.
        workers: How many machines like this one share the work.
        device: Where to compute.
        precision: `float32`, `bf16` or `auto`.
        batch_size: Most examples per forward pass.

    Raises:
        SettingsError: When a number is out of range.
        AblationError: When probes are asked of components or of an output that have no gradient.
    """
    counts = (masks, probes, test_masks, workers)
    whole = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
    if not whole or not workers or not masks + probes:
        raise SettingsError(
            f"{masks} masks, {probes} probes, {test_masks} test masks on {workers} workers make no run; ask for masks "
            f"or probes, and one worker or more"
        )
    if probes:
        try_probe(study, device_copy(study.model, choose_device(device)))
    n, d = len(study.examples), len(study.components)
    few = np.unique(np.linspace(0, n - 1, min(n, PILOT_EXAMPLES)).astype(int))
    small = dataclasses.replace(study, examples=study.examples.subset(few))
    where: dict[str, Any] = {"device": device, "batch_size": batch_size}
    gradients, half = has_gradients(study, device=device), FIRST_MASKS // 2
    with tempfile.TemporaryDirectory() as folder:
        run = collect(
            small,
            Path(folder) / "pilot.zarr",
            probes=FIRST_PROBES if gradients else 0,
            masks=0 if gradients else FIRST_MASKS,
            validation_masks=VALIDATION_MASKS,
            precision=precision,
            **where,
        )
        per_mask, per_probe = measure(study, run, **where)
        before = None if gradients else _progress(fit(run, masks=half, name="half", progress=False), 0, half, None)
        pilot = _progress(fit(run, progress=False), Probes(run).count, 0 if gradients else FIRST_MASKS, before)
    seconds = per_mask * (masks + test_masks) + (per_probe * probes if probes else 0.0)
    rounds = max(-(-probes // ROUND), min(ROUNDS, probes))
    return Estimate(
        seconds_per_mask=per_mask,
        seconds_per_probe=per_probe,
        passes=seconds / per_mask,
        hours=seconds / workers / 3600,
        disk_bytes=4 * n * (masks + test_masks + probes) + (masks + test_masks) * d / 8 + 8 * n * d * (rounds + 1),
        fit_bytes=float(
            3 * 8 * min(masks, d) ** 2 + 4 * min(masks, 4096) * d + 8 * d * min(n, 2**28 // (8 * d)) + 2**28
        ),
        pilot=pilot,
        passes_per_hundredth=_passes_for(0.01, pilot, d, per_probe / per_mask),
    )


def _passes_for(rise: float, now: Progress, components: int, ratio: float) -> float:
    """Return the fewest passes that promise a rise, doubling until they do; infinite beyond what is reachable."""
    passes = 1.0
    while passes < 1e7:
        by_probes = now.rise(int(passes / ratio), 0, components) if now.probes else 0.0
        if max(by_probes, now.rise(0, int(passes), components)) >= rise:
            return passes
        passes *= 1.1
    return math.inf


def _where(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("device", "batch_size") if name in options}


def _timed(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of a few calls, after one that also pays for kernels to be chosen."""
    work()
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _progress(fitted: Attributions, probes: int, masks: int, before: Progress | None) -> Progress:
    facts = fitted.facts["fit"]
    correlation = float(facts["validation"])
    quality = facts.get("prior_quality")
    if quality:
        # a mean of squares cannot be below zero, though its estimate can
        error = max(quality["error"], quality["deviation"] / 2)
        width = quality["deviation"] / (2 * max(quality["reachable"], 0.1))
        return Progress(probes, masks, correlation, quality["reachable"], width, error, quality["explained"])
    # from masks alone, errors fall as one over their number: the last rise tells how far there is to go
    rise = correlation**2 - before.correlation**2 if before else 0.25
    error = max(rise * (before.masks / (masks - before.masks) if before and masks > before.masks else 1.0), 0.0)
    return Progress(probes, masks, correlation, error=error, explained=correlation**2)


def _next(now: Progress, gradients: bool, components: int, ratio: float) -> tuple[int, int]:
    """Return the probes and the masks of the next round: all of one kind, whichever promises more per pass."""
    spend = (GROWTH - 1) * (ratio * now.probes + now.masks)
    masks = max(int(spend), 64)
    probes = max(int(spend / ratio), 8) if gradients else 0
    better = now.rise(probes, 0, components) >= now.rise(0, masks, components) if gradients else False
    return (probes, 0) if better else (0, masks)
