"""Creation or extension of a run for a study, and the runners that do its units."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.collection.execution import Execution
from coar.collection.units import UnitRunner
from coar.errors import MismatchError
from coar.examples import Examples
from coar.forward.autotune import fastest_runner
from coar.forward.devices import full_float32
from coar.forward.execution_plan import ExecutionPlan
from coar.forward.memory_limit import batch_sizes, examples_per_block
from coar.forward.model_runner import ModelRunner
from coar.forward.precision import choose_precision, compare_precisions
from coar.forward.runner import FastRunner
from coar.gates.batch_norms import following_batch_norms
from coar.gates.gates import called_sites
from coar.preflight.calls import uncalled_modules
from coar.preflight.examples import changed_examples, warn_of_overlap
from coar.preflight.findings import Findings
from coar.preflight.gates import compare_with_reference, unread_outputs
from coar.preflight.gradients import check_gradients
from coar.preflight.passes import check_passes
from coar.preflight.probabilities import probabilities_read
from coar.preflight.repeats import EXCUSES
from coar.sampling import Split
from coar.store.disk import sweep
from coar.store.gradients import MaskGradients
from coar.store.lock import extension_lock
from coar.store.places import Address
from coar.store.plan import Plan, Unit
from coar.store.records import PrecisionRecord, PreflightRecord, RunRecord
from coar.store.run import Run
from coar.store.state import end, state_of
from coar.store.storage_errors import storage_errors
from coar.study import Study

log = logging.getLogger(__name__)
CHECK_MASKS = 16  # masks on which precisions are compared
CHECK_EXAMPLES, FEW = 32, 2  # examples on which a small and a large model is checked
LARGE = 2_000_000  # weights, or 50 times as many as numbers in an input, from which a model is large


@dataclass(frozen=True)
class RunRequest:
    """The contents of a complete run.

    Attributes:
        requested: Masks by split and ablated fraction.
        gradients: Mask gradients.
        blocks: Masks and most examples per unit, for a run that is created.
        memory_limit: As in `Execution`.
        precision: `float32`, `bf16` or `auto`.
        tolerance: Largest accepted difference of bfloat16.
        round_gradients: As in `Execution`.
    """

    requested: dict[tuple[Split, float], int]
    gradients: int
    blocks: tuple[int, int]
    memory_limit: int | str | None
    precision: str
    tolerance: float
    round_gradients: bool = False

    def is_met(self, place: Path | Address) -> bool:
        """Return whether there is a run with all rows and rounds, so that only units can be missing."""
        return state_of(place) == "ready" and self.is_met_by(Run.open(place))

    def is_met_by(self, run: Run) -> bool:
        """Return whether a run has all rows and rounds."""
        return (
            run.plan.extended(self.requested) == run.plan
            and run.rows_intact()
            and MaskGradients(run).count >= self.gradients
        )


@dataclass(frozen=True)
class BatchSettings:
    """The batches of examples.

    Attributes:
        masks: Most rows per forward pass of masks; None for the default of the device.
        gradients: The same for mask gradients.
        tune: Whether the execution plan is measured on the first unit.
        compiled: Whether the model is compiled if that is faster.
    """

    masks: int | None
    gradients: int | None
    tune: bool
    compiled: bool

    @classmethod
    def choose(cls, study: Study, model: nn.Module, execution: Execution, *, gradients: bool) -> "BatchSettings":
        """Take the given batch size, or measure the largest that fits into memory."""
        size = execution.batch_size
        if size is not None:
            return cls(size, size, tune=False, compiled=execution.compile)
        sizes = batch_sizes(study, model, memory_limit=execution.memory_limit, gradients=gradients)
        return cls(*sizes, tune=True, compiled=execution.compile)


def prepare(study: Study, place: Path | Address, model: nn.Module, order: RunRequest, batches: BatchSettings) -> Run:
    """Create or extend a run so that only units are missing; the caller holds an exclusive lock."""
    fingerprint = study.fingerprint()
    if state_of(place) in ("nothing", "creating"):
        findings = Findings(study.accept)
        first = study.examples.subset(_with_sources(study, range(_checked(study))))
        findings.conclude("examples", changed_examples(study.examples))
        check_passes(findings, model, study.model, study.output, first, batch_size=batches.masks)
        read = probabilities_read(model, study.output, first, batch_size=batches.masks)
        findings.conclude("logits", read)
        if order.gradients or study.ablation.needs_gradients:
            check_gradients(findings, study, model, batch_size=batches.gradients)
        run = _create(study, place, model, fingerprint, order, batches.masks, first, findings)
    else:
        run = Run.open(place)
        end(place)  # of a creation that was interrupted just before its end
        if order.gradients:
            ensure_gradients(study, run, model, batch_size=batches.gradients)
    check_same(run, fingerprint, order.precision)
    if "repeats" in study.accept and "repeats" not in (run.facts.preflight or PreflightRecord()).accepted:
        run.add_checks(PreflightRecord(accepted={"repeats": "no pass is repeated, so outputs may be noise"}))
    if isinstance(place, Path):
        with storage_errors(place):
            for stray in sweep(place):
                log.info("removed %s, left by a writer that was killed", stray)
    return run if order.is_met_by(run) else _extended(place, order)


def _extended(place: Path | Address, order: RunRequest) -> Run:
    """Open a run and extend it to the request, from its state after other processes' extensions."""
    with extension_lock(place):
        run = Run.open(place)
        plan = run.plan.extended(order.requested)
        if plan != run.plan or not run.rows_intact():
            run.extend(plan)
        MaskGradients(run).extend(order.gradients, rounded=order.round_gradients)
        return run


