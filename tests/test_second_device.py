"""Everything that runs on a device runs on one without silent transfers: see `second_device.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device_cases import CASES

FAST = ("a run with mean", "baselines", "a split model with mean")


def failures(names):
    """By name of a case that fails on the second device, the reason."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.second_device", *names]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["case"] for one in said] == list(names), done.stderr
    return {one["case"]: one["reason"] for one in said if one["reason"]}


def test_runs_and_baselines_on_a_device_without_silent_transfers():
    assert failures(FAST) == {}


@pytest.mark.slow
def test_everything_else_on_a_device_without_silent_transfers():
    assert failures([name for name in CASES if name not in FAST]) == {}
