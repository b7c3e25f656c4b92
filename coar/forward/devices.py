"""Devices: the ones available, and float32 without rounding to TF32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from coar.errors import SettingsError

BATCH_SIZE = {"cpu": 128, "cuda": 512, "mps": 256}  # examples per forward pass by default


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
