"""Collection in rounds until a correlation is reached or more passes promise little."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from coar.cluster import RayCluster
from coar.collection.collect import collect
from coar.collection.cost import has_gradients, measure
from coar.collection.execution import DEFAULTS, Execution
from coar.collection.quality import FIRST_GRADIENTS, FIRST_MASKS, VALIDATION_MASKS, RunQuality, quality_of
from coar.errors import SettingsError
from coar.regression.fitting import fit
from coar.renamed import new_arguments_only
from coar.store.gradients import MaskGradients
from coar.store.run import Run
from coar.study import Study

log = logging.getLogger(__name__)

GROWTH = 1.5  # of the passes, from one round to the next
FLAT = 0.005  # least predicted rise in correlation for 50 % more passes
STEPS = 20


class CollectOptions(TypedDict, total=False):
    """Options of `coar.collect` that are the same for every round of `collect_until`."""

    test_masks: int
    test_fractions: Sequence[float]
    device: str
    precision: str
    execution: Execution
    worker: tuple[int, int]
    cluster: RayCluster | None
    progress: bool


@new_arguments_only
def collect_until(
    study: Study,
    path: str | Path,
    *,
    correlation: float | None = None,
    validation_masks: int = VALIDATION_MASKS,
    report: Callable[[RunQuality], None] | None = None,
    **options: Unpack[CollectOptions],
) -> tuple[Run, str]:
    """Collect until validation masks are predicted well enough, or until more passes promise little.

    Each round increases the passes by half, on mask gradients or on masks, whichever promises more per pass. Collecting
    ends when the correlation is reached, when the best predicted rise is under 0.005, or when the linear model's
    estimated ceiling is below the correlation by more than two standard errors.

    Args:
        study: The study.
        path: The run, new or existing.
        correlation: Target mean correlation on validation masks; None to continue until it is flat.
        validation_masks: Number of validation masks.
        report: Called after each round.
        options: Test masks, device, precision, execution, worker, cluster and progress, as for `coar.collect`.

    Returns:
        The run, and the reason why collecting ended.

    Raises:
        SettingsError: When the correlation is outside (0, 1), or there are fewer than 16 validation masks.
    """
    if correlation is not None and not 0 < correlation < 1:
        raise SettingsError(f"a correlation of {correlation} was requested; give a number between 0 and 1")
    if validation_masks < 16:
        raise SettingsError(
            f"{validation_masks} validation masks are too few to judge by; give 16 or more, 64 is usual"
        )
    gradients, ratio = has_gradients(study, device=options.get("device", "auto")), 1.0
    mask_gradients, masks = (FIRST_GRADIENTS, 0) if gradients else (0, FIRST_MASKS)
    before: RunQuality | None = None
    for _ in range(STEPS):
        run = collect(study, path, gradients=mask_gradients, masks=masks, validation_masks=validation_masks, **options)
        mask_gradients, masks = MaskGradients(run).count, run.plan.count("train", study.sampler.ablated_fraction)
        now = quality_of(fit(run, progress=False), mask_gradients, masks, before)
        if report:
            report(now)
        if correlation is not None and now.correlation >= correlation:
            return run, f"reached {now.correlation:.3f}, and {correlation} was requested"
        if before is None and gradients:
            per_mask, per_gradient, _ = measure(
                study,
                run,
                gradients=True,
                device=options.get("device", "auto"),
                batch_size=options.get("execution", DEFAULTS).batch_size,
            )
            ratio = per_gradient / per_mask
        more = _next(now, gradients, run.n_components, ratio)
        promise = now.rise(*more, run.n_components)
        if (
            correlation is not None
            and now.gradients >= 2 * FIRST_GRADIENTS
            and now.reachable + 2 * now.deviation < correlation
        ):
            return run, f"stopped at {now.correlation:.3f} short of {correlation}: {now.ceiling()}"
        if promise < FLAT:
            short = (
                f"stopped at {now.correlation:.3f} short of {correlation}"
                if correlation
                else f"flat at {now.correlation:.3f}"
            )
            return run, f"{short}: 50 % more passes promise {promise:+.4f}; {now.ceiling()}"
        mask_gradients, masks, before = mask_gradients + more[0], masks + more[1], now
    return run, f"stopped at {now.correlation:.3f} after {STEPS} rounds"


def _next(now: RunQuality, gradients: bool, components: int, ratio: float) -> tuple[int, int]:
    """Return the mask gradients and the masks of the next round: all of one kind, whichever promises more per pass."""
    spend = (GROWTH - 1) * (ratio * now.gradients + now.masks)
    masks = max(int(spend), 64)
    mask_gradients = max(int(spend / ratio), 8) if gradients else 0
    better = now.rise(mask_gradients, 0, components) >= now.rise(0, masks, components) if gradients else False
    return (mask_gradients, 0) if better else (0, masks)
