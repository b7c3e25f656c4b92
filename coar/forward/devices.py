"""Devices: the ones available, and float32 without rounding to TF32."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from coar.errors import SettingsError

BATCH_SIZE = {"cpu": 128, "cuda": 512}  # examples per forward pass by default
KNOWN = ("cuda", "mps", "xpu")
OTHER_BATCH_SIZE = 256  # the same on other devices


def batch_size_on(device: torch.device) -> int:
    """Return the default number of examples per forward pass on a device."""
    return BATCH_SIZE.get(device.type, OTHER_BATCH_SIZE)


def choose_device(name: str) -> torch.device:
    """Return a device for `auto`, `cpu`, `cuda`, `cuda:1`, `mps`, or another accelerator that torch finds, as `xpu`.

    Raises:
        SettingsError: When there is no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kinds = ["cpu"] if accelerator is None else [accelerator.type, "cpu"]
    if name == "auto":
        return torch.device(kinds[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in (*kinds, *KNOWN):
        raise SettingsError(f"unknown device {name!r}; choose auto, cpu, cuda, cuda:N, mps or xpu")
    count = 1 if device.type == "cpu" else torch.accelerator.device_count()
    if device.type not in kinds or (device.index or 0) >= count:
        raise SettingsError(
            f"device {name!r} is not available on this machine, which has {', '.join(reversed(kinds))}; choose one of "
            f"those"
        )
    return device


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, or in this process's share of the machine; None if not known."""
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(device)[0])
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo")}
    if device.type != "cpu" or "MemAvailable" not in found:
        return None
    most, used, kinds = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current", "stat"))
    if not (most and used and most[0].isdigit()):
        return found["MemAvailable"]
    cached = sum(int(line.split()[1]) for line in kinds if line.split()[0] in ("active_file", "inactive_file"))
    return min(found["MemAvailable"], int(most[0]) - int(used[0]) + cached)  # files are dropped when memory is needed


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep products, convolutions and recurrent layers on CUDA from rounding float32 to TF32; restore the settings."""
    convolutions, recurrent = torch.backends.cudnn.conv, torch.backends.cudnn.rnn  # type: ignore[attr-defined]
    kinds: tuple[Any, ...] = (torch.backends.cuda.matmul, convolutions, recurrent)
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text().split("\n")[:-1]
    except OSError:
        return []
