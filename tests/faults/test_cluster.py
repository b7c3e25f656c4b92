"""A cluster of several nodes on this machine: nodes that go and come, a driver that is killed, units done twice."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import coar
from coar.cluster import RayCluster
from coar.collection.preparation import BatchSettings, unit_runner
from coar.forward.copies import device_copy
from coar.store.integrity import verify
from coar.store.plan import Unit
from tests.faults import helpers
from tests.faults.server import stored_units, until
from tests.test_ray_engine import ASKED, study_slowly

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]
ROOT = Path(__file__).parents[2]
UNITS = 24


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return helpers.collect(helpers.study(), tmp_path_factory.mktemp("run") / "whole.zarr", **ASKED)


@pytest.fixture
def nodes():
    """A head that does no units, and a way to add nodes of one processor each."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def drive(cluster, path, *more):
    """Start a driver of its own process."""
    command = [sys.executable, "-m", "tests.faults.driver", cluster.address, str(path), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def check(path, reference):
    assert helpers.differing(helpers.files(path), helpers.files(reference.path)) == []
    assert verify(coar.Run.open(path)) == []


def test_nodes_go_and_come(nodes, reference, tmp_path):
    """Both nodes that the work began on are lost, one after the other; another has joined before the second goes."""
    path = tmp_path / "r.zarr"
    first, second = nodes.add_node(num_cpus=1), nodes.add_node(num_cpus=1)
    driver = drive(nodes, path)
    try:
        until(lambda: stored_units(path) >= 3 or driver.poll() is not None, "the third unit")
        nodes.remove_node(first, allow_graceful=False)
        nodes.add_node(num_cpus=1)
        seen = stored_units(path)
        until(lambda: stored_units(path) >= min(seen + 4, UNITS - 4) or driver.poll() is not None, "more units")
        nodes.remove_node(second, allow_graceful=False)
        assert stored_units(path) < UNITS
        said = driver.communicate(timeout=240)[0]
    finally:
        driver.kill()
    assert driver.returncode == 0, said
    check(path, reference)


def test_driver_killed_and_started_again(nodes, reference, tmp_path):
    """What its workers had in hand may be stored after its end, while the next driver is at work already."""
    path = tmp_path / "r.zarr"
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    for goal in (3, 9, 15):
        driver = drive(nodes, path)
        until(lambda goal=goal, driver=driver: stored_units(path) >= goal or driver.poll() is not None, "some units")
        assert driver.poll() is None, driver.communicate()[0]
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        driver.stdout.close()
    assert stored_units(path) < UNITS
    driver = drive(nodes, path)
    said = driver.communicate(timeout=240)[0]
    assert driver.returncode == 0, said
    check(path, reference)


def test_fit_survives_the_loss_of_a_node(nodes, reference, tmp_path):
    """The sums that the node had made are made again elsewhere."""
    run = helpers.copied(reference, tmp_path / "r.zarr")
    whole = coar.fit(run, method="ridge", name="whole", progress=False)
    first = nodes.add_node(num_cpus=1)
    driver = drive(nodes, run.path, "fit")
    until(lambda: "begun" in json.dumps(os.listdir(tmp_path)) or driver.poll() is not None, "the first sums")
    nodes.remove_node(first, allow_graceful=False)
    nodes.add_node(num_cpus=1)
    said = driver.communicate(timeout=240)[0]
    assert driver.returncode == 0, said
    made = coar.load(run.path, fit="ridge")
    assert (made.weights() == whole.weights()).all()
    assert (made.standard_errors() == whole.standard_errors()).all()
    assert verify(coar.Run.open(run.path)) == []


def test_a_unit_done_twice_at_once(reference, tmp_path):
    """A worker that was thought lost puts the same chunks beside the one that took its unit over."""
    run = helpers.copied(reference, tmp_path / "r.zarr")
    (run.path / "outputs/c/2/1").unlink()

    def work(study):
        model = device_copy(study.model, torch.device("cpu"))
        runner = unit_runner(study, coar.Run.open(run.path), model, BatchSettings(128, 128, tune=False, compiled=False))
        barrier.wait()
        runner.do(Unit(2, 1))
        ended.append(time.monotonic())

    barrier, ended = threading.Barrier(3), []
    studies = [study_slowly(seconds) for seconds in (0.0, 0.0, 0.05)]  # one by one, since seeds are the process's
    threads = [threading.Thread(target=work, args=(study,)) for study in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 3
    check(run.path, reference)


def test_cluster_settings_name_no_study(tmp_path):
    with pytest.raises(coar.CoarError, match="no study for its workers"):
        helpers.collect(helpers.study(), tmp_path / "r.zarr", **ASKED, cluster=RayCluster())
