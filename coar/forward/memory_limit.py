"""Batch sizes within a memory limit, from bytes measured per example."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.errors import SettingsError
from coar.forward.devices import BATCH_SIZE
from coar.forward.model_runner import ModelRunner
from coar.forward.runner import ReferenceRunner
from coar.study import Study

FREE_SHARE = 0.8  # of a CUDA device's free memory that batches may take
MEASURED = 2  # examples whose memory is measured
UNITS = {"": 1, "B": 1} | {f"{letter}B": 1000**i for i, letter in enumerate("KMGT", 1)}
UNITS |= {f"{letter}IB": 1024**i for i, letter in enumerate("KMGT", 1)}


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


def batch_sizes(study: Study, model: nn.Module, *, memory_limit: int | str | None, gradients: bool) -> tuple[int, int]:
    """Return how many rows a forward pass of masks may have, and one of mask gradients, from measured bytes.

    Args:
        study: What is examined.
        model: A copy made by `device_copy`.
        memory_limit: Bytes, or text such as `4GiB`, that activations may take; by default 80 % of what is free on a
            CUDA device, and no limit elsewhere. The usual batch size of the device bounds both sizes in any case.
        gradients: Whether mask gradients are wanted; else theirs is not measured.

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
    by_gradients = _rows_within(limit, gradient_bytes(study, model), "mask gradient") if gradients else most
    return (min(most, by_masks), min(most, by_gradients))


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
    and returns, so products inside a larger module's own code are not seen. Where the activations of resample
    sources are held, the sum over all modules is added.
    """
    components = study.components
    held = study.ablation.sources(len(study.examples)) is not None
    runner = ModelRunner(model, study.output, batch_size=MEASURED)
    zeros = torch.zeros(components.width)
    reference = ReferenceRunner(
        model, components, zeros, study.output, sources=study.ablation.sources, batch_size=MEASURED
    )
    everything = np.ones((1, len(components)), dtype=bool)

    def used(rows: int) -> float:
        if runner.device.type == "cuda" and held:
            block = reference.load(study.examples, 0, rows)
            return _peak(reference.device, lambda: reference.outputs(block, everything))
        block = runner.load(study.examples, 0, rows)
        if runner.device.type == "cuda":
            return _peak(runner.device, lambda: runner.base_output(block))
        with _module_sizes(model) as sizes:
            runner.base_output(block)
        return max(sizes, default=0.0) + sum(sizes) * held

    return _per_row(used, len(study.examples))


def gradient_bytes(study: Study, model: nn.Module) -> float:
    """Return the bytes that one example takes in a forward and backward pass: on CUDA the peak, else what is saved.

    Raises:
        AblationError: When components or output have no gradient.
    """
    components = study.components
    zeros = torch.zeros(components.width)
    reference = ReferenceRunner(model, components, zeros, study.output, batch_size=MEASURED)

    def used(rows: int) -> float:
        block = reference.load(study.examples, 0, rows)
        if reference.device.type == "cuda":
            return _peak(reference.device, lambda: reference.full_model_gradients(block))
        saved: dict[int, int] = {}  # bytes by the address of a storage

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            reference.full_model_gradients(block)
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
