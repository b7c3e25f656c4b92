"""The benchmark of a GPU runs at small sizes on a CPU, so that it works the first time there is a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPECTED = {"CIFAR ResNet-20", "ViT, small", "GPT-2, small", "fit by ridge", "edges of GPT-2's size"}


@pytest.mark.slow
def test_every_part_of_the_benchmark_runs(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*-gpu.json")
    found = json.loads(file.read_text())
    assert found["missing"] == {}
    assert found["numbers"].keys() > EXPECTED
    for name in ("CIFAR ResNet-20", "ViT, small", "GPT-2, small"):
        numbers = found["numbers"][name]
        assert 0 < numbers["difference from the loop"] < 0.2  # bfloat16
        assert numbers["mask gradient, masks"] > 0
        assert numbers["times the published loop"] > 0
    assert file.with_suffix(".md").read_text().startswith("# GPU, ")