def unit_runner(study: Study, run: Run, model: nn.Module, batches: BatchSettings) -> UnitRunner:
    """Return the runner of a run's units, on a copy of the model made by `device_copy`."""
    return UnitRunner(
        study,
        run,
        masks=fast_runner(study, run, model, batch_size=batches.masks),
        gradients=fast_runner(study, run, model, batch_size=batches.gradients),
    )


def fast_runner(study: Study, run: Run, model: nn.Module, *, batch_size: int | None = None) -> FastRunner:
    """Return a fast runner with the run's precision and constants, on a copy of the model made by `device_copy`."""
    return FastRunner(
        model,
        run.components,
        torch.from_numpy(run.replacements),
        study.output,
        ExecutionPlan(precision=run.facts.precision.name, batch_size=batch_size),
        batch_norms=run.facts.batch_norms,
        sources=study.ablation.sources,
    )


def ensure_gradients(study: Study, run: Run, model: nn.Module, *, batch_size: int | None = None) -> None:
    """Check mask gradients, see `check_gradients`, unless that was done for the run; the run keeps the outcome."""
    if run.facts.preflight is None or not run.facts.preflight.has("gradients"):
        findings = Findings(study.accept)
        check_gradients(findings, study, model, batch_size=batch_size)
        run.add_checks(findings.record)


def tuned(study: Study, run: Run, runner: FastRunner, missing: Sequence[Unit], batches: BatchSettings) -> FastRunner:
    """Return a runner with the fastest plan for the first missing unit, compared there with a reference runner."""
    if not missing or not (batches.tune or batches.compiled):
        return runner
    spans = [run.rows_of(unit) for unit in missing]
    rows, span = spans[0]
    examples = study.examples.subset(_with_sources(study, range(span.start, span.stop)))
    masks = run.draw(rows)
    work = sum((r.stop - r.start) * (e.stop - e.start) for r, e in spans) / len(examples)
    found = fastest_runner(runner, examples, masks, work=work, tune=batches.tune, compiled=batches.compiled)
    together = found.plan.masks_per_forward
    if together > 1:
        parts = (runner.model, run.components, torch.from_numpy(run.replacements), study.output)
        exact = FastRunner(
            *parts,
            dataclasses.replace(found.plan, precision="float32"),
            batch_norms=run.facts.batch_norms,
            sources=study.ablation.sources,
        )
        sites = {row.site for row in run.components}
        problems = compare_with_reference(exact, parts, examples, masks[:together], sites)[1]
        Findings(study.accept).conclude("gates", problems["gates"])
    return found


