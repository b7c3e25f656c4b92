"""Memory that passes free: kept while work goes on, given back afterwards, by the system's own counts."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
from pathlib import Path
import torch
from torch import nn
from coar.forward.malloc import memory_kept

torch.set_num_threads(1)
model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3, groups=64), nn.ReLU())
x = torch.randn(16, 3, 128, 128)  # activations of 62 MiB

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

def faults(passes=3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.inference_mode():
        for _ in range(passes):
            model(x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / passes

faults()
found = {"before": resident(), "plain": faults()}
try:
    with memory_kept():
        with memory_kept():
            faults()
        found["kept"], found["inside"] = faults(), resident()
        raise KeyError
except KeyError:
    found["after"], found["again"] = resident(), faults()
print(json.dumps(found))
"""


def measured(**environment):
    """Page faults per pass and resident MiB before, in and after the time that memory is kept."""
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=clean | environment
    )
    return json.loads(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="faults and resident pages are read as Linux counts them")
def test_passes_use_the_memory_that_earlier_ones_freed():
    found = measured()
    if found["plain"] < 10_000:
        pytest.skip("this system's malloc keeps large blocks by itself")
    assert found["kept"] < found["plain"] / 5  # none on a quiet machine; some where the system reclaims pages
    assert found["inside"] > found["before"] + 50  # MiB: two activations
    assert found["after"] < found["before"] + 20
    assert found["again"] > found["plain"] / 5  # malloc may still reuse a block between two passes


@pytest.mark.skipif(sys.platform != "linux", reason="faults are read as Linux counts them")
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_of_malloc_is_left_alone(name):
    """The value is what malloc comes to anyway, so passes go on as they do without keeping memory."""
    found = measured(**{name: "glibc.malloc.trim_threshold=131072" if name == "GLIBC_TUNABLES" else "131072"})
    assert found["kept"] > found["plain"] / 2


RETURNED = """
import resource
from pathlib import Path
from coar.forward.malloc import return_freed

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

blocks = [bytearray(64 * 2**10) for _ in range(4_000)]  # 250 MiB on the heap
last = bytearray(64 * 2**10)  # the end of the heap stays in use
del blocks
before = resident()
return_freed()
print(before - resident(), len(last))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are read as Linux counts them")
def test_freed_blocks_below_one_in_use_are_returned():
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True, env=clean)
    assert float(done.stdout.split()[0]) > 200
