"""Where workers run: here, in this process, one unit after another, able to stop and go on at any unit."""

import dataclasses
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from coar.ablation import called_sites, following_batch_norms
from coar.checks import (
    check_finite,
    check_probes_finite,
    choose_precision,
    compare_precisions,
    compare_rows,
    compare_with_hooks,
)
from coar.errors import MismatchError, SettingsError
from coar.progress import progress_bar
from coar.sampling import Split
from coar.store import Plan, Probes, ProbeUnit, Run, Unit
from coar.store.arrays import storage_errors, sweep
from coar.store.lock import write_lock
from coar.store.probes import check_probes
from coar.store.run import local_path, needs_creation
from coar.study import Study
from coar.tuning import batch_sizes, choose_pace
from coar.worker import CHOICES, Block, ModelRunner, Worker, choose_device, device_copy

log = logging.getLogger(__name__)
AnyUnit = TypeVar("AnyUnit", Unit, ProbeUnit)

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
MASK_BLOCK = 64  # masks per unit: seconds of work, so that an interruption costs little
EXAMPLE_BLOCK = 512  # examples per unit at most
CHECK_MASKS = 16  # masks on which precisions are compared
CHECK_EXAMPLES = 32  # examples on which batch norms are told to follow a site
CHECK_ROWS = 8  # examples on which a mask per row is compared with one mask for all


def collect(
    study: Study,
    path: str | Path,
    *,
    masks: int = 0,
    probes: int = 0,
    test_masks: int = 0,
    validation_masks: int = 0,
    test_fractions: Sequence[float] = (),
    device: str = "auto",
    precision: str = "float32",
    precision_tolerance: float = 0.05,
    batch_size: int | None = None,
    mask_block: int = MASK_BLOCK,
    example_block: int | None = None,
    memory_limit: int | str | None = None,
    compile: bool = False,  # noqa: A002
    progress: bool = True,
) -> Run:
    """Record outputs under random masks, and gradients under probes; go on with, or extend, the run when it exists.

    Args:
        study: What is examined.
        path: The run: a path that does not exist yet, or a run of the same study.
        masks: Training masks the run shall have; those it already has count.
        probes: Probes the run shall have, for informed attributions: forward and backward passes that give the output's
            gradient by every gate, each example under masks of its own.
        test_masks: Held-out masks at the sampler's fraction, for `coar.evaluate`.
        validation_masks: Masks kept apart for choices made along the way.
        test_fractions: Further ablated fractions, at each of which `test_masks` held-out masks are drawn.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `float32`, `bf16` (automatic mixed precision), or `auto`, which takes bfloat16 when it is faster and
            within the tolerance on the first unit.
        precision_tolerance: Largest root mean square difference that bfloat16 may make, in units of the outputs'
            standard deviation over masks.
        batch_size: Most examples per forward pass; by default at most 128 on a CPU, 512 on CUDA, 256 on MPS, and what
            is measured to be fastest, which may be several masks per forward pass.
        mask_block: Masks per unit of work; fixed when the run is created.
        example_block: Examples per unit of work; fixed when the run is created; by default at most 512.
        memory_limit: Bytes, or text such as `4GiB`, that activations may take, measured on some examples; by default
            80 % of what is free on a CUDA device, and no limit elsewhere. Give this or a batch size.
        compile: Compile the model, if that is faster on the first unit; a warning says why where it fails.
        progress: Show a progress bar.

    Returns:
        The complete run.

    Raises:
        SettingsError: When a setting is out of range, or one example does not fit into the memory limit.
        MismatchError: When the run was made for another study.
        AblationError: When probes are asked of components or of an output that have no gradient, and nothing is made
            then; or when two ways of ablating disagree.
        OutputError: When an output is not finite; it names the mask and the example, and the unit is not stored.
        KeyboardInterrupt: After Ctrl-C, once the current unit is stored.
    """
    sizes = {"batch size": batch_size, "mask block": mask_block, "example block": example_block}
    _check_settings(masks or probes or test_masks or validation_masks, precision, precision_tolerance, sizes)
    if batch_size is not None and memory_limit is not None:
        raise SettingsError(f"batch size {batch_size} and memory limit {memory_limit} both bound a batch; give one")
    check_probes(probes)
    wanted = _wanted(study.sampler.ablated_fraction, masks, test_masks, validation_masks, test_fractions)
    target = choose_device(device)
    fingerprint = study.fingerprint()
    root = local_path(path)
    with write_lock(root):
        model = device_copy(study.model, target)
        batches = (batch_size, batch_size)  # rows per forward pass of masks, and of probes
        if batch_size is None:
            batches = batch_sizes(study, model, memory_limit=memory_limit, probes=bool(probes))
        if probes:
            try_probe(study, model, batch_size=batches[1])
        if needs_creation(root):
            plan = Plan().extended(wanted)
            blocks = (mask_block, example_block or _balanced(len(study.examples)))
            run = _create(study, root, model, fingerprint, plan, blocks, batches[0], precision, precision_tolerance)
        else:
            run = Run.open(root)
        _check_same(run, fingerprint, precision)
        _make_ready(run, run.plan.extended(wanted))
        probing = Probes(run)
        probing.extend(probes)
        _collect_probes(study, probing, worker_of(study, run, model, batch_size=batches[1]), progress=progress)
        worker = worker_of(study, run, model, batch_size=batches[0])
        if run.missing_units() and (batch_size is None or compile):
            _set_pace(study, run, worker, model, tune=batch_size is None, compiled=compile)
        _collect_units(study, run, worker, progress=progress)
    return run


def _make_ready(run: Run, plan: Plan) -> None:
    """Remove what a killed writer left behind, and give the run the rows of a plan."""
    with storage_errors(run.path):
        for stray in sweep(run.path):
            log.info("removed %s, left by a writer that was killed", stray)
    if plan != run.plan or not run.rows_intact():
        run.extend(plan)


def worker_of(study: Study, run: Run, model: nn.Module, *, batch_size: int | None = None) -> Worker:
    """Return a worker that computes as the run does, on a copy of the model made by `device_copy`."""
    return Worker(
        model,
        run.components,
        torch.from_numpy(run.replacements),
        study.output,
        batch_norms=run.facts["batch_norms"],
        precision=run.facts["precision"]["name"],
        batch_size=batch_size,
    )


def try_probe(study: Study, model: nn.Module, *, batch_size: int | None = None) -> None:
    """Probe a few examples on a copy of the model; raise `AblationError` when there is no gradient to be had."""
    nothing = torch.zeros(len(study.components))
    worker = Worker(model, study.components, nothing, study.output, through_outputs=True, batch_size=batch_size)
    block = worker.load(study.examples, 0, CHECK_ROWS)
    compare_rows(worker, block, study.sampler.masks("probe", range(block.size), len(study.components)))


def _set_pace(study: Study, run: Run, worker: Worker, model: nn.Module, *, tune: bool, compiled: bool) -> None:
    """Choose batch size and masks per forward on the first missing unit, and check them against plain hooks there."""
    missing = [run.rows_of(unit) for unit in run.missing_units()]
    rows, span = missing[0]
    examples = study.examples.subset(range(span.start, span.stop))
    masks = run.plan.masks(run.sampler, run.n_components, rows.start, rows.stop)
    work = sum((r.stop - r.start) * (e.stop - e.start) for r, e in missing) / len(examples)
    pace = choose_pace(worker, examples, masks, work=work, tune=tune, compiled=compiled)
    log.info("pace: %s", pace)
    if pace.masks_per_forward > 1:
        parts = (model, run.components, torch.from_numpy(run.replacements), study.output)
        exact = Worker(*parts, batch_norms=run.facts["batch_norms"], batch_size=pace.batch_size)
        exact.masks_per_forward = pace.masks_per_forward
        block = exact.load(examples, 0, len(examples))
        compare_with_hooks(exact, parts, block, masks[: pace.masks_per_forward], {row.site for row in run.components})


def _collect_probes(study: Study, probes: Probes, worker: Worker, *, progress: bool) -> None:
    missing = probes.missing_units()
    share = {unit: _width(probes.examples_of(unit), probes.run) * probes.rounds[unit.round] for unit in probes.units()}

    def work(unit: ProbeUnit, block: Block) -> None:
        examples = probes.examples_of(unit)
        kept, ablated, outputs = worker.probe(block, probes.masks(unit.round), probes.slot_of(examples))
        check_probes_finite(study, unit, examples, kept, ablated, outputs)
        probes.write_unit(unit, kept, ablated, outputs)

    more = bool(probes.run.missing_units())
    _work_off(study, probes.run, worker, missing, share, probes.examples_of, work, "probe", progress, more=more)


def _collect_units(study: Study, run: Run, worker: Worker, *, progress: bool) -> None:
    missing = run.missing_units()
    spans = {unit: run.rows_of(unit) for unit in run.units()}
    share = {unit: _width(examples, run) * (rows.stop - rows.start) for unit, (rows, examples) in spans.items()}

    def work(unit: Unit, block: Block) -> None:
        rows = spans[unit][0]
        outputs = worker.outputs(block, run.plan.masks(run.sampler, run.n_components, rows.start, rows.stop))
        base = worker.base_output(block) if unit.mask_block == 0 else None
        check_finite(study, run, unit, outputs, base)
        run.write_unit(unit, outputs, base)

    _work_off(study, run, worker, missing, share, lambda unit: spans[unit][1], work, "mask", progress)


