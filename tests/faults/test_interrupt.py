"""Ctrl-C: the first finishes the unit and leaves a run to go on with, the second stops at once."""

import re
import signal

from coar.store.run import Run
from tests.faults.helpers import differing, files
from tests.faults.server import stored_units, until

ASKED = {"masks": 100, "test_masks": 20}


def test_first_interrupt_finishes_the_unit(server, tmp_path):
    whole, path = tmp_path / "whole.zarr", tmp_path / "stopped.zarr"
    server.finish(whole, ASKED)
    child = server.start(path, ASKED)
    until(lambda: stored_units(path) >= 3, "the third unit")
    child.send(signal.SIGINT)
    assert child.wait() == -signal.SIGINT
    said = re.search(
        r"KeyboardInterrupt: stopped after mask unit (\d+) of 90; .* run the same command again", child.says()
    )
    assert said, child.says()
    assert stored_units(path) == int(said[1]) == 90 - len(Run.open(path).missing_units())
    assert 3 <= int(said[1]) < 90
    assert "stopping after the current unit; press Ctrl-C again" in child.says()
    server.finish(path, ASKED)
    assert differing(files(path), files(whole)) == []


def test_interrupt_in_the_last_unit_ends_as_usual(server, tmp_path):
    path = tmp_path / "last.zarr"
    child = server.start(path, {"masks": 1500, "mask_block": 1500, "example_block": 24})
    until(lambda: "collect masks:" in child.says(), "the first unit's start")
    child.send(signal.SIGINT)
    assert child.wait() == 0
    assert "stopping after the current unit" in child.says()
    assert Run.open(path).missing_units() == []


def test_second_interrupt_stops_at_once(server, tmp_path):
    path = tmp_path / "twice.zarr"
    call = {"masks": 6000, "mask_block": 3000, "example_block": 24}
    child = server.start(path, call)
    until(lambda: "collect masks:" in child.says(), "the first unit's start")
    child.send(signal.SIGINT)
    until(lambda: "press Ctrl-C again to stop at once" in child.says(), "the warning")
    child.send(signal.SIGINT)
    assert child.wait() == -signal.SIGINT
    assert "stopped after mask unit" not in child.says()
    assert stored_units(path) == 0
    assert len(Run.open(path).missing_units()) == 2
