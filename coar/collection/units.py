"""Computation of units with one copy of the model, and progress over a stage of units."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Self

import numpy as np

from coar.collection.finite import check_finite, check_gradients_finite
from coar.forward.batches import ExampleBlock
from coar.forward.memory_limit import within_memory
from coar.forward.runner import FastRunner
from coar.preflight.repeats import Repeats, UnitResult
from coar.progress import progress_bar
from coar.store.gradients import AnyUnit, GradientUnit, MaskGradients
from coar.store.plan import Unit, dealt
from coar.store.run import Run
from coar.study import Study

log = logging.getLogger(__name__)
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


class UnitRunner:
    """Does units of a run and stores them; the last block of examples stays on the device.

    Args:
        study: The study.
        run: The run.
        masks: Runner for units of masks.
        gradients: Runner for rounds of mask gradients, whose batches may be smaller.

    Attributes:
        masks, gradients: The runners; one with smaller batches replaces a runner that ran out of memory.
        repeats: The check of passes of masks.
    """

    def __init__(self, study: Study, run: Run, *, masks: FastRunner, gradients: FastRunner) -> None:
        self.masks, self.gradients = masks, gradients
        self.repeats = Repeats(study, -(-run.n_examples // run.blocks[1]))
        self._study, self._run, self._stored = study, run, MaskGradients(run)
        self._block: tuple[FastRunner, slice, ExampleBlock] | None = None

    def do(self, unit: AnyUnit) -> None:
        """Compute one unit and store it.

        Raises:
            OutputError: When an output or a gradient is not finite; nothing of the unit is stored then.
            AblationError: When a repeated pass gives something else, see `Repeats`; nothing of the unit is stored then.
            StorageError: When the disk or the object store fails.
        """
        if isinstance(unit, GradientUnit):
            self._do_gradients(unit)
        else:
            self._ablate(unit)

    def _ablate(self, unit: Unit) -> None:
        run = self._run
        rows, examples = run.rows_of(unit)
        masks = run.draw(rows)

        def compute(runner: FastRunner) -> tuple[np.ndarray, np.ndarray | None]:
            block = self._load(runner, examples)
            return runner.outputs(block, masks), runner.base_output(block) if unit.mask_block == 0 else None

        self.masks, (outputs, base) = within_memory(self.masks, examples.stop - examples.start, compute)
        check_finite(self._study, run, unit, outputs, base)
        done = UnitResult(rows.start, examples, unit.example_block, masks, outputs)
        self.repeats.check(self.masks, self._load(self.masks, examples), done)
        run.write_unit(unit, masks, outputs, base)

    def _do_gradients(self, unit: GradientUnit) -> None:
        mask_gradients = self._stored
        examples = mask_gradients.examples_of(unit)
        masks, groups = mask_gradients.masks(unit.round), mask_gradients.group_of(examples)
        self.gradients, (kept, ablated, outputs) = within_memory(
            self.gradients,
            examples.stop - examples.start,
            lambda runner: runner.mask_gradients(self._load(runner, examples), masks, groups),
        )
        check_gradients_finite(self._study, unit, examples, kept, ablated, outputs)
        mask_gradients.write_unit(unit, kept, ablated, outputs)

    def _load(self, runner: FastRunner, examples: slice) -> ExampleBlock:
        if self._block is None or self._block[:2] != (runner, examples):
            self._block = None  # release the old block before the new one is loaded
            self._block = (runner, examples, runner.load(self._study.examples, examples.start, examples.stop))
        return self._block[2]


@dataclass(frozen=True)
class Stage:
    """Units of one kind.

    Attributes:
        noun: The kind of the units, `mask` or `mask gradient`.
        share: Each unit's size in passes over all examples.
        missing: The units that are not stored yet, in the order of work.
    """

    noun: str
    share: dict[AnyUnit, float]
    missing: list[AnyUnit]


def gradient_stage(run: Run, worker: tuple[int, int]) -> Stage:
    """Return a worker's share of the run's rounds of mask gradients."""
    mask_gradients = MaskGradients(run)
    share: dict[AnyUnit, float] = {
        unit: _width(mask_gradients.examples_of(unit), run) * mask_gradients.rounds[unit.round]
        for unit in dealt(mask_gradients.units(), worker)
    }
    return Stage("mask gradient", share, [unit for unit in mask_gradients.missing_units() if unit in share])


def mask_stage(run: Run, worker: tuple[int, int]) -> Stage:
    """Return a worker's share of the run's units of masks."""
    share: dict[AnyUnit, float] = {}
    for unit in dealt(run.units(), worker):
        rows, examples = run.rows_of(unit)
        share[unit] = _width(examples, run) * (rows.stop - rows.start)
    return Stage("mask", share, [unit for unit in run.missing_units() if unit in share])


class UnitProgress:
    """A progress bar over a stage, and the number of its stored units."""

    def __init__(self, stage: Stage, *, shown: bool) -> None:
        self._noun, self._share = stage.noun, stage.share
        self._total = round(sum(stage.share.values()))
        stored = sum(stage.share.values()) - sum(stage.share[unit] for unit in stage.missing)
        self.done = len(stage.share) - len(stage.missing)
        self.bar = progress_bar(
            total=self._total,
            initial=min(stored, self._total),
            unit=stage.noun,
            desc=f"collect {stage.noun}s",
            bar_format=BAR,
            shown=shown,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @property
    def left(self) -> int:
        """Number of units that are not stored yet."""
        return len(self._share) - self.done

    def interrupted(self, run: Run) -> KeyboardInterrupt:
        """Return an exception with the progress of the stage."""
        return KeyboardInterrupt(
            f"stopped after {self._noun} unit {self.done} of {len(self._share)}; everything so far is stored in "
            f"{run.path}: run the same command again to continue"
        )

    def add(self, unit: AnyUnit) -> None:
        """Count a unit that has been stored."""
        self.done += 1
        about = {"unit": list(unit), "done": self.done, "units": len(self._share)}
        log.debug("stored unit of %ss", self._noun, extra=about)
        self.bar.update(min(self._share[unit], self._total - self.bar.n))  # the sum of fractions may round up


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that the current unit is finished; a second one interrupts at once."""
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


def _width(examples: slice, run: Run) -> float:
    """Return a block's share of all examples."""
    return float(examples.stop - examples.start) / run.n_examples
