"""Devices: the ones available, copies of models on them, and float32 without rounding to TF32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from coar.equivalence import rounding
from coar.errors import SettingsError
from coar.model_copy import independent_copy

BATCH_SIZE = {"cpu": 128, "cuda": 512, "mps": 256}  # examples per forward pass by default
ACTIVATIONS, GELU_BY_TANH = "transformers.activations", ("NewGELUActivation", "FastGELUActivation")


def choose_device(name: str) -> torch.device:
    """Return a device for `auto`, `cpu`, `cuda`, `cuda:1` or `mps`; raise `SettingsError` for others."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in there:
        raise SettingsError(f"unknown device {name!r}; choose auto, cpu, cuda, cuda:N or mps")
    if not there[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        found = ", ".join(kind for kind, present in there.items() if present)
        raise SettingsError(f"device {name!r} is not available on this machine, which has {found}; choose one of those")
    return device


def device_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a model on the device, in evaluation mode; the user's model does not change.

    In the copy, one kernel of torch replaces activations that are written as several elementwise steps.

    Raises:
        WeightsError: When a module of the model cannot be copied.
    """
    copy = independent_copy(model)
    # the class's own `to`: one that was set on the instance, as accelerate does, is bound to the user's model
    copy = type(copy).to(copy, device).eval().requires_grad_(False)
    if rounding(copy) <= torch.finfo(torch.float32).eps:  # models of lower precision round between the steps
        _fuse_activations(copy)
    for module in copy.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.to(memory_format=torch.channels_last)
    return copy


def _fuse_activations(model: nn.Module) -> None:
    """Replace transformers' GELU by tanh, written in elementwise steps, unless it has hooks."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind, hooked = type(child), child._forward_hooks or child._forward_pre_hooks
            if kind.__module__ == ACTIVATIONS and kind.__name__ in GELU_BY_TANH and not hooked:
                setattr(parent, name, nn.GELU(approximate="tanh"))


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep CUDA's convolutions and recurrent layers from rounding float32 to TF32; restore the settings afterwards."""
    kinds: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn)  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision
