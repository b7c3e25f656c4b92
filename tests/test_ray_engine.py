"""Units on a Ray cluster: the run that one process makes, byte for byte, whoever is lost on the way."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import coar
from coar.cluster import RayCluster
from coar.collection.ray_engine import AHEAD, ActorPool
from coar.errors import CoarError, EngineError, MismatchError, OutputError, PipelineError, SettingsError
from coar.pipeline import load_pipeline
from coar.progress import WORKER_LOST
from coar.store.integrity import verify
from tests.buckets import free_port
from tests.faults import helpers

ASKED = {"masks": 100, "test_masks": 20, "gradients": 8}
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run as this process collects it; read only."""
    return helpers.collect(helpers.study(), tmp_path_factory.mktemp("run") / "whole.zarr", **ASKED)


@pytest.fixture(scope="module")
def session():
    """One session of Ray for all tests: starting takes many seconds."""
    import ray

    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    settings = {"address": "local", "include_dashboard": False, "log_to_driver": False, "_node_ip_address": "127.0.0.1"}
    ray.init(num_cpus=4, configure_logging=False, **settings)
    yield ray
    ray.shutdown()


def study_slowly(seconds=0.05):
    """The tiny study, with a model that takes its time, so that there is something to kill."""
    made = helpers.study()

    def wait(*_):
        time.sleep(seconds)

    made.model.register_forward_hook(wait)
    return made


def study_with_inputs(seed):
    return helpers.study(examples=helpers.examples(inputs=helpers.inputs(seed)))


def not_finite():
    made = helpers.study()

    def spoil(module, args, output):
        return output / 0 if torch.is_inference_mode_enabled() else output

    made.model.register_forward_hook(spoil)
    return made


def of_another_version():
    torch.__version__ = "0.0.1"  # in the worker, which ends with this error
    return helpers.study()


def raises():
    raise RuntimeError("no such data here")


def ends():
    os._exit(1)


def on_cluster(path, study=helpers.study, **settings):
    return helpers.collect(helpers.study(), path, **ASKED, cluster=RayCluster(study=study, **settings))


@needs_ray
@pytest.mark.slow
def test_the_same_run_byte_for_byte(session, run, tmp_path):
    made = on_cluster(tmp_path / "r.zarr")
    assert helpers.differing(helpers.files(made.path), helpers.files(run.path)) == []


@needs_ray
@pytest.mark.slow
def test_one_bar_for_all_workers_and_two_units_in_hand_of_each(session, tmp_path, monkeypatch, capsys):
    in_hand, finished = [], ActorPool._finished

    def counted(crew):
        in_hand.append(sum(unit is not None for _, unit in crew._doing.values()))
        return finished(crew)

    monkeypatch.setattr(ActorPool, "_finished", counted)
    cluster = RayCluster(study=study_slowly, workers=2)
    helpers.collect(helpers.study(), tmp_path / "r.zarr", **ASKED, cluster=cluster, progress=True)
    assert max(in_hand) == 2 * AHEAD == 4
    said = capsys.readouterr().err
    assert said.count("collect masks: 100%") == said.count("collect mask gradients: 100%") == 1


@needs_ray
@pytest.mark.slow
def test_a_run_is_gone_on_with(session, run, tmp_path):
    made = helpers.copied(run, tmp_path / "r.zarr")
    for name in ("outputs/c/2/1", "gradient_outputs/c/1/0/0"):
        (made.path / name).unlink()
    before = helpers.stamps(made.path)
    on_cluster(made.path)
    assert helpers.differing(helpers.files(made.path), helpers.files(run.path)) == []
    assert before["outputs/c/3/1"] == helpers.stamps(made.path)["outputs/c/3/1"]


def workers_alive():
    """Processes of actors that do units, by their titles."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if file.read_bytes().startswith(b"ray::RayWorker"):
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


@needs_ray
@pytest.mark.slow
def test_workers_killed_at_work(session, run, tmp_path, caplog):
    """Each of three kills hits a worker in the middle of something; its unit is done by another."""
    path, killed = tmp_path / "r.zarr", []

    def kill():
        while len(killed) < 3 and not over.is_set():
            stored = len(list(path.glob("outputs/c/*/*")))
            if stored > 4 * (len(killed) + 1) and (alive := workers_alive()):
                os.kill(alive[0], signal.SIGKILL)
                killed.append(alive[0])
            time.sleep(0.05)

    over = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        made = on_cluster(path, study_slowly)
    finally:
        over.set()
        killer.join()
    assert len(killed) == 3
    assert sum(getattr(record, "event", None) == WORKER_LOST for record in caplog.records) >= 3
    assert helpers.differing(helpers.files(path), helpers.files(run.path)) == []
    assert verify(made) == []


@needs_ray
@pytest.mark.slow
def test_more_workers_than_there_is_room_for(session, run, tmp_path):
    made = on_cluster(tmp_path / "r.zarr", workers=6)  # four find room, and the others wait in vain
    assert helpers.differing(helpers.files(made.path), helpers.files(run.path)) == []


MISTAKES = {
    "another study": (partial(study_with_inputs, 2), MismatchError, "examples: the run has"),
    "another version": (of_another_version, MismatchError, "versions: the run has .*now .*0.0.1"),
    "not finite": (not_finite, OutputError, "gives (inf|-inf|nan)"),
    "an error of their own": (raises, EngineError, "building the study: RuntimeError.*no such data here"),
    "no such pipeline": (partial(load_pipeline, "nowhere/pipeline.py"), PipelineError, "nowhere/pipeline.py"),
    "workers that die": (ends, EngineError, "workers were lost before they were ready"),
}


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(("build", "kind", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_errors_of_workers_are_raised(session, tmp_path, build, kind, message):
    with pytest.raises(CoarError, match=f"(?s){message}") as raised:
        on_cluster(tmp_path / "r.zarr", build)
    assert isinstance(raised.value, kind)


@needs_ray
@pytest.mark.slow
def test_no_room_for_any_worker(session, tmp_path, monkeypatch):
    monkeypatch.setattr("coar.collection.ray_engine.STARTING", 2.0)
    with pytest.raises(EngineError, match="no worker was ready after 2 s: each requests 64 processors and 0 GPUs"):
        on_cluster(tmp_path / "r.zarr", cpus_per_worker=64)


@needs_ray
def test_unreachable_cluster_is_refused_at_once(tmp_path):
    with pytest.raises(EngineError, match=r"nothing answers at 127\.0\.0\.1"):
        on_cluster(tmp_path / "r.zarr", address=f"127.0.0.1:{free_port()}")
    with pytest.raises(EngineError, match="no address of a Ray cluster"):
        on_cluster(tmp_path / "r.zarr", address="somewhere")


SOCKETS = """
import os
from pathlib import Path

import ray

from coar.cluster import RayCluster
from coar.collection.ray_engine import AHEAD, Crew
from coar.collection.ray_engine import connected


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def mine(pid):
    while pid > 1 and pid != os.getpid():
        pid = parent(pid)
    return pid == os.getpid()


def links(pid):
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            yield os.readlink(link)
        except OSError:
            continue


with connected(RayCluster(workers=1)):
    ray.get(ray.remote(lambda: None).remote())
    owned = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            owned |= set(links(folder.name)) if mine(int(folder.name)) else set()
        except OSError:
            continue
    for kind in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == "0A" and f"socket:[{parts[9]}]" in owned:
                print("listens", parts[1].partition(":")[0])
"""


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux to see who listens")
def test_a_cluster_of_ones_own_is_reached_from_this_machine_alone():
    said = subprocess.run([sys.executable, "-c", SOCKETS], capture_output=True, text=True, check=True, timeout=120)
    listening = {line.split()[1] for line in said.stdout.splitlines() if line.startswith("listens")}
    assert listening
    assert listening <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install '\.\[ray\]'"):
        on_cluster(tmp_path / "r.zarr")


def test_a_share_and_a_cluster_are_too_much(tmp_path):
    with pytest.raises(SettingsError, match="a cluster distributes the units itself"):
        helpers.collect(
            helpers.study(), tmp_path / "r", **ASKED, worker=(1, 2), cluster=RayCluster(study=helpers.study)
        )


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"gpus_per_worker": -1}, {"workerz": 2}])
def test_settings_are_checked(wrong):
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        RayCluster(study=helpers.study, **wrong)


def test_nothing_is_started_for_a_complete_run(run):
    assert coar.Run.open(run.path).missing_units() == []
    on_cluster(run.path, address="127.0.0.1:1")
