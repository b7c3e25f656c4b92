"""A run whose writer is killed again and again ends up the same as one that never was."""

import os
import random
import shutil
import signal
import time

import pytest

from coar.cli.watching import watched
from coar.errors import CoarError, RunError
from coar.store.integrity import verify
from coar.store.run import Run
from tests.faults.helpers import collect, differing, digits_study, files
from tests.faults.server import BLOCKS, EXAMPLES, stored_units, until

CALLS = ({"masks": 130, "test_masks": 20}, {"masks": 231, "test_masks": 20})  # created, then extended across a chunk
TOTAL = 63 * 3  # units
SHORT = ({"masks": 22}, {"masks": 46})  # 6 * 3 and 12 * 3 units


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory):
    """The run as it is when nothing happens to its writer."""
    path = tmp_path_factory.mktemp("run") / "whole.zarr"
    server.finish(path, *CALLS)
    return path


@pytest.fixture(scope="module")
def short(server, tmp_path_factory):
    """A shorter run to which nothing happens."""
    path = tmp_path_factory.mktemp("run") / "short.zarr"
    server.finish(path, *SHORT)
    return path


def whole(path):
    try:
        return len(Run.open(path).plan) == 251 and not Run.open(path).missing_units()
    except CoarError:
        return False


def let_run(path, more, seconds):
    """Wait until some more units are stored, or the time is up."""
    goal, end = min(stored_units(path) + more, TOTAL), time.monotonic() + seconds
    until(lambda: stored_units(path) >= goal or time.monotonic() > end, "progress")


def test_killed_once_the_run_was_described(server, short, tmp_path):
    """The mark of a creation is the last thing to go; a kill before that leaves it beside a whole run."""
    path = tmp_path / "r.zarr"
    shutil.copytree(short, path)
    (path / "creating.json").write_text("{}")
    server.finish(path, SHORT[-1])
    assert differing(files(path), files(short)) == []


@pytest.mark.parametrize(("kills", "most"), [(20, 6), pytest.param(50, 4, marks=pytest.mark.slow)])
def test_killed_again_and_again(server, uninterrupted, tmp_path, kills, most):
    path = tmp_path / "killed.zarr"
    rng = random.Random(kills)
    landed = 0
    for attempt in range(kills):
        child = server.start(path, *CALLS)
        more = rng.randint(1, most)  # so few that all the kills together stay short of the end
        let_run(path, more, seconds=rng.uniform(0, 0.4) if attempt % 5 == 0 else 60.0)  # one in five may hit the start
        time.sleep(rng.uniform(0, 0.003))
        child.send(signal.SIGKILL)
        landed += child.wait() == -signal.SIGKILL and not whole(path)
    assert landed >= 0.75 * kills
    server.finish(path, *CALLS)
    assert differing(files(path), files(uninterrupted)) == []
    assert stored_units(path) == TOTAL
    assert verify(Run.open(path)) == []


def test_clock_that_jumps(server, short, tmp_path, monkeypatch):
    """No decision rests on the time of day, nor on times of files."""
    rng = random.Random(0)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + rng.uniform(-1e8, 1e8))
    path = tmp_path / "jumped.zarr"
    collect(digits_study(EXAMPLES), path, **BLOCKS, **SHORT[0])
    for file in sorted(path.rglob("*")):
        os.utime(file, (rng.uniform(0, 4e9), rng.uniform(0, 4e9)))
    collect(digits_study(EXAMPLES), path, **BLOCKS, **SHORT[1])
    assert differing(files(path), files(short)) == []
    glances = list(watched(path, every=None))
    assert [glance.seconds_left for glance in glances] == [None]


def stamp(file):
    return (file.stat().st_mtime_ns, file.stat().st_ino) if file.exists() else None


WATCHED = ["outputs/zarr.json", "masks/zarr.json", "split/zarr.json", "ablated_fraction/zarr.json", "zarr.json"]


@pytest.mark.parametrize("watched", WATCHED)  # in the order in which an extension changes them
def test_killed_while_it_is_extended(server, short, tmp_path, watched):
    path = tmp_path / "killed.zarr"
    child = server.start(path, *SHORT)
    until(lambda: stored_units(path) == 6 * 3, "the first call's last unit")
    before = stamp(path / watched)
    until(lambda: stamp(path / watched) != before, "the extension")
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert stored_units(path) < 12 * 3
    server.finish(path, *SHORT)
    assert differing(files(path), files(short)) == []


def test_second_writer_during_the_creation(server, short, tmp_path):
    path = tmp_path / "created.zarr"
    child = server.start(path, *SHORT)
    until((path / "outputs").exists, "the first array")
    child.send(signal.SIGSTOP)  # in the middle: the run is described last
    with pytest.raises(RunError, match="another process"):
        collect(digits_study(EXAMPLES), path, **BLOCKS, **SHORT[0])
    child.send(signal.SIGCONT)
    assert child.wait() == 0, child.says()
    assert differing(files(path), files(short)) == []


def test_started_twice_at_once(server, short, tmp_path):
    for attempt in range(4):
        path = tmp_path / f"{attempt}.zarr"
        children = [server.start(path, *SHORT) for _ in range(2)]
        codes = [child.wait() for child in children]
        refused = [child.says() for child, code in zip(children, codes, strict=True) if code != 0]
        assert all("RunError: another process " in says for says in refused), refused[0]
        assert 0 in codes
        assert differing(files(path), files(short)) == []
