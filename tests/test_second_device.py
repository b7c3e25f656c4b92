"""Everything that runs on a device runs on one without silent transfers: see `second_device.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FAST = ("a run with mean", "baselines", "a_language_model_reads_few_logits", "lenses")
SLOW = (
    *("a run with zero", "a run with zero activation", "a run with peak", "a run with optimal", "a run with resample"),
    *("divergence_from_the_unablated_model", "precision_is_measured", "parameter_slices", "texts_of_several_lengths"),
    *(
        "attention_heads_by_position",
        "a_model_that_accelerate_has_split",
        "edges",
        "edges_with_other_examples",
        "edits",
        "circuits",
        "traces",
        "a_page",
    ),
)


def failures(names):
    """By name of a case that fails on the second device, the reason."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.second_device", *names]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["case"] for one in said] == list(names), done.stderr
    return {one["case"]: one["reason"] for one in said if one["reason"]}


def test_runs_baselines_and_lenses_on_a_device_without_silent_transfers():
    assert failures(FAST) == {}


@pytest.mark.slow
def test_everything_else_on_a_device_without_silent_transfers():
    assert failures(SLOW) == {}
