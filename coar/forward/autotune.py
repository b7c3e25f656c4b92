"""The fastest execution plan on this machine: batch sizes and masks per forward pass, measured on some examples."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from coar.equivalence import Kind, compare, fall_back, rounding
from coar.errors import AblationError
from coar.examples import Examples
from coar.forward.batches import ExampleBlock
from coar.forward.execution_plan import ExecutionPlan
from coar.forward.runner import FastRunner

log = logging.getLogger(__name__)

SECONDS = 1.5  # most time of the measurement,
SHARE = 0.05  # or this share of the work ahead, if that is longer
WORTHWHILE = 3.0  # seconds of work ahead, below which nothing is measured
GAIN = 0.95  # share of the best plan's time that a better plan may take at most
HOPELESS = 1.5  # times the best plan's time, from which on a plan is not measured further
GROUPS = (2, 4, 8, 16, 32, 64)  # masks per forward pass; after a hopeless number, no larger one
LEAST_BATCH = 2  # fewest examples per forward pass, unless memory requires fewer
COMPILED = "the compiled model"
TIMED = 2  # repetitions, of which the faster counts

Timer = Callable[[FastRunner, ExampleBlock, np.ndarray], float]


@dataclass(frozen=True)
class TimedRunner:
    """A runner and the time of its plan.

    Attributes:
        runner: The runner.
        seconds: Seconds per mask on the measured block.
    """

    runner: FastRunner
    seconds: float


def seconds_per_mask(runner: FastRunner, block: ExampleBlock, masks: np.ndarray) -> float:
    """Return the seconds per mask in the fastest of a few calls with these masks."""
    took = []
    for _ in range(TIMED):
        start = time.perf_counter()
        runner.outputs(block, masks)
        took.append((time.perf_counter() - start) / len(masks))
    return min(took)


def fastest_runner(
    runner: FastRunner,
    examples: Examples,
    masks: np.ndarray,
    *,
    work: float,
    tune: bool = True,
    compiled: bool = False,
    timer: Timer = seconds_per_mask,
) -> FastRunner:
    """Return the runner with the fastest plan for a block of examples.

    Another plan is chosen only if it gives the outputs of the runner's own plan and is clearly faster.

    Args:
        runner: The runner; its batch size is the largest that is tried.
        examples: The examples of the block.
        masks: (masks, components) boolean masks to measure with, as many as a unit has.
        work: Number of passes over such a block that lie ahead. The measurement takes at most 1.5 seconds or 5 % of
            their time, plus the compiler's time; it is skipped if they take less than 3 seconds.
        tune: Try other batch sizes and masks per forward pass.
        compiled: Try a compiled model too; if it fails, a warning gives the reason.
        timer: Measures the seconds per mask of a runner on a block under masks.
    """
    benchmark = Benchmark(runner, examples, masks, timer)
    start = time.perf_counter()
    best = benchmark.first()
    ahead = best.seconds * work
    if tune and ahead >= WORTHWHILE:
        best = benchmark.search(best, start + max(SECONDS, SHARE * ahead))
    if compiled:
        best = benchmark.try_compiling(best)
    log.info("execution plan: %s, %.3g s per mask", best.runner.plan, best.seconds)
    return best.runner


class Benchmark:
    """Times a runner under one plan after another and compares the outputs.

    Args:
        runner: The runner.
        examples: The examples to run.
        masks: (masks, components) boolean masks.
        timer: Measures the seconds per mask.
    """

    def __init__(self, runner: FastRunner, examples: Examples, masks: np.ndarray, timer: Timer) -> None:
        inputs, targets = examples.block(0, len(examples))  # a data set is read once
        self._examples = Examples(inputs=inputs, targets=targets, metadata=examples.metadata)
        self._runner, self._masks, self._timer = runner, masks, timer
        self._expected = np.empty((0, len(targets)), dtype=np.float32)
        self._few = 1

    def first(self) -> TimedRunner:
        """Time the runner with one mask per forward pass; its outputs are what other plans must give."""
        runner = self._runner.with_plan(replace(self._runner.plan, masks_per_forward=1, compiled=False))
        block = self._load(runner)
        seconds = self._timer(runner, block, self._masks[:1])
        if seconds < SECONDS / 30:  # the time to enter and leave gates would count
            self._few = min(8, len(self._masks))
            seconds = self._timer(runner, block, self._masks[: self._few])
        self._expected = runner.outputs(block, self._masks[: self._few])
        return TimedRunner(runner, seconds)

    def search(self, best: TimedRunner, deadline: float) -> TimedRunner:
        """Return the fastest of all plans that can be timed until the deadline."""
        going = {True: True, False: True}  # whether to go on: with more masks per pass, with smaller batches
        for plan in self._candidates(best.runner):
            needed = (1 + TIMED) * best.seconds * self._count(plan)
            grouped = plan.masks_per_forward > 1
            if not going[grouped] or time.perf_counter() + needed > deadline:
                continue
            try:
                found = self._time(best.runner.with_plan(plan), best)
            except (AblationError, torch.OutOfMemoryError) as error:
                fall_back(str(plan), str(error))
                going[grouped] = False
                continue
            if found.seconds > HOPELESS * best.seconds:
                going[grouped] = False
            if found.seconds < GAIN * best.seconds:
                best = found
        return best

    def try_compiling(self, best: TimedRunner) -> TimedRunner:
        """Return the best plan, or the same compiled if that is faster and agrees; warn if it fails."""
        runner = best.runner.with_plan(replace(best.runner.plan, masks_per_forward=1, compiled=True))
        block = self._load(runner)
        try:
            runner.outputs(block, self._masks[:1])
            found = self._time(runner, best)
        except Exception as error:  # any error of a compiler; only time is lost without it
            said = next(iter(str(error).splitlines()), "")
            fall_back(COMPILED, f"{type(error).__name__}: {said}", level=logging.WARNING)
            return best
        if found.seconds < GAIN * best.seconds:
            return found
        fall_back(COMPILED, f"a mask takes {found.seconds:.3g} s with it and {best.seconds:.3g} s without")
        return best

    def _candidates(self, runner: FastRunner) -> list[ExecutionPlan]:
        rows, plan, most = len(self._examples), runner.plan, runner.batch_size
        groups = [g for g in GROUPS if g * rows <= most and g <= len(self._masks)]
        sizes = [most >> i for i in range(1, 8)]
        smaller = [size for size in sizes if LEAST_BATCH <= size < rows]
        return [replace(plan, masks_per_forward=g) for g in groups] + [replace(plan, batch_size=b) for b in smaller]

    def _load(self, runner: FastRunner) -> ExampleBlock:
        return runner.load(self._examples, 0, len(self._examples))

    def _count(self, plan: ExecutionPlan) -> int:
        return max(self._few, plan.masks_per_forward)

    def _time(self, runner: FastRunner, best: TimedRunner) -> TimedRunner:
        """Time a runner; raise `AblationError` when its outputs differ from the first one's."""
        block, count = self._load(runner), self._count(runner.plan)
        runner.outputs(block, self._masks[:0])  # builds the gates, which takes time once
        start = time.perf_counter()
        found = runner.outputs(block, self._masks[:count])[: len(self._expected)]
        seconds = (time.perf_counter() - start) / count
        coarse = torch.finfo(torch.bfloat16).eps if runner.precision == "bf16" else rounding(runner.model)
        compared = compare(self._expected, found, Kind.RECOMPUTED, precision=coarse)
        if not compared.agrees:
            raise AblationError(f"outputs {compared}; use the usual plan")
        if seconds < HOPELESS * best.seconds:
            seconds = self._timer(runner, block, self._masks[:count])
        return TimedRunner(runner, seconds)
