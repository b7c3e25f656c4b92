"""Runs in an object store: the same as on a disk, whatever the network does."""

import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import obstore
import pytest
from obstore.store import from_url
from typer.testing import CliRunner

import coar
from coar.cli.common import app
from coar.errors import MismatchError, RunError, SettingsError, StorageError
from coar.store import lock, places
from coar.store.copying import copy
from coar.store.gradients import MaskGradients
from coar.store.integrity import repair, verify
from coar.store.places import Address, locate
from tests import buckets
from tests.faults import helpers

ROOT = Path(__file__).parents[1]
ASKED = {"masks": 100, "test_masks": 20, "gradients": 8}


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with buckets.s3_server(tmp_path_factory.mktemp("log") / "moto.log") as found:
        buckets.make_bucket(found, "bucket")
        yield found


@pytest.fixture
def bucket(port, monkeypatch, request):
    """An address below which nothing is, in a bucket that the environment gives access to."""
    buckets.use(monkeypatch, port)
    monkeypatch.setattr(places, "PATIENCE", timedelta(seconds=10))
    return f"s3://bucket/{request.node.name}"


@pytest.fixture
def proxy(port, bucket, monkeypatch):
    made = buckets.Proxy(port)
    buckets.use(monkeypatch, made.port)
    yield made
    made.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run on a disk, read only."""
    return helpers.collect(helpers.study(), tmp_path_factory.mktemp("run") / "whole.zarr", **ASKED)


def objects(address):
    """Return the content of every object below an address, by nothing but obstore."""
    store = from_url(address, client_options={"allow_http": True})
    keys = [item["path"] for batch in obstore.list(store) for item in batch]
    return {key: bytes(obstore.get(store, key).bytes()) for key in keys}


def drop(address, key):
    obstore.delete(from_url(address, client_options={"allow_http": True}), key)


def test_collected_run_is_the_one_on_a_disk(run, bucket):
    made = helpers.collect(helpers.study(), f"{bucket}/r.zarr", **ASKED)
    assert (str(made.path), made.path.name) == (f"{bucket}/r.zarr", "r.zarr")
    assert helpers.differing(objects(f"{bucket}/r.zarr"), helpers.files(run.path)) == []
    assert verify(made) == []


def test_every_step_works_on_an_address(run, bucket, tmp_path):
    address = f"{bucket}/r.zarr"
    local = helpers.copied(run, tmp_path / "l.zarr")
    helpers.collect(helpers.study(), address, **(ASKED | {"masks": 40}))
    made = helpers.collect(helpers.study(), address, **ASKED)  # extended
    expected = coar.fit(local, progress=False)
    coar.fit(made, progress=False)
    np.testing.assert_allclose(coar.load(address).weights(), expected.weights(), atol=1e-5)
    assert coar.evaluate(made).table.shape == coar.evaluate(local).table.shape
    goal = coar.EditGoal(targets="label == 1", references="label != 1", direction="decrease")
    assert len(coar.edit(coar.load(address), goal, budget=2)) == 2


def test_commands_take_an_address(bucket, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy(run, f"{bucket}/r.zarr")
    for words in (["info"], ["verify"], ["fit"], ["evaluate"], ["report"]):
        done = CliRunner().invoke(app, [words[0], f"{bucket}/r.zarr"])
        assert done.exit_code == 0, done.output
    assert (tmp_path / "reports" / "r" / "index.html").is_file()


def test_gaps_and_damage_are_made_good(run, bucket):
    address = f"{bucket}/r.zarr"
    made = copy(run, address)
    drop(address, "outputs/c/2/1")
    store = from_url(address, client_options={"allow_http": True})
    obstore.put(store, "outputs/c/3/1", obstore.get(store, "outputs/c/4/1").bytes())
    problems = verify(made)
    assert [(problem.chunk, problem.what) for problem in problems] == [
        ("outputs/c/2/1", "missing"),
        ("outputs/c/3/1", "from elsewhere"),
    ]
    assert repair(made, problems) == []
    helpers.collect(helpers.study(), address, **ASKED)
    assert helpers.differing(objects(address), helpers.files(run.path)) == []


def test_another_study_is_refused(run, bucket):
    copy(run, f"{bucket}/r.zarr")
    other = helpers.study(examples=helpers.examples(inputs=helpers.inputs(2)))
    before = objects(f"{bucket}/r.zarr")
    with pytest.raises(MismatchError, match=r"(?s)not the one that s3://.*examples: the run has"):
        helpers.collect(other, f"{bucket}/r.zarr", **ASKED)
    assert objects(f"{bucket}/r.zarr") == before


def test_creation_cut_short_is_finished_by_its_study_alone(run, bucket):
    address = f"{bucket}/r.zarr"
    copy(run, address)
    store = from_url(address, client_options={"allow_http": True})
    drop(address, "zarr.json")
    drop(address, "component/name/c/0")
    obstore.put(store, "creating.json", marker(run))
    with pytest.raises(RunError, match=r"creation of the run .* was interrupted"):
        coar.Run.open(address)
    other = helpers.study(examples=helpers.examples(inputs=helpers.inputs(2)))
    with pytest.raises(MismatchError, match="another study is being created"):
        helpers.collect(other, address, **ASKED)
    helpers.collect(helpers.study(), address, **ASKED)
    assert helpers.differing(objects(address), helpers.files(run.path)) == []


def marker(run):
    from coar.store.sealed import digest

    return b'{"study": "%s"}' % digest(run.fingerprint).hex().encode()


def test_nothing_there_and_something_else_there(bucket):
    with pytest.raises(RunError, match="there is no run at s3://bucket/"):
        coar.Run.open(f"{bucket}/r.zarr")
    store = from_url(f"{bucket}/r.zarr", client_options={"allow_http": True})
    obstore.put(store, "notes.txt", b"hello")
    for attempt in (coar.Run.open, lambda path: helpers.collect(helpers.study(), path, **ASKED)):
        with pytest.raises(RunError, match="a folder of other things"):
            attempt(f"{bucket}/r.zarr")
    assert objects(f"{bucket}/r.zarr") == {"notes.txt": b"hello"}


@pytest.mark.parametrize("attempt", [coar.Run.open, lambda path: helpers.collect(helpers.study(), path, masks=4)])
def test_bucket_that_is_not_there(bucket, attempt):
    with pytest.raises(StorageError, match=r"s3://nowhere/r\.zarr: there is no such bucket"):
        attempt("s3://nowhere/r.zarr")


def test_unreachable_store_is_given_up(bucket, monkeypatch):
    buckets.use(monkeypatch, buckets.free_port())
    monkeypatch.setattr(places, "PATIENCE", timedelta(seconds=1))
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/r.zarr: .*check the address, the network"):
        coar.Run.open("s3://bucket/r.zarr")


def test_server_that_takes_no_writes(run, bucket, proxy):
    made = copy(run, f"{bucket}/r.zarr")
    drop(f"{bucket}/r.zarr", "outputs/c/2/1")
    before = objects(f"{bucket}/r.zarr")
    proxy.faults = lambda method, path, count: "deny" if method in ("PUT", "DELETE", "POST") else None
    assert [problem.chunk for problem in verify(made)] == ["outputs/c/2/1"]
    with pytest.raises(StorageError, match=r"permission was denied.*what was stored before is intact"):
        helpers.collect(helpers.study(), f"{bucket}/r.zarr", **ASKED)
    proxy.faults = lambda method, path, count: None
    assert objects(f"{bucket}/r.zarr") == before


@pytest.mark.parametrize("attempt", [coar.Run.open, lambda path: helpers.collect(helpers.study(), path, masks=140)])
def test_credentials_that_the_server_refuses(run, bucket, port, attempt):
    copy(run, f"{bucket}/r.zarr")
    before = objects(f"{bucket}/r.zarr")
    buckets.check_keys(port, after=0)
    try:
        with pytest.raises(StorageError, match="or the credentials are wrong") as raised:
            attempt(f"{bucket}/r.zarr")
    finally:
        buckets.check_keys(port, after=float("inf"))
    assert not any(secret in str(raised.value) for secret in buckets.KEYS.values())
    assert objects(f"{bucket}/r.zarr") == before


def test_errors_and_runs_hold_no_credentials(run, bucket, proxy):
    copy(run, f"{bucket}/r.zarr")
    everything = b"".join(objects(f"{bucket}/r.zarr").values())
    proxy.faults = lambda method, path, count: "deny"
    with pytest.raises(StorageError) as raised:
        coar.Run.open(f"{bucket}/r.zarr")
    for secret in (buckets.KEYS["AWS_ACCESS_KEY_ID"], buckets.KEYS["AWS_SECRET_ACCESS_KEY"]):
        assert secret.encode() not in everything
        assert secret not in str(raised.value)


def every_third(kind):
    return lambda method, path, count: kind if count % 3 == 0 else None


@pytest.mark.parametrize("kind", ["throttle", "cut"])
def test_bad_network_changes_nothing(run, bucket, proxy, kind):
    proxy.faults = every_third(kind)
    made = helpers.collect(helpers.study(), f"{bucket}/r.zarr", **ASKED)
    assert proxy.served[kind] > 20
    proxy.faults = lambda method, path, count: None
    assert helpers.differing(objects(f"{bucket}/r.zarr"), helpers.files(run.path)) == []
    assert MaskGradients(made).missing_units() == []


@pytest.mark.slow  # each stall waits for its time to be up
def test_server_that_stalls(run, bucket, proxy, monkeypatch):
    monkeypatch.setattr(places, "ANSWERING", timedelta(seconds=2))
    proxy.faults = lambda method, path, count: "stall" if count % 25 == 0 else None
    helpers.collect(helpers.study(), f"{bucket}/r.zarr", **ASKED)
    assert proxy.served["stall"] > 2
    proxy.faults = lambda method, path, count: None
    assert helpers.differing(objects(f"{bucket}/r.zarr"), helpers.files(run.path)) == []


def test_store_that_goes_away_in_mid_run(run, bucket, proxy, monkeypatch):
    """What was stored stays, and the same call goes on."""
    monkeypatch.setattr(places, "PATIENCE", timedelta(seconds=1))
    proxy.faults = lambda method, path, count: (
        "throttle" if "/outputs/c/4/" in path or proxy.served["throttle"] else None
    )
    with pytest.raises(StorageError, match="what was stored before is intact"):
        helpers.collect(helpers.study(), f"{bucket}/r.zarr", **ASKED)
    proxy.faults = lambda method, path, count: None
    stored = objects(f"{bucket}/r.zarr")
    assert sum(key.startswith("outputs/c/") for key in stored) == 4
    helpers.collect(helpers.study(), f"{bucket}/r.zarr", **ASKED)
    assert helpers.differing(objects(f"{bucket}/r.zarr"), helpers.files(run.path)) == []


@pytest.mark.slow  # each of two processes imports torch
@pytest.mark.parametrize("lengths", [(100, 100), (60, 100), (100, 60)])
@pytest.mark.parametrize("trial", range(2))
def test_two_drivers_at_once(run, bucket, lengths, trial):
    """Both do units; what one of them may have cut short, the next collect makes good."""
    address = f"{bucket}/r.zarr".replace("[", "-").replace("]", "")
    command = [sys.executable, "-m", "tests.faults.shares", "1", "1", address]
    started = [
        subprocess.Popen([*command, str(masks)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for masks in lengths
    ]
    for process in started:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
    made = helpers.collect(helpers.study(), address, **ASKED)
    assert helpers.differing(chunks_of(objects(address)), helpers.chunks(run.path)) == []
    assert verify(made) == []


def test_one_extension_at_a_time(bucket, tmp_path):
    """While one process adds test masks, another that wants training masks waits, and then keeps both."""
    address = f"{bucket}/r.zarr"
    helpers.collect(helpers.study(), address, masks=60, test_masks=20)
    entered, done = threading.Event(), []

    def add_test_masks():
        with lock.extension_lock(locate(address)):
            run = coar.Run.open(address)
            entered.set()
            time.sleep(1)
            run.extend(run.plan.extended({("test", run.sampler.ablated_fraction): 40}))
            done.append(time.monotonic())

    other = threading.Thread(target=add_test_masks)
    other.start()
    assert entered.wait(10)
    helpers.collect(helpers.study(), address, masks=100, test_masks=20)
    other.join()
    assert len(done) == 1
    made = helpers.collect(helpers.study(), address, masks=100, test_masks=40)
    expected = tmp_path / "r.zarr"
    for masks, test_masks in ((60, 20), (60, 40), (100, 40)):
        helpers.collect(helpers.study(), expected, masks=masks, test_masks=test_masks)
    assert helpers.differing(chunks_of(objects(address)), helpers.chunks(expected)) == []
    assert verify(made) == []


def test_extension_that_was_killed_holds_others_up_for_a_while(bucket, monkeypatch, caplog):
    address = f"{bucket}/r.zarr"
    helpers.collect(helpers.study(), address, masks=60)
    store = from_url(address, client_options={"allow_http": True})
    obstore.put(store, lock.EXTENDING, b"of a process that is gone")
    monkeypatch.setattr(lock, "STALE", 1.0)
    helpers.collect(helpers.study(), address, masks=60)  # extends nothing, and does not look
    assert "removing its lock" not in caplog.text
    made = helpers.collect(helpers.study(), address, masks=100)
    assert "removing its lock" in caplog.text
    assert lock.EXTENDING not in objects(address)
    assert verify(made) == []


def chunks_of(found):
    return {key: content for key, content in found.items() if "/c/" in key}


ADDRESSES = {
    "s3://bucket/a/r.zarr": Address("s3://bucket/a/r.zarr"),
    "s3://bucket/a/r.zarr/": Address("s3://bucket/a/r.zarr"),
    Path("s3://bucket/r.zarr"): Address("s3://bucket/r.zarr"),  # a path drops one of the slashes
    "GS://bucket/r.zarr": Address("gs://bucket/r.zarr"),
    "file:///tmp/r.zarr": Path("/tmp/r.zarr"),
    "runs/r.zarr": Path("runs/r.zarr"),
    "a:b/r.zarr": Path("a:b/r.zarr"),
}


@pytest.mark.parametrize(("given", "place"), ADDRESSES.items(), ids=map(str, ADDRESSES))
def test_places(given, place):
    assert locate(given) == place


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://key:secret@bucket/r.zarr", "credentials in the environment"),
        ("s3://bucket/r.zarr?X-Amz-Signature=abc", "credentials in the environment"),
        ("s3://bucket", "has no path"),
        ("nothing://bucket/r.zarr", "cannot be opened"),
    ],
)
def test_addresses_that_are_refused(address, message):
    with pytest.raises(SettingsError, match=message) as raised:
        coar.Run.open(address)
    assert "secret" not in str(raised.value)


def test_credentials_in_the_usual_file(port, bucket, run, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    file.write_text("[other]\naws_access_key_id = me\naws_secret_access_key = mine%%\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert verify(copy(run, f"{bucket}/r.zarr")) == []


def test_any_file_system_of_fsspec(run):
    made = copy(run, "memory://runs/r.zarr")
    assert verify(made) == []
    assert verify(coar.Run.open("memory://runs/r.zarr")) == []
