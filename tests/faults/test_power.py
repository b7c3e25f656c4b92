"""A loss of power: what was not synced is gone or empty, and the run goes on to the same end."""

import os
import random
import time
from pathlib import Path

import pytest

import coar
from coar.store import disk
from coar.store.integrity import verify
from tests.faults.helpers import collect, differing, files, study

ASKED = {"masks": 60, "test_masks": 20, "gradients": 8}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return collect(study(), tmp_path_factory.mktemp("run") / "whole.zarr", **ASKED)


class Disk:
    """What a disk would hold after a loss of power: contents and names that were synced, and of the rest some.

    A file's content is safe once it was synced, and its name once the folder was. Names that were not synced may be
    there or not; a name may be there without the content, which is then empty.
    """

    def __init__(self, monkeypatch, root: Path, moment: int) -> None:
        self.root, self._calls, self._last = root, 0, 0.0
        self.contents: dict[int, bytes] = {}  # synced, by inode
        self.names: dict[Path, int] = {}  # synced, inode by path
        real = os.fsync

        def fsync(handle: int) -> None:
            if self._calls >= moment:
                raise PowerCutError  # threads that were in the middle of a write stop too
            real(handle)
            self.synced(Path(os.readlink(f"/proc/self/fd/{handle}")), os.fstat(handle).st_ino)
            self._calls += 1
            self._last = time.monotonic()
            if self._calls == moment:
                raise PowerCutError

        monkeypatch.setattr(disk.os, "fsync", fsync)

    def synced(self, path: Path, inode: int) -> None:
        if path.is_file():
            self.contents[inode] = path.read_bytes()
        elif self.root == path or self.root in path.parents:
            self.names = {name: found for name, found in self.names.items() if name.parent != path}
            named = [entry for entry in path.iterdir() if not entry.name.endswith(".partial")]  # those come and go
            self.names |= {entry: entry.stat().st_ino for entry in named}

    def cut(self, rng: random.Random) -> None:
        """Leave on the disk what a loss of power would, once the writer's threads have come to an end."""
        while time.monotonic() < self._last + 0.5:
            time.sleep(0.05)
        for file in sorted(self.root.rglob("*"), reverse=True):
            inode = file.stat().st_ino
            if self.names.get(file) == inode or rng.random() < 0.5:
                if file.is_file() and inode not in self.contents:
                    file.write_bytes(b"")
            elif file.is_file():
                file.unlink()
            elif not any(file.iterdir()):
                file.rmdir()


class PowerCutError(BaseException):
    """Nothing catches this, as nothing survives a loss of power."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", [3, 20, 61, 78, 85, 93, 120, 151, 200, 260])
def test_power_is_lost(reference, tmp_path, monkeypatch, moment):
    """At every moment a chunk that is there is whole: no file is empty under a name that counts."""
    monkeypatch.setenv("COAR_FSYNC", "1")
    path, rng = tmp_path / "r.zarr", random.Random(moment)
    lost = Disk(monkeypatch, path, moment)
    with pytest.raises(PowerCutError):
        collect(study(), path, **ASKED)
    lost.cut(rng)
    named = [file for file in path.rglob("*") if file.is_file() and not file.name.endswith(".partial")]
    assert [file for file in named if not file.read_bytes()] == []
    monkeypatch.undo()
    collect(study(), path, **ASKED)
    assert differing(files(path), files(reference.path)) == []
    assert verify(coar.Run.open(path)) == []


def test_syncing_can_be_left_to_the_system(tmp_path, monkeypatch):
    def never(handle):
        raise AssertionError("nothing is synced")

    monkeypatch.setattr(disk.os, "fsync", never)
    monkeypatch.setenv("COAR_FSYNC", "0")
    assert collect(study(), tmp_path / "r.zarr", masks=4).missing_units() == []
