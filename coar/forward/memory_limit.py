"""Batch sizes within a memory limit, from measured bytes per example, and halved when memory runs out."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from coar.equivalence import fall_back
from coar.errors import SettingsError
from coar.examples import device_of, devices_of
from coar.forward.devices import batch_size_on
from coar.forward.model_runner import ModelRunner
from coar.forward.runner import FastRunner, ReferenceRunner
from coar.outputs.base import RelativeOutput
from coar.study import Study

log = logging.getLogger(__name__)

T = TypeVar("T")
FREE_SHARE = 0.8  # of a CUDA device's free memory that batches may take
KEPT_BYTES = 2**30  # of unablated results that a block of examples keeps, where there is no limit
MEASURED = 2  # examples whose memory is measured
UNITS = {"": 1, "B": 1} | {f"{letter}B": 1000**i for i, letter in enumerate("KMGT", 1)}
UNITS |= {f"{letter}IB": 1024**i for i, letter in enumerate("KMGT", 1)}


def bytes_of(limit: int | str) -> int:
    """Return a number of bytes from a whole number, or from text such as `4GiB`, `500 MB` or `1000000`.

    Raises:
        SettingsError: When the limit is not a size above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(limit))
    size = float(found[1]) * UNITS.get(found[2].upper(), 0) if found and not isinstance(limit, bool) else 0.0
    if size < 1:
        raise SettingsError(f"memory limit {limit!r} is not a size; give bytes above 0, or text such as 4GiB or 500MB")
    return int(size)


def batch_sizes(study: Study, model: nn.Module, *, memory_limit: int | str | None, gradients: bool) -> tuple[int, int]:
    """Return the most rows of a forward pass of masks, and of one of mask gradients, from measured bytes.

    Args:
        study: What is examined.
        model: A copy made by `device_copy`.
        memory_limit: Most memory for activations, in bytes or as text such as `4GiB`; by default 80 % of the free
            memory of a CUDA device, the one with the least of several, and no limit elsewhere. The default batch size
            of the device bounds both sizes too.
        gradients: Whether to measure mask gradients.

    Raises:
        SettingsError: When the limit is not a size, or one example does not fit.
    """
    device = device_of(model)
    most = batch_size_on(device)
    if memory_limit is not None:
        limit = bytes_of(memory_limit)
    elif devices := _cuda_devices(model):
        limit = int(FREE_SHARE * min(torch.cuda.mem_get_info(one)[0] for one in devices))
    else:
        return (most, most)
    by_masks = _rows_within(limit, mask_bytes(study, model), "forward pass")
    by_gradients = _rows_within(limit, gradient_bytes(study, model), "mask gradient") if gradients else most
    return (min(most, by_masks), min(most, by_gradients))


