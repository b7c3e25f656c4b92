"""Fixtures that the tests of faults share."""

import subprocess

import pytest

from tests.faults.helpers import mount
from tests.faults.server import Server


@pytest.fixture(scope="session")
def server(digits, tmp_path_factory):
    """A process that forks children which collect the digits; the net is trained before it starts."""
    started = Server(tmp_path_factory.mktemp("logs"))
    yield started
    started.close()


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = mount("-t", "tmpfs", "-o", "size=500k", "tmpfs", folder)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
