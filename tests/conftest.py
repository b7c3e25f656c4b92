"""Fixtures that several test files share: real pipelines, and what is skipped where data is missing."""

import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("COAR_FSYNC", "0")  # tests make thousands of files; those of a loss of power set it to 1
os.environ.setdefault("HF_MODULES_CACHE", str(Path(tempfile.gettempdir()) / f"coar-tests-{os.getuid()}" / "modules"))
NO_CIFAR = "needs COAR_DATA to name a folder with cifar10_subset.npz and cifar10_resnet20.safetensors"


@pytest.fixture(scope="session")
def digits():
    """The default pipeline, its net trained once and kept under data/digits."""
    from pipelines import digits as pipeline

    pipeline.model()
    return pipeline


@pytest.fixture(scope="session")
def cifar10():
    """The cifar10 pipeline on real images and pretrained weights, or a skip that says what is missing."""
    folder = os.environ.get("COAR_DATA")
    if not folder or not (Path(folder) / "cifar10_subset.npz").is_file():
        pytest.skip(NO_CIFAR)
    from pipelines import cifar10 as pipeline

    return pipeline


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)
