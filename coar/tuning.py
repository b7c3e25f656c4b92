"""How masks pass fastest on this machine: examples and masks per forward, measured, within a memory limit."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.batches import Block
from coar.devices import BATCH_SIZE
from coar.errors import AblationError, SettingsError
from coar.examples import Examples
from coar.study import Study
from coar.worker import ModelRunner, Worker

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
FREE_SHARE = 0.8  # of a CUDA device's free memory that batches may take
MEASURED = 2  # examples whose memory is measured
UNITS = {"": 1, "B": 1} | {f"{letter}B": 1000**i for i, letter in enumerate("KMGT", 1)}
UNITS |= {f"{letter}IB": 1024**i for i, letter in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class Pace:
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


def bytes_of(limit: int | str) -> int:
    """Return a number of bytes from a whole number, or from text such as `4GiB`, `500 MB` or `1000000`.

    Raises:
        SettingsError: When it is none, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(limit))
    size = float(found[1]) * UNITS.get(found[2].upper(), 0) if found and not isinstance(limit, bool) else 0.0
    if size < 1:
        raise SettingsError(f"memory limit {limit!r} is no size; give bytes above 0, or text such as 4GiB or 500MB")
    return int(size)


def batch_sizes(study: Study, model: nn.Module, *, memory_limit: int | str | None, probes: bool) -> tuple[int, int]:
    """Return how many rows a forward pass of masks may have, and one of probes, from bytes measured per example.

    Args:
        study: What is examined.
        model: A copy made by `device_copy`.
        memory_limit: Bytes, or text such as `4GiB`, that activations may take; by default 80 % of what is free on a
            CUDA device, and no limit elsewhere. The usual batch size of the device bounds both sizes in any case.
        probes: Whether probes are wanted; else theirs is not measured.

    Raises:
        SettingsError: When the limit is no size, or one example does not fit.
    """
    device = next(model.parameters()).device
    most = BATCH_SIZE[device.type]
    if memory_limit is not None:
        limit = bytes_of(memory_limit)
    elif device.type == "cuda":
        limit = int(FREE_SHARE * torch.cuda.mem_get_info(device)[0])
    else:
        return (most, most)
    by_masks = _rows_within(limit, mask_bytes(study, model), "forward pass")
    by_probes = _rows_within(limit, probe_bytes(study, model), "probe") if probes else most
    return (min(most, by_masks), min(most, by_probes))


def _rows_within(limit: int, needed: float, noun: str) -> int:
    rows = int(limit / max(needed, 1.0))
    if rows < 1:
        raise SettingsError(
            f"a {noun} of one example takes {_readable(needed)}, and the memory limit is {_readable(limit)}; raise the "
            f"limit, or give smaller inputs"
        )
    return rows


def mask_bytes(study: Study, model: nn.Module) -> float:
    """Return the bytes that one example takes in a forward pass.

    On CUDA it is the peak of what is allocated; elsewhere the largest sum of what a module without children is given
    and returns, so products inside a larger module's own code are not seen. Where donors' activations are held, the
    sum over all modules is added.
    """
    components = study.components
    held = study.ablation.donors(len(study.examples)) is not None
    runner = ModelRunner(model, study.output, batch_size=MEASURED)
    worker = Worker(
        model,
        components,
        torch.zeros(components.width),
        study.output,
        through_outputs=True,
        donors=study.ablation.donors,
        batch_size=MEASURED,
    )
    everything = np.ones((1, len(components)), dtype=bool)

    def used(rows: int) -> float:
        if runner.device.type == "cuda" and held:
            block = worker.load(study.examples, 0, rows)
            return _peak(worker.device, lambda: worker.outputs(block, everything))
        block = runner.load(study.examples, 0, rows)
        if runner.device.type == "cuda":
            return _peak(runner.device, lambda: runner.base_output(block))
        with _module_sizes(model) as sizes:
            runner.base_output(block)
        return max(sizes, default=0.0) + sum(sizes) * held

    return _per_row(used, len(study.examples))


def probe_bytes(study: Study, model: nn.Module) -> float:
    """Return the bytes that one example takes in a forward and backward pass: on CUDA the peak, else what is saved.

    Raises:
        AblationError: When components or output have no gradient.
    """
    components = study.components
    zeros = torch.zeros(components.width)
    worker = Worker(model, components, zeros, study.output, through_outputs=True, batch_size=MEASURED)

    def used(rows: int) -> float:
        block = worker.load(study.examples, 0, rows)
        if worker.device.type == "cuda":
            return _peak(worker.device, lambda: worker.gradients(block))
        saved: dict[int, int] = {}  # bytes by the address of a storage

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            worker.gradients(block)
        return float(sum(saved.values()))

    return _per_row(used, len(study.examples))


