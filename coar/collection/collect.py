"""Collection of a run: it checks the settings, prepares the run, and does its units."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn

from coar.cluster import RayCluster
from coar.collection.execution import DEFAULTS, Execution
from coar.collection.preparation import BatchSettings, RunRequest, check_same, prepare, tuned, unit_runner
from coar.collection.ray_engine import collect_on_cluster
from coar.collection.units import Stage, UnitProgress, UnitRunner, gradient_stage, interrupts, mask_stage
from coar.errors import SettingsError
from coar.forward.copies import device_copy
from coar.forward.devices import choose_device
from coar.forward.execution_plan import PRECISIONS
from coar.forward.malloc import memory_kept
from coar.renamed import new_arguments_only
from coar.sampling import Split
from coar.store.gradients import check_count
from coar.store.lock import Lock, worker_lock, write_lock
from coar.store.places import Address, locate
from coar.store.plan import Unit, check_worker
from coar.store.run import Run
from coar.study import Study

MASK_BLOCK = 64  # masks per unit: a unit is seconds of work, so an interruption costs little
EXAMPLE_BLOCK = 512  # examples per unit at most
MOST_UNITS = 2**17  # blocks grow beyond this: each unit is an object to list and a task to assign
LARGEST = 4096  # masks per unit at most, and examples


@new_arguments_only
def collect(
    study: Study,
    path: str | Path | Address,
    *,
    masks: int = 0,
    gradients: int = 0,
    test_masks: int = 0,
    validation_masks: int = 0,
    test_fractions: Sequence[float] = (),
    device: str = "auto",
    precision: str = "float32",
    execution: Execution = DEFAULTS,
    worker: tuple[int, int] = (1, 1),
    cluster: RayCluster | None = None,
    progress: bool = True,
) -> Run:
    """Record outputs under random masks, and mask gradients; resume or extend the run when it exists.

    Args:
        study: The study.
        path: The run: a path that does not exist yet, or a run of the same study; or its address in an object store,
            as in `s3://bucket/digits.zarr`.
        masks: Number of training masks, including those that the run already has.
        gradients: Number of mask gradients, for informed attributions: forward and backward passes that give the
            output's gradient by every gate, each example under masks of its own.
        test_masks: Held-out masks at the sampler's fraction, for `coar.evaluate`.
        validation_masks: Masks for choices such as when to stop.
        test_fractions: Further ablated fractions, at each of which `test_masks` held-out masks are drawn.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `float32`, `bf16` (automatic mixed precision), or `auto`, which takes bfloat16 when it is faster and
            within the tolerance on the first unit.
        execution: Batches, memory and units of work.
        worker: k and n: do the k-th of n equal shares of the units, while other processes do the others. Give all of
            them the same settings; the first one creates or extends the run.
        cluster: Do the units on a Ray cluster instead of in this process.
        progress: Show a progress bar.

    Returns:
        The run; complete, unless this process is one worker of several.

    Raises:
        SettingsError: When a setting is out of range, or one example does not fit into the memory limit.
        MismatchError: When the run was made for another study.
        AblationError: When mask gradients are requested and the components or the output have no gradient (nothing is
            stored then); or when two ways of ablating disagree.
        OutputError: When an output is not finite; the message names mask and example, and the unit is not stored.
        StorageError: When the disk or the object store fails; what was stored before stays.
        RunError: When another process is writing to the run.
        EngineError: When the cluster cannot be reached, or its workers fail.
        KeyboardInterrupt: After Ctrl-C, once the current unit is stored.
    """
    _check_settings(masks or gradients or test_masks or validation_masks, precision)
    if cluster is not None and worker != (1, 1):
        raise SettingsError("a worker of a job array and a cluster were given; a cluster distributes the units itself")
    if cluster is not None:
        cluster.builder()  # raises before the run is created
    place, among = locate(path), check_worker(worker)
    requested = _requested(study.sampler.ablated_fraction, masks, test_masks, validation_masks, test_fractions)
    total = sum(count for count in requested.values() if isinstance(count, int))  # `Plan` refuses other values
    order = RunRequest(
        requested=requested,
        gradients=check_count(gradients),
        blocks=blocks_of(total, len(study.examples), execution.mask_block, execution.example_block),
        memory_limit=execution.memory_limit,
        precision=precision,
        tolerance=execution.precision_tolerance,
        round_gradients=execution.round_gradients,
    )
    choose_device(device)  # raises before the run is created
    with _hold(place, among, order) as lock, memory_kept():
        model = device_copy(study.model, device, study.examples)
        batches = BatchSettings.choose(study, model, execution, gradients=bool(gradients))
        if lock.alone:
            run = prepare(study, place, model, order, batches)
        else:
            run = Run.open(place)
            check_same(run, study.fingerprint(), precision)
        if among != (1, 1):
            lock.share()
        if cluster is not None:
            collect_on_cluster(cluster, run, device=device, execution=execution, progress=progress)
        else:
            _collect_here(study, run, model, batches, among, progress=progress)
    return run


def _hold(place: Path | Address, worker: tuple[int, int], order: RunRequest) -> AbstractContextManager[Lock]:
    """Take an exclusive lock, or for one of several workers a shared lock once the request is met."""
    return write_lock(place) if worker == (1, 1) else worker_lock(place, prepared=lambda: order.is_met(place))


def _collect_here(
    study: Study, run: Run, model: nn.Module, batches: BatchSettings, worker: tuple[int, int], *, progress: bool
) -> None:
    """Do a worker's missing units in this process, one after another."""
    runner = unit_runner(study, run, model, batches)
    mask_gradients, masks = gradient_stage(run, worker), mask_stage(run, worker)
    _work_off(runner, mask_gradients, run, progress=progress, more=bool(masks.missing))
    missing = [unit for unit in masks.missing if isinstance(unit, Unit)]
    runner.masks = tuned(study, run, runner.masks, missing, batches)
    _work_off(runner, masks, run, progress=progress)