def _create(
    study: Study,
    place: Path | Address,
    model: nn.Module,
    fingerprint: dict[str, Any],
    order: RunRequest,
    batch_size: int | None,
    first: Examples,
    findings: Findings,
) -> Run:
    """Measure a run's fixed properties (constants, precision, batch norms), then create it."""
    warn_of_overlap(study)
    plan, (mask_block, example_block) = Plan().extended(order.requested), order.blocks
    blocks = mask_block, examples_per_block(study, model, example_block, order.memory_limit)
    runner = ModelRunner(model, study.output, batch_size=batch_size)
    with full_float32():
        constants = study.ablation.replacements(model, study.components, batch_size=runner.batch_size)
    parts = (model, study.components, constants, study.output)
    few = runner.load(first, 0, len(first))

    def outputs(variant: nn.Module) -> Tensor:
        return torch.from_numpy(ModelRunner(variant, study.output).base_output(few))

    norms = following_batch_norms(model, study.components, run=outputs)
    shared: dict[str, Any] = {"batch_norms": norms, "sources": study.ablation.sources}
    plan32 = ExecutionPlan(batch_size=batch_size)
    fast = FastRunner(*parts, plan32, **shared)
    masks = plan.masks(study.sampler, len(study.components), 0, min(CHECK_MASKS, blocks[0]))
    if not len(masks):  # the request has mask gradients only
        masks = study.sampler.masks("gradient", range(CHECK_MASKS), len(study.components))
    called = called_sites(model, study.components, run=outputs)
    alone = not {"random", "batch"} & set(study.accept)
    gate_error, problems = compare_with_reference(fast, parts, first, masks[:2], called, split=alone)
    unread = unread_outputs(model, study.components, lambda variant: outputs(variant).numpy())
    findings.conclude("batch", problems.get("batch", ""))
    findings.conclude("gates", problems["gates"] or unread)
    findings.conclude("calls", uncalled_modules(fast, study.examples, first, called))
    if not set(EXCUSES) & set(study.accept):
        findings.conclude("repeats", "")  # since a unit with a pass that fails is not stored
    precision = PrecisionRecord(name="float32")
    if order.precision != "float32":
        block = fast.load(study.examples, 0, min(blocks[1], len(study.examples)))
        low = FastRunner(*parts, dataclasses.replace(plan32, precision="bf16"), **shared)
        check = compare_precisions(fast, low, block, masks, order.tolerance)
        precision = PrecisionRecord(name=choose_precision(order.precision, check), **dataclasses.asdict(check))
        log.info("precision %s: %s", precision.name, check)
    return Run.create(
        place,
        components=study.components,
        metadata={name: np.asarray(column) for name, column in study.examples.metadata.items()},
        replacements=constants.numpy(),
        fingerprint=fingerprint,
        facts=RunRecord(batch_norms=norms, gate_error=gate_error, precision=precision, preflight=findings.record),
        blocks=blocks,
        plan=plan,
    )


def _checked(study: Study) -> int:
    """Return the number of examples that the model is checked on."""
    weights = sum(parameter.numel() for parameter in study.model.parameters())
    inputs = study.examples.block(0, 1)[0]
    numbers = max(value.numel() for value in (inputs.values() if isinstance(inputs, dict) else [inputs]))
    return min(FEW if max(weights, 50 * numbers) >= LARGE else CHECK_EXAMPLES, len(study.examples))


def _with_sources(study: Study, rows: range) -> list[int]:
    """Return some examples' positions, then the positions of their resample sources."""
    sources = study.ablation.sources(study.examples)
    return list(rows) if sources is None else list(dict.fromkeys([*rows, *sources[rows].tolist()]))


def check_same(run: Run, fingerprint: dict[str, Any], precision: str) -> None:
    """Raise `MismatchError` unless the run was made for this study, and in this precision."""
    run.check(fingerprint)
    kept = run.facts.precision.name
    if precision not in ("auto", kept):
        raise MismatchError(
            f"the run at {run.path} was collected in {kept}, now {precision} is requested; use {kept} or auto to "
            f"continue, or collect into a new path"
        )
