"""The short form of an hour of collecting under kills: `benchmarks/scale.py --soak 60` is the long one."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_collecting_under_kills_for_a_minute(digits, tmp_path):
    command = [sys.executable, "-m", "benchmarks.scale", "--soak", "1", "--every", "10", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560, check=False)
    counts = re.search(r"(\d+) units, (\d+) workers killed, 0 units missing, 0 problems", done.stdout)
    assert counts, done.stdout + done.stderr
    assert int(counts[2]) >= 1
    assert int(counts[1]) > 100
    assert re.search(r"driver +\d+ MiB in the middle third", done.stdout), done.stdout