def examples_per_block(study: Study, model: nn.Module, most: int, memory_limit: int | str | None) -> int:
    """Return the examples of a block, `most` or fewer.

    An output that compares with the unablated model keeps a part of its results, such as the probabilities of all
    tokens. What a block keeps is bounded by the limit, or by 1 GiB without one.

    Args:
        study: What is examined.
        model: A copy made by `device_copy`.
        most: The most examples.
        memory_limit: Bytes, or text such as `4GiB`.
    """
    if not isinstance(study.output, RelativeOutput):
        return most
    runner = FastRunner(model, study.components, torch.zeros(study.components.width), study.output)
    ((_, kept),) = runner.load(study.examples, 0, 1).batches
    limit = KEPT_BYTES if memory_limit is None else bytes_of(memory_limit)
    fit = max(limit // kept.nbytes, 1)
    if fit < most:
        log.info(
            "blocks have %d examples, since the unablated model's results take %s each", fit, readable(kept.nbytes)
        )
    return min(fit, most)


def within_memory(runner: FastRunner, examples: int, run: Callable[[FastRunner], T]) -> tuple[FastRunner, T]:
    """Run a function, and repeat it with half the batch size as long as the device runs out of memory.

    `batch_sizes` predicts a size first; this is for models that take more memory under some masks, and for memory that
    other programs take meanwhile. accelerate's `find_executable_batch_size` does the same. Other batch sizes change
    outputs by rounding alone, as other execution plans do.

    Args:
        runner: The runner of the first try.
        examples: Number of examples of a block.
        run: Loads the block and runs it, both by the runner of its argument.

    Returns:
        The runner that had enough memory, and what `run` returned.

    Raises:
        SettingsError: When one example does not fit.
    """
    while True:
        rows = min(runner.batch_size, examples * runner.plan.masks_per_forward)
        try:
            return runner, run(runner)
        except torch.OutOfMemoryError as error:
            if rows == 1:
                raise SettingsError(
                    f"one example does not fit into the memory of {runner.device}: {error}; use smaller inputs, "
                    f"precision bf16 or another device"
                ) from error
            fall_back(f"a batch of {rows} rows", f"{runner.device} is out of memory", level=logging.WARNING)
        # outside the handler, which would keep the tensors of the failed pass alive
        runner = runner.with_plan(replace(runner.plan, batch_size=rows // 2))
        if _cuda_devices(runner.model):
            torch.cuda.empty_cache()


def _rows_within(limit: int, needed: float, noun: str) -> int:
    rows = int(limit / max(needed, 1.0))
    if rows < 1:
        raise SettingsError(
            f"a {noun} of one example takes {readable(needed)}, and the memory limit is {readable(limit)}; raise the "
            f"limit, or give smaller inputs"
        )
    return rows


def mask_bytes(study: Study, model: nn.Module) -> float:
    """Return the bytes that one example takes in a forward pass.

    On CUDA this is the peak of allocated memory, the largest of several devices. Elsewhere it is the largest sum of the
    inputs and outputs of a module without children, so intermediate results in a larger module's own code are not
    counted. Where the activations of resample sources are held, the sum over all modules is added.
    """
    components = study.components
    held = study.ablation.sources(study.examples) is not None
    runner = ModelRunner(model, study.output, batch_size=MEASURED)
    zeros = torch.zeros(components.width)
    reference = ReferenceRunner(
        model, components, zeros, study.output, sources=study.ablation.sources, batch_size=MEASURED
    )
    everything, devices = np.ones((1, len(components)), dtype=bool), _cuda_devices(model)

    def used(rows: int) -> float:
        if devices and held:
            block = reference.load(study.examples, 0, rows)
            return _peak(devices, lambda: reference.outputs(block, everything))
        block = runner.load(study.examples, 0, rows)
        if devices:
            return _peak(devices, lambda: runner.base_output(block))
        with _module_sizes(model) as sizes:
            runner.base_output(block)
        return max(sizes, default=0.0) + sum(sizes) * held

    return _per_row(used, len(study.examples)) + ledger_bytes(study) * (1 + held)


def gradient_bytes(study: Study, model: nn.Module) -> float:
    """Return the bytes that one example takes in a forward and backward pass.

    On CUDA this is the peak of allocated memory, the largest of several devices; elsewhere the size of the tensors
    saved for the backward pass.

    Raises:
        AblationError: When components or output have no gradient.
    """
    components = study.components
    zeros = torch.zeros(components.width)
    reference = ReferenceRunner(model, components, zeros, study.output, batch_size=MEASURED)

    def used(rows: int) -> float:
        block = reference.load(study.examples, 0, rows)
        if devices := _cuda_devices(model):
            return _peak(devices, lambda: reference.full_model_gradients(block))
        saved: dict[int, int] = {}  # bytes by the address of a storage

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            reference.full_model_gradients(block)
        return float(sum(saved.values())) + 2 * rows * ledger_bytes(study)

    return _per_row(used, len(study.examples))


def ledger_bytes(study: Study) -> int:
    """Return the bytes of all writers' outputs for one example, which a pass with gates on edges keeps; else 0."""
    if not study.components.of_edges:
        return 0
    inputs = study.examples.block(0, 1)[0]
    tokens = inputs.get("input_ids", next(iter(inputs.values()))) if isinstance(inputs, dict) else inputs
    return 4 * tokens.shape[-1] * study.components.width


def _per_row(used: Callable[[int], float], examples: int) -> float:
    """Return the increase for one more row, so that weights, of constant size, do not count."""
    rows = min(MEASURED, examples)
    if rows == 1:
        return used(1)
    return (used(rows) - used(rows // 2)) / (rows - rows // 2)


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return [device for device in devices_of(model) if device.type == "cuda"]


def _peak(devices: Sequence[torch.device], run: Callable[[], object]) -> float:
    """Return the bytes that a function allocates on the device where it allocates most."""
    run()  # the first pass also allocates workspaces
    before = [torch.cuda.memory_allocated(device) for device in devices]
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    run()
    pairs = zip(devices, before, strict=True)
    return float(max(torch.cuda.max_memory_allocated(device) - held for device, held in pairs))


@contextmanager
def _module_sizes(model: nn.Module) -> Iterator[list[float]]:
    """Collect the bytes of inputs and outputs for every call of a module without children."""
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


def readable(size: float) -> str:
    """Return a number of bytes as text, such as `1.5 GiB`."""
    for letter in ("G", "M", "K"):
        unit = UNITS[f"{letter}IB"]
        if size >= unit:
            return f"{size / unit:.3g} {letter}iB"
    return f"{size:.0f} bytes"
