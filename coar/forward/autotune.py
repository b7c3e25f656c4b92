"""How masks pass fastest on this machine: examples and masks per forward, measured, within a memory limit."""

import logging
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from coar.equivalence import difference
from coar.errors import AblationError
from coar.examples import Examples
from coar.forward.batches import ExampleBlock
from coar.forward.runner import FastRunner

log = logging.getLogger(__name__)

SECONDS = 1.5  # that measuring may take,
SHARE = 0.05  # or this share of the work ahead, whichever is larger
WORTHWHILE = 3.0  # seconds of work ahead, below which nothing is measured
GAIN = 0.95  # of the time that the best pace so far takes: what another must stay below
HOPELESS = 1.5  # times the best pace so far: what takes as long at first sight is not measured further
GROUPS = (2, 4, 8, 16, 32, 64)  # masks per forward; when one is hopeless, so are more, as are smaller batches
LEAST_BATCH = 2  # examples per forward below which no batch is cut, unless memory says so
TIMED = 2  # repetitions, of which the faster counts
TOLERANCE = {"float32": 1e-3, "bf16": 5e-2}  # of the largest output, between two paces


@dataclass(frozen=True)
class ExecutionPlan:
    """How masks pass.

    Attributes:
        batch_size: Most rows per forward pass: examples, times the masks that share a forward.
        masks_per_forward: 1 gates the weights; more gate by hooks, a mask for every row.
        seconds_per_mask: What a mask takes on the block that was measured; NaN where nothing was.
        compiled: Whether the model is compiled.
    """

    batch_size: int
    masks_per_forward: int = 1
    seconds_per_mask: float = float("nan")
    compiled: bool = False


def choose_plan(
    worker: FastRunner, examples: Examples, masks: np.ndarray, *, work: float, tune: bool = True, compiled: bool = False
) -> ExecutionPlan:
    """Find out at which pace masks pass fastest on a block of examples, and let the worker go on at it.

    Only a pace that gives the same outputs as the worker's own is chosen, and only one that is clearly faster.

    Args:
        worker: The worker; its batch size is the largest that is tried.
        examples: The block's examples.
        masks: (masks, components) boolean masks to measure with, as many as a unit has.
        work: Passes over such a block that lie ahead; measuring takes 1.5 seconds or 5 % of their time at most, a
            compiler's time aside, and is left out where they take no 3 seconds.
        tune: Try other batch sizes and masks per forward.
        compiled: Try a compiled model too; where it fails, a warning says why.
    """
    meter = Benchmark(worker, examples, masks)
    start = time.perf_counter()
    best = meter.first()
    ahead = best.seconds_per_mask * work
    if tune and ahead >= WORTHWHILE:
        best = meter.search(best, start + max(SECONDS, SHARE * ahead))
    if compiled:
        best = meter.try_compiling(best)
    meter.adopt(best)
    return best


class Benchmark:
    """Times a worker at one pace after another and compares what it gives."""

    def __init__(self, worker: FastRunner, examples: Examples, masks: np.ndarray) -> None:
        inputs, targets = examples.block(0, len(examples))  # a data set is read once
        self._examples = Examples(inputs=inputs, targets=targets)
        self._worker, self._masks = worker, masks
        self._expected = np.empty((0, len(targets)), dtype=np.float32)
        self._few = 1

    def adopt(self, pace: ExecutionPlan) -> ExampleBlock:
        """Let the worker go on at a pace, and return the block as it cuts it."""
        self._worker.batch_size, self._worker.masks_per_forward = pace.batch_size, pace.masks_per_forward
        return self._worker.load(self._examples, 0, len(self._examples))

    def first(self) -> ExecutionPlan:
        """Time the worker as it is; its outputs are what others must give."""
        pace = ExecutionPlan(self._worker.batch_size)
        block = self.adopt(pace)
        seconds = self._seconds(block, 1)
        if seconds < SECONDS / 30:  # so short that gates put on and taken off would show
            self._few = min(8, len(self._masks))
            seconds = self._seconds(block, self._few)
        self._expected = self._worker.outputs(block, self._masks[: self._few])
        return replace(pace, seconds_per_mask=seconds)

    def search(self, best: ExecutionPlan, deadline: float) -> ExecutionPlan:
        """Return the fastest of all paces that can be timed until the deadline."""
        going = {True: True, False: True}  # on with more masks per forward, and with smaller batches
        for pace in self._candidates(best):
            needed = (1 + TIMED) * best.seconds_per_mask * self._count(pace)
            grouped = pace.masks_per_forward > 1
            if not going[grouped] or time.perf_counter() + needed > deadline:
                continue
            try:
                found = self._time(pace, best)
            except (AblationError, torch.OutOfMemoryError) as error:
                log.info("not %s: %s", pace, error)
                going[grouped] = False
                continue
            if found.seconds_per_mask > HOPELESS * best.seconds_per_mask:
                going[grouped] = False
            if found.seconds_per_mask < GAIN * best.seconds_per_mask:
                best = found
        return best

    def try_compiling(self, best: ExecutionPlan) -> ExecutionPlan:
        """Return the best pace, or that of a compiled model that is faster and agrees; warn where there is none."""
        pace = replace(best, masks_per_forward=1, compiled=True)
        block = self.adopt(pace)
        try:
            self._worker.compile(block)
            self._worker.outputs(block, self._masks[:1])
            found = self._time(pace, best)
        except Exception as error:  # whatever a compiler may raise: without it nothing is lost but time
            said = next(iter(str(error).splitlines()), "")
            log.warning("the model is not compiled, since that failed: %s: %s", type(error).__name__, said)
        else:
            if found.seconds_per_mask < GAIN * best.seconds_per_mask:
                return found
            log.info("the model is not compiled, since it is no faster so: %s, without %s", found, best)
        self._worker.stop_compiling()
        return best

    def _candidates(self, first: ExecutionPlan) -> list[ExecutionPlan]:
        rows = len(self._examples)
        groups = [g for g in GROUPS if g * rows <= first.batch_size and g <= len(self._masks)]
        sizes = [first.batch_size >> i for i in range(1, 8)]
        smaller = [size for size in sizes if LEAST_BATCH <= size < rows]
        return [replace(first, masks_per_forward=g) for g in groups] + [replace(first, batch_size=b) for b in smaller]

    def _count(self, pace: ExecutionPlan) -> int:
        return max(self._few, pace.masks_per_forward)

    def _time(self, pace: ExecutionPlan, best: ExecutionPlan) -> ExecutionPlan:
        """Time a pace; raise `AblationError` when its outputs are others than the first one's."""
        block, count = self.adopt(pace), self._count(pace)
        self._worker.outputs(block, self._masks[:0])  # makes the gates, which are needed once
        start = time.perf_counter()
        found = self._worker.outputs(block, self._masks[:count])[: len(self._expected)]
        seconds = (time.perf_counter() - start) / count
        error = difference(self._expected, found)
        if not error <= TOLERANCE[self._worker.precision]:
            raise AblationError(f"outputs differ by {error:.1e} of the largest; collect at the usual pace instead")
        if seconds < HOPELESS * best.seconds_per_mask:
            seconds = self._seconds(block, count)
        return replace(pace, seconds_per_mask=seconds)

    def _seconds(self, block: ExampleBlock, count: int) -> float:
        """Return the seconds that a mask takes, the fastest of a few calls with so many masks."""
        took = []
        for _ in range(TIMED):
            start = time.perf_counter()
            self._worker.outputs(block, self._masks[:count])
            took.append((time.perf_counter() - start) / count)
        return min(took)
