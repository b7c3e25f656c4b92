"""Small studies that several test files collect, and runs compared file by file."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import coar
from pipelines import digits

EXAMPLES = 20
BLOCKS = {"mask_block": 16, "example_block": 8}  # 20 examples: the last block is partial


class Net(nn.Module):
    """Eleven neurons, so that a packed mask has five bits to spare."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 11)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(11, 3)

    def forward(self, x):
        return self.head(self.dropout(torch.relu(self.hidden(x))))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Net()


def inputs(seed: int = 1) -> torch.Tensor:
    return torch.randn(EXAMPLES, 6, generator=seeded(seed))


def examples(**changes) -> coar.Examples:
    parts = {
        "inputs": inputs(),
        "targets": torch.arange(EXAMPLES) % 3,
        "metadata": {"group": [f"group {i % 2}" for i in range(EXAMPLES)]},
    }
    return coar.Examples(**{**parts, **changes})


def study(**changes) -> coar.Study:
    parts = {"model": net(), "examples": examples(), **changes}
    return coar.Study(**{"components": coar.neurons(parts["model"], include="*hidden"), **parts})


def digits_study(count: int = EXAMPLES) -> coar.Study:
    whole = digits.study(ablation="zero")
    return replace(whole, examples=whole.examples.subset(range(count)))


def collect(what: coar.Study, path: Path, **settings) -> coar.Run:
    """Collect on a CPU in small units; settings of `coar.Execution` are given among the others."""
    return coar.collect(
        what, path, **grouped({"device": "cpu", "progress": False, "batch_size": 128, **BLOCKS, **settings})
    )


def grouped(settings: dict) -> dict:
    """Return settings for `coar.collect` with those of `coar.Execution` in one."""
    execution = {name: value for name, value in settings.items() if name in coar.Execution.model_fields}
    others = {name: value for name, value in settings.items() if name not in execution}
    return {**others, "execution": coar.Execution(**execution)}


def files(root: Path) -> dict[str, bytes]:
    """Return the content of every file of a run by its path inside it."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def chunks(root: Path) -> dict[str, bytes]:
    """Return the content of every chunk file of a run."""
    return {name: content for name, content in files(root).items() if not name.endswith("zarr.json")}


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Return the names of the files that are not the same in both."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Return the time of the last change and the inode of every file of a run."""
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in root.rglob("*")
        if path.is_file()
    }


def copied(run: coar.Run, path: Path) -> coar.Run:
    return coar.Run.open(shutil.copytree(run.path, path))


def row_labels(run: coar.Run) -> list[str]:
    return [run.plan.label(row) for row in range(len(run.plan))]


def whole(run: coar.Run, name: str) -> np.ndarray:
    """Read an array by nothing but Zarr."""
    return np.asarray(run.group[name][...])


def mount(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)


def resize(disk: Path, size: str) -> None:
    assert mount("-o", f"remount,rw,size={size}", disk).returncode == 0


def fill(disk: Path) -> Path:
    """Take all the room that is left, and return the file that takes it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        file.writelines(bytes(4096) for _ in range(10_000))
    return filler
