"""Many processes on one run, each with its share of the units, and how far they are."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import coar
import coar.store.copying
from coar.cli.common import app
from coar.cli.watching import RunStatus, watched, write_metrics
from coar.errors import MismatchError, RunError, SettingsError
from coar.progress import WORKER_LOST
from coar.store.gradients import MaskGradients
from coar.store.integrity import verify
from coar.store.plan import dealt
from tests import buckets
from tests.faults import helpers
from tests.faults.shares import ASKED

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run as one process collects it; read only."""
    return helpers.collect(helpers.study(), tmp_path_factory.mktemp("run") / "whole.zarr", **ASKED)


def start(path, number, count):
    command = [sys.executable, "-m", "tests.faults.shares", str(number), str(count), str(path)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def finished(process):
    said = process.communicate(timeout=120)[1]
    return process.returncode, said


@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_every_unit_is_dealt_to_one_worker(count):
    units = list(range(24))
    hands = [dealt(units, (number, count)) for number in range(1, count + 1)]
    assert sorted(unit for hand in hands for unit in hand) == units
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


def test_workers_one_after_another(run, tmp_path):
    path = tmp_path / "r.zarr"
    for number in (3, 1, 2):
        made = helpers.collect(helpers.study(), path, **ASKED, worker=(number, 3))
    assert helpers.differing(helpers.files(path), helpers.files(run.path)) == []
    assert verify(made) == []


@pytest.mark.slow  # three processes import torch
def test_workers_at_once(run, tmp_path):
    path = tmp_path / "r.zarr"
    for code, said in map(finished, [start(path, number, 3) for number in (1, 2, 3)]):
        assert code == 0, said
    assert helpers.differing(helpers.files(path), helpers.files(run.path)) == []


@pytest.mark.slow
def test_workers_at_once_in_an_object_store(run, tmp_path, monkeypatch):
    """Nothing locks here: all of them create the run, and the first to write an object has written it."""
    with buckets.s3_server(tmp_path / "moto.log") as port:
        buckets.make_bucket(port, "bucket")
        buckets.use(monkeypatch, port)
        address = "s3://bucket/r.zarr"
        for code, said in map(finished, [start(address, number, 3) for number in (1, 2, 3)]):
            assert code == 0, said
        made = coar.Run.open(address)
        assert made.missing_units() == MaskGradients(made).missing_units() == []
        coar.store.copying.copy(made, tmp_path / "copy.zarr")
    assert helpers.differing(helpers.files(tmp_path / "copy.zarr"), helpers.files(run.path)) == []


def test_worker_extends_a_run(run, tmp_path):
    path = tmp_path / "r.zarr"
    helpers.collect(helpers.study(), path, **(ASKED | {"masks": 60}))
    for number in (2, 1):
        helpers.collect(helpers.study(), path, **ASKED, worker=(number, 2))
    made = coar.Run.open(path)
    made.require_complete()
    assert verify(made) == []
    assert helpers.differing(helpers.chunks(path), helpers.chunks(run.path)) == []


def test_worker_goes_on_where_it_was(run, tmp_path):
    path = tmp_path / "r.zarr"
    helpers.collect(helpers.study(), path, **ASKED, worker=(1, 2))
    before = helpers.stamps(path)
    helpers.collect(helpers.study(), path, **ASKED, worker=(1, 2))
    assert helpers.stamps(path) == before


def test_one_alone_is_refused_beside_workers_and_they_beside_it(run, tmp_path):
    whole = helpers.copied(run, tmp_path / "r.zarr")
    (whole.path / "outputs/c/0/0").unlink()
    hold = (
        "import sys; from pathlib import Path; from coar.store import lock\n"
        "with lock.worker_lock(Path(sys.argv[1]), prepared=lambda: True):\n"
        "    sys.stdout.write('held\\n'); sys.stdout.flush(); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(whole.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as worker:
        assert worker.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is writing"):
            helpers.collect(helpers.study(), whole.path, **ASKED)
        helpers.collect(helpers.study(), whole.path, **ASKED, worker=(1, 1_000))  # beside the other worker
        worker.kill()
    assert helpers.differing(helpers.files(whole.path), helpers.files(run.path)) == []


def test_worker_that_would_wait_for_ever_is_an_error(run, tmp_path, monkeypatch):
    whole = helpers.copied(run, tmp_path / "r.zarr")
    monkeypatch.setattr("coar.store.lock.PATIENCE", 0.5)
    with whole.lock(), pytest.raises(RunError, match="another process is writing"):
        helpers.collect(helpers.study(), whole.path, **ASKED, worker=(1, 2))


def test_worker_of_another_study_is_refused(run, tmp_path):
    whole = helpers.copied(run, tmp_path / "r.zarr")
    other = helpers.study(examples=helpers.examples(inputs=helpers.inputs(2)))
    with pytest.raises(MismatchError, match="examples: the run has"):
        helpers.collect(other, whole.path, **ASKED, worker=(1, 2))


@pytest.mark.parametrize("worker", [(0, 4), (5, 4), (1, 0)])
def test_workers_are_counted_from_one(tmp_path, worker):
    with pytest.raises(SettingsError, match="workers are counted from 1"):
        helpers.collect(helpers.study(), tmp_path / "r.zarr", **ASKED, worker=worker)


def test_watching_follows_a_run_to_its_end(run, tmp_path):
    part = helpers.copied(run, tmp_path / "r.zarr")
    gone = {name: (part.path / name).read_bytes() for name in ("outputs/c/0/0", "outputs/c/1/1")}
    for name in gone:
        (part.path / name).unlink()
    seen = []
    for glance in watched(part.path, every=0.01):
        seen.append((glance.done, glance.units))
        if gone:
            name, content = gone.popitem()
            (part.path / name).write_bytes(content)
    total = 24 + len(MaskGradients(run).units())
    assert seen == [(total - 2, total), (total - 1, total), (total, total)]
    assert [glance.done for glance in watched(part.path, every=None)] == [total]


def test_what_watching_says(tmp_path):
    assert str(RunStatus(3, 10, None)) == "3 of 10 units"
    assert RunStatus(4, 10, 0.5).seconds_left == 12
    assert re.fullmatch(
        r"4 of 10 units, 30\.0 a minute, done about \d\d \w+ \d\d:\d\d:\d\d", str(RunStatus(4, 10, 0.5))
    )
    write_metrics(RunStatus(4, 10, 0.5), tmp_path / "m" / "coar.prom")
    lines = [line for line in (tmp_path / "m" / "coar.prom").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["coar_units_stored 4", "coar_units_planned 10", "coar_units_per_second 0.5"]


def test_what_is_known_of_held_out_masks_is_said(tmp_path):
    made = helpers.collect(helpers.study(), tmp_path / "r.zarr", **ASKED, validation_masks=40)
    assert [glance.correlation for glance in watched(made.path, every=None)] == [None]
    kept = coar.fit(made, method="ridge", progress=False).fit.validation
    (glance,) = watched(made.path, every=None)
    assert glance.correlation == kept
    assert f"held-out correlation {kept:.3f}" in str(glance)
    write_metrics(glance, tmp_path / "coar.prom")
    assert f"coar_held_out_correlation {kept:.6g}" in (tmp_path / "coar.prom").read_text()


def test_log_has_a_line_of_json_per_unit(digits, tmp_path):
    log = tmp_path / "logs" / "collect.jsonl"
    words = ["collect", ROOT / "pipelines/digits.py", "--run", tmp_path / "r.zarr", "--masks", 130, "--test-masks", 0]
    done = CliRunner().invoke(
        app, [*map(str, words), "--ablation", "zero", "--batch-size", "512", "--log-file", str(log)]
    )
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    stored = [line for line in lines if "unit" in line]
    assert [line["unit"] for line in stored] == [[0, 0], [1, 0], [2, 0]]
    assert [(line["done"], line["units"]) for line in stored] == [(1, 3), (2, 3), (3, 3)]
    assert {"time", "level", "from", "message"} <= lines[0].keys()
    assert "stored unit" not in done.output


def test_commands(run, tmp_path):
    def call(*words):
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == 0, done.output
        return done.output

    assert "every chunk of the source is present" in call("copy", run.path, tmp_path / "c.zarr")
    parts = [tmp_path / f"{number}.zarr" for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        helpers.collect(helpers.study(), part, **ASKED, worker=(number, 2))
    assert "120 masks, 0 of 24 units left" in call("merge", *parts, "--into", tmp_path / "m.zarr")
    said = call("info", tmp_path / "m.zarr", "--watch", 1, "--metrics-file", tmp_path / "coar.prom")
    assert "36 of 36 units" in said
    assert "coar_units_stored 36" in (tmp_path / "coar.prom").read_text()
    assert "lost" not in said + (tmp_path / "coar.prom").read_text()


def test_lost_workers_are_counted_in_the_log(run, tmp_path):
    log, metrics = tmp_path / "collect.jsonl", tmp_path / "coar.prom"
    lines = [{"event": WORKER_LOST, "unit": [0, 1]}, {"unit": [0, 1], "done": 1}, {"event": WORKER_LOST, "unit": None}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "worker lo')  # still being written
    words = ["info", run.path, "--watch", 1, "--metrics-file", metrics, "--log-file", log]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert "2 workers lost" in done.output
    assert "coar_workers_lost 2\n" in metrics.read_text()
    for content in ("no log\n", "[]\n"):
        log.write_text(content)
        refused = CliRunner().invoke(app, list(map(str, words)))
        assert refused.exit_code == 1
        assert "cannot be read as a log of events" in refused.output


SCRIPTS = sorted((ROOT / "deploy").glob("*.sh")) + sorted((ROOT / "deploy").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_of_valid_syntax(script):
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "set -eu" in script.read_text()


def test_the_manifest_is_what_kuberay_takes():
    """Names and places of fields as in KubeRay's reference of `ray.io/v1` RayJob."""
    (job,) = [part for part in yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text()) if part]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for pod in pods for container in pod["template"]["spec"]["containers"]}
    assert len(images) == 1  # versions of Python, Ray and coar must agree
    assert "coar collect" in job["spec"]["entrypoint"]
