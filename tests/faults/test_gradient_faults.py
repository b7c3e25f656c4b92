"""Collecting mask gradients that is killed, stopped or out of room goes on to the same run, byte for byte."""

import random
import re
import signal
import time

import pytest

import coar
from coar.errors import CoarError, StorageError
from coar.store.gradients import MaskGradients
from coar.store.integrity import verify
from coar.store.run import Run
from tests.faults.helpers import collect, differing, files, fill, resize, study
from tests.faults.server import stored_units, until

CALLS = ({"gradients": 16}, {"gradients": 64, "masks": 12})  # made, then extended, on 3 blocks of examples
MADE, UNITS = 6 * 3, 10 * 3  # rounds of 2, 2, 2, 2, 4, 4, then of 8, 8, 16 and 16, on each block
KILLS = 8


def stored_gradients(path):
    """Count the chunks of mask gradients' outputs in a run that is being written."""
    return sum(file.name.isdigit() for file in path.glob("gradient_outputs/c/*/*/*"))


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory):
    """The run as it is when nothing happens to its writer."""
    path = tmp_path_factory.mktemp("run") / "whole.zarr"
    server.finish(path, *CALLS)
    return path


def whole(path):
    try:
        mask_gradients = MaskGradients(Run.open(path))
        return (
            mask_gradients.count == 64 and not mask_gradients.missing_units() and not mask_gradients.run.missing_units()
        )
    except CoarError:
        return False


def test_killed_again_and_again(server, uninterrupted, tmp_path):
    path = tmp_path / "killed.zarr"
    rng = random.Random(0)
    landed = 0
    for _ in range(KILLS):
        child = server.start(path, *CALLS)
        goal = min(stored_gradients(path) + rng.randint(0, 3), UNITS)
        until(lambda goal=goal: stored_gradients(path) >= goal, "progress")
        time.sleep(rng.uniform(0, 0.15))
        child.send(signal.SIGKILL)
        landed += child.wait() == -signal.SIGKILL and not whole(path)
    assert landed >= KILLS - 2
    server.finish(path, *CALLS)
    assert differing(files(path), files(uninterrupted)) == []
    assert stored_gradients(path) == UNITS
    assert verify(Run.open(path)) == []


def stamp(file):
    return (file.stat().st_mtime_ns, file.stat().st_ino) if file.exists() else None


@pytest.mark.parametrize("watched", ["gradient_kept/zarr.json", "gradient_outputs/zarr.json", "zarr.json"])
def test_killed_while_it_is_extended(server, uninterrupted, tmp_path, watched):
    path = tmp_path / "killed.zarr"
    child = server.start(path, *CALLS)
    until(lambda: stored_gradients(path) == MADE, "the first call's last unit")
    before = stamp(path / watched)
    until(lambda: stamp(path / watched) != before, "the extension")
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert stored_gradients(path) < UNITS
    server.finish(path, *CALLS)
    assert differing(files(path), files(uninterrupted)) == []


def test_first_interrupt_finishes_the_unit(server, uninterrupted, tmp_path):
    path = tmp_path / "stopped.zarr"
    server.finish(path, CALLS[0])
    child = server.start(path, CALLS[1])
    until(lambda: stored_gradients(path) >= MADE + 2, "the second unit")
    child.send(signal.SIGINT)
    assert child.wait() == -signal.SIGINT
    said = re.search(r"KeyboardInterrupt: stopped after mask gradient unit (\d+) of 30; .* run the same", child.says())
    assert said, child.says()
    assert stored_gradients(path) == int(said[1]) == UNITS - len(MaskGradients(Run.open(path)).missing_units())
    assert MADE + 2 <= int(said[1]) < UNITS
    server.finish(path, CALLS[1])
    assert differing(files(path), files(uninterrupted)) == []


def test_interrupt_in_the_last_unit_of_mask_gradients_stops_before_the_masks(server, tmp_path):
    call = {"gradients": 128, "masks": 20, "example_block": 24}  # twelve rounds, the last of 32
    for attempt in range(5):  # on a busy machine the signal may come after the unit
        path = tmp_path / f"{attempt}.zarr"
        child = server.start(path, call)
        until(lambda path=path: stored_gradients(path) >= 11, "the last unit's start")
        child.send(signal.SIGINT)
        child.wait()
        if "stopped after mask gradient unit 12 of 12;" in child.says():
            break
    assert "stopped after mask gradient unit 12 of 12;" in child.says()
    assert (stored_gradients(path), stored_units(path)) == (12, 0)
    server.finish(path, call)
    assert stored_units(path) == 5
    assert verify(Run.open(path)) == []


ASKED = {"gradients": 512, "masks": 4}  # 72 units, each of three files, and a file takes 4 kB at least


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run on a disk with room."""
    return collect(study(), tmp_path_factory.mktemp("run") / "whole.zarr", **ASKED)


def test_disk_full_in_mid_run(disk, reference):
    path = disk / "r.zarr"
    with pytest.raises(StorageError, match=r"the disk is full.*what was stored before is intact"):
        collect(study(), path, **ASKED)
    missing = MaskGradients(Run.open(path)).missing_units()
    assert 0 < len(missing) < 72
    stored = files(path)
    assert not [name for name in stored if name.endswith(".partial")]
    done = {name for name in stored if name.startswith("gradient_outputs/c/")}
    assert {name: stored[name] for name in done}.items() <= files(reference.path).items()
    resize(disk, "10m")
    collect(study(), path, **ASKED)
    assert differing(files(path), files(reference.path)) == []


@pytest.mark.parametrize("pages", [0, 1, 2, 3])
def test_disk_full_while_mask_gradients_are_planned(disk, pages):
    resize(disk, "10m")
    path = disk / "r.zarr"
    before = collect(study(), path, gradients=8, masks=4)
    stored = files(path)
    filler = fill(disk)
    with filler.open("rb+") as file:
        file.truncate(filler.stat().st_size - pages * 4096)
    with pytest.raises(StorageError, match="the disk is full"):
        collect(study(), path, gradients=16, masks=4)
    chunks = {name: content for name, content in stored.items() if "/c/" in name}
    assert chunks.items() <= files(path).items()
    assert (
        MaskGradients(Run.open(path)).outputs(4, slice(0, 20)).tobytes()
        == MaskGradients(before).outputs(4, slice(0, 20)).tobytes()
    )
    filler.unlink()
    grown = collect(study(), path, gradients=16, masks=4)
    assert MaskGradients(grown).rounds == (2, 2, 2, 2, 4, 4)
    assert verify(coar.Run.open(path)) == []