def _work_off(runner: UnitRunner, stage: Stage, run: Run, *, progress: bool, more: bool = False) -> None:
    """Do a stage's missing units; `more` is whether other work follows, which an interruption leaves undone."""
    if not stage.share:
        return
    with interrupts() as stopped, UnitProgress(stage, shown=progress) as tally:
        for unit in stage.missing:
            runner.do(unit)
            tally.add(unit)
            if stopped.is_set() and (tally.left or more):
                raise tally.interrupted(run)


def blocks_of(masks: int, examples: int, mask_block: int | None, example_block: int | None) -> tuple[int, int]:
    """Return masks and examples per unit: given values, or defaults that grow until there are at most `MOST_UNITS`."""
    width, height = EXAMPLE_BLOCK, MASK_BLOCK
    while math.ceil(masks / height) * math.ceil(examples / width) > MOST_UNITS and (height, width) != (LARGEST,) * 2:
        if height <= width and height < LARGEST:
            height *= 2
        else:
            width *= 2
    return mask_block or height, example_block or math.ceil(examples / math.ceil(examples / width))


def _requested(
    fraction: float, masks: int, test_masks: int, validation_masks: int, test_fractions: Sequence[float]
) -> dict[tuple[Split, float], int]:
    """Return the number of masks by split and ablated fraction, in the order of collection."""
    requested: dict[tuple[Split, float], int] = {("test", at): test_masks for at in sorted({fraction, *test_fractions})}
    return requested | {("validation", fraction): validation_masks, ("train", fraction): masks}


def _check_settings(passes: int, precision: str) -> None:
    if passes == 0:
        raise SettingsError(
            "zero masks and zero mask gradients were requested; request at least 2 masks, better several "
            "thousand, or 32 mask gradients"
        )
    if precision not in PRECISIONS:
        raise SettingsError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