def _work_off(
    study: Study,
    run: Run,
    worker: Worker,
    missing: list[AnyUnit],
    share: dict[AnyUnit, float],
    examples_of: Callable[[AnyUnit], slice],
    work: Callable[[AnyUnit, Block], None],
    noun: str,
    progress: bool,
    *,
    more: bool = False,
) -> None:
    """Do the missing units one after another.

    `share` is each unit's size in passes over all examples, and `more` says whether other work follows.
    """
    if not share:
        return
    total, done = round(sum(share.values())), len(share) - len(missing)
    stored = sum(share.values()) - sum(share[unit] for unit in missing)
    block: Block | None = None
    loaded = slice(0)
    with (
        _interrupts() as stopped,
        progress_bar(
            total=total,
            initial=min(stored, total),
            unit=noun,
            desc=f"collect {noun}s",
            bar_format=BAR,
            shown=progress,
        ) as bar,
    ):
        for unit in missing:
            examples = examples_of(unit)
            if block is None or loaded != examples:
                block, loaded = worker.load(study.examples, examples.start, examples.stop), examples
            work(unit, block)
            done += 1
            bar.update(min(share[unit], total - bar.n))  # shares are fractions, and their sum may round up
            if stopped.is_set() and (done < len(share) or more):
                raise KeyboardInterrupt(
                    f"stopped after {noun} unit {done} of {len(share)}; everything so far is stored in {run.path}: "
                    f"run the same command again to go on"
                )


def _width(examples: slice, run: Run) -> float:
    """Return a block's share of all examples."""
    return float(examples.stop - examples.start) / run.n_examples


def _create(
    study: Study,
    path: Path,
    model: nn.Module,
    fingerprint: dict[str, Any],
    plan: Plan,
    blocks: tuple[int, int],
    batch_size: int | None,
    precision: str,
    tolerance: float,
) -> Run:
    """Measure what a run keeps for good (constants, precision, batch norms), then create it."""
    runner = ModelRunner(model, study.output, batch_size=batch_size)
    constants = study.ablation.replacements(model, study.components, batch_size=runner.batch_size)
    parts = (model, study.components, constants, study.output)
    few = runner.load(study.examples, 0, CHECK_EXAMPLES)

    def outputs(variant: nn.Module) -> Tensor:
        return torch.from_numpy(ModelRunner(variant, study.output).base_output(few))

    norms = following_batch_norms(model, study.components, run=outputs)
    fast = Worker(*parts, batch_norms=norms, batch_size=batch_size)
    masks = plan.masks(study.sampler, len(study.components), 0, min(CHECK_MASKS, blocks[0]))
    if not len(masks):  # nothing but probes is asked for
        masks = study.sampler.masks("probe", range(CHECK_MASKS), len(study.components))
    called = called_sites(model, study.components, run=outputs)
    facts: dict[str, Any] = {
        "batch_norms": norms,
        "gate_error": compare_with_hooks(fast, parts, few, masks[:2], called),
        "precision": {"name": "float32"},
    }
    if precision != "float32":
        block = fast.load(study.examples, 0, min(blocks[1], len(study.examples)))
        low = Worker(*parts, batch_norms=norms, precision="bf16", batch_size=batch_size)
        check = compare_precisions(fast, low, block, masks, tolerance)
        facts["precision"] = {"name": choose_precision(precision, check), **dataclasses.asdict(check)}
        log.info("precision %s: %s", facts["precision"]["name"], check)
    return Run.create(
        path,
        components=study.components,
        metadata={name: np.asarray(column) for name, column in study.examples.metadata.items()},
        replacements=constants.numpy(),
        fingerprint=fingerprint,
        facts=facts,
        blocks=blocks,
    )


def _check_same(run: Run, fingerprint: dict[str, Any], precision: str) -> None:
    run.check(fingerprint)
    kept = run.facts["precision"]["name"]
    if precision not in ("auto", kept):
        raise MismatchError(
            f"the run at {run.path} was collected in {kept}, now {precision} is asked for; use {kept} or auto to go "
            f"on, or collect into a new path"
        )


def _balanced(examples: int) -> int:
    return math.ceil(examples / math.ceil(examples / EXAMPLE_BLOCK))


def _wanted(
    fraction: float, masks: int, test_masks: int, validation_masks: int, test_fractions: Sequence[float]
) -> dict[tuple[Split, float], int]:
    """Return how many masks a run shall have by split and ablated fraction, in the order in which they are done."""
    wanted: dict[tuple[Split, float], int] = {("test", at): test_masks for at in sorted({fraction, *test_fractions})}
    return wanted | {("validation", fraction): validation_masks, ("train", fraction): masks}


def _check_settings(masks: int, precision: str, tolerance: float, sizes: dict[str, int | None]) -> None:
    if masks == 0:
        raise SettingsError(
            "zero masks and zero probes were asked for; ask for at least 2 masks, better several thousand, or 32 probes"
        )
    if precision not in CHOICES:
        raise SettingsError(f"unknown precision {precision!r}; choose one of {', '.join(CHOICES)}")
    if not tolerance > 0:
        raise SettingsError(f"precision tolerance {tolerance} is not above 0; 0.05 is usual")
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or size < 1):
            raise SettingsError(f"{name} {size} is no size; give a whole number above 0")


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that a unit is finished; a second one interrupts at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def first(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        stopped.set()
        log.warning("stopping after the current unit; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, first)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