def _per_row(used: Callable[[int], float], examples: int) -> float:
    """Return what one more row adds, so that weights, whose size no row changes, do not count."""
    rows = min(MEASURED, examples)
    if rows == 1:
        return used(1)
    return (used(rows) - used(rows // 2)) / (rows - rows // 2)


def _peak(device: torch.device, run: Callable[[], object]) -> float:
    run()  # the first pass also pays for workspaces
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return float(torch.cuda.max_memory_allocated(device) - before)


@contextmanager
def _module_sizes(model: nn.Module) -> Iterator[list[float]]:
    """Collect, for every call of a module without children, the bytes of what it is given and returns."""
    sizes: list[float] = []

    def measure(_module: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
        sizes.append(float(_bytes_in((args, kwargs, returned))))

    with ExitStack() as stack:
        for module in model.modules():
            if next(module.children(), None) is None:
                stack.callback(module.register_forward_hook(measure, with_kwargs=True).remove)
        yield sizes


def _bytes_in(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes_in(part) for part in value.values())
    return sum(_bytes_in(part) for part in value) if isinstance(value, tuple | list) else 0


def _readable(size: float) -> str:
    for letter in ("G", "M", "K"):
        unit = UNITS[f"{letter}IB"]
        if size >= unit:
            return f"{size / unit:.3g} {letter}iB"
    return f"{size:.0f} bytes"


def choose_pace(
    worker: Worker, examples: Examples, masks: np.ndarray, *, work: float, tune: bool = True, compiled: bool = False
) -> Pace:
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
    meter = _Meter(worker, examples, masks)
    start = time.perf_counter()
    best = meter.first()
    ahead = best.seconds_per_mask * work
    if tune and ahead >= WORTHWHILE:
        best = meter.search(best, start + max(SECONDS, SHARE * ahead))
    if compiled:
        best = meter.try_compiling(best)
    meter.adopt(best)
    return best


class _Meter:
    """Times a worker at one pace after another and compares what it gives."""

    def __init__(self, worker: Worker, examples: Examples, masks: np.ndarray) -> None:
        inputs, targets = examples.block(0, len(examples))  # a data set is read once
        self._examples = Examples(inputs=inputs, targets=targets)
        self._worker, self._masks = worker, masks
        self._expected = np.empty((0, len(targets)), dtype=np.float32)
        self._few = 1

    def adopt(self, pace: Pace) -> Block:
        """Let the worker go on at a pace, and return the block as it cuts it."""
        self._worker.batch_size, self._worker.masks_per_forward = pace.batch_size, pace.masks_per_forward
        return self._worker.load(self._examples, 0, len(self._examples))

    def first(self) -> Pace:
        """Time the worker as it is; its outputs are what others must give."""
        pace = Pace(self._worker.batch_size)
        block = self.adopt(pace)
        seconds = self._seconds(block, 1)
        if seconds < SECONDS / 30:  # so short that gates put on and taken off would show
            self._few = min(8, len(self._masks))
            seconds = self._seconds(block, self._few)
        self._expected = self._worker.outputs(block, self._masks[: self._few])
        return replace(pace, seconds_per_mask=seconds)

    def search(self, best: Pace, deadline: float) -> Pace:
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

    def try_compiling(self, best: Pace) -> Pace:
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

    def _candidates(self, first: Pace) -> list[Pace]:
        rows = len(self._examples)
        groups = [g for g in GROUPS if g * rows <= first.batch_size and g <= len(self._masks)]
        sizes = [first.batch_size >> i for i in range(1, 8)]
        smaller = [size for size in sizes if LEAST_BATCH <= size < rows]
        return [replace(first, masks_per_forward=g) for g in groups] + [replace(first, batch_size=b) for b in smaller]

    def _count(self, pace: Pace) -> int:
        return max(self._few, pace.masks_per_forward)

    def _time(self, pace: Pace, best: Pace) -> Pace:
        """Time a pace; raise `AblationError` when its outputs are others than the first one's."""
        block, count = self.adopt(pace), self._count(pace)
        self._worker.outputs(block, self._masks[:0])  # makes the gates, which are needed once
        start = time.perf_counter()
        found = self._worker.outputs(block, self._masks[:count])[: len(self._expected)]
        seconds = (time.perf_counter() - start) / count
        error = np.abs(found - self._expected).max() / max(np.abs(self._expected).max(), 1e-6)
        if not error <= TOLERANCE[self._worker.precision]:
            raise AblationError(f"outputs differ by {error:.1e} of the largest; collect at the usual pace instead")
        if seconds < HOPELESS * best.seconds_per_mask:
            seconds = self._seconds(block, count)
        return replace(pace, seconds_per_mask=seconds)

    def _seconds(self, block: Block, count: int) -> float:
        """Return the seconds that a mask takes, the fastest of a few calls with so many masks."""
        took = []
        for _ in range(TIMED):
            start = time.perf_counter()
            self._worker.outputs(block, self._masks[:count])
            took.append((time.perf_counter() - start) / count)
        return min(took)
