"""Fits whose work is shared, by a job array or on a Ray cluster: bit for bit those of one process."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import coar
import coar.store.copying
from coar.cli.common import app
from coar.cluster import RayCluster
from coar.errors import IncompleteRunError, MismatchError, RegressionError, SettingsError
from coar.regression import memory, sums
from coar.regression.fitting import METHODS, fit_share
from coar.store import fits
from coar.store.integrity import repair, verify
from tests import buckets, synthetic
from tests.synthetic import arrays, files, linear

D, N = 12, 20
MASKS = 200
ROOT = Path(__file__).parents[1]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A complete run of noisy linear outputs, read only."""
    path = tmp_path_factory.mktemp("run") / "r.zarr"
    return synthetic.make(path, linear(synthetic.weights(N, D), noise=0.3), masks=MASKS, test_masks=30)


@pytest.fixture(scope="module")
def with_gradients(tmp_path_factory):
    """A complete run with mask gradients too, read only."""
    truth = synthetic.pairwise(N, D)
    path = tmp_path_factory.mktemp("gradients") / "r.zarr"
    return synthetic.add_gradients(synthetic.make(path, truth.outputs, masks=MASKS), truth, 32)


@pytest.fixture
def fresh(run, tmp_path):
    return coar.Run.open(shutil.copytree(run.path, tmp_path / "r.zarr"))


@pytest.fixture
def small(monkeypatch):
    """Chunks of eight examples and panels of three, so that there is something to share."""
    monkeypatch.setattr(fits, "CHUNK_BYTES", 8 * 4 * D)
    monkeypatch.setattr(sums, "PANEL", 3)


def alike(one, other):
    for field, values in arrays(one).items():
        np.testing.assert_array_equal(values, arrays(other)[field], err_msg=field)


@pytest.fixture
def fresh_gradients(with_gradients, tmp_path):
    return coar.Run.open(shutil.copytree(with_gradients.path, tmp_path / "gradients.zarr"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 3, 40])
def test_shares_give_the_fit_of_one_process(small, fresh, fresh_gradients, method, count):
    fresh = fresh_gradients if method == "informed" else fresh
    whole = coar.fit(fresh, method=method, name="whole", progress=False)
    for number in range(count, 0, -1):
        fit_share(fresh, (number, count), method=method)
    merged = coar.fit(fresh, method=method, merge=True, progress=False)
    alike(merged, whole)
    assert merged.fit == whole.fit
    assert verify(coar.Run.open(fresh.path)) == []
    assert [name for name in files(fresh.path) if name.startswith("sums/")] == ["sums/zarr.json"]


def test_sums_over_masks_do_not_depend_on_their_order(fresh):
    rows = fresh.plan.rows("train", synthetic.FRACTION)
    whole = sums.Gram.of(fresh, rows)
    x = synthetic.design(fresh)[0]
    np.testing.assert_array_equal(whole.product.numpy(), x.T @ x)
    for count in (2, 5):
        parts = [sums.Gram.of(fresh, sums.dealt_rows(fresh, rows, (at, count))) for at in range(count)]
        total = parts[-1]
        for part in parts[:-1]:
            total = total + part
        assert (total.product.equal(whole.product), total.total.equal(whole.total)) == (True, True)
        assert total.count == whole.count == MASKS


def test_a_share_goes_on_where_it_was(small, fresh):
    fit_share(fresh, (1, 2))
    key = next(path for path in (fresh.path / "sums").iterdir() if path.is_dir())
    gone = key / "moments/c/0/0/0"
    stamps = {file: file.stat().st_mtime_ns for file in key.rglob("*") if file.is_file() and file != gone}
    gone.unlink()
    fit_share(fresh, (1, 2))
    assert gone.exists()
    assert stamps == {file: file.stat().st_mtime_ns for file in stamps}


def test_what_is_missing_is_named(small, fresh):
    with pytest.raises(IncompleteRunError, match="no worker has made sums"):
        coar.fit(fresh, merge=True, progress=False)
    for number in (1, 3):
        fit_share(fresh, (number, 4))
    with pytest.raises(IncompleteRunError, match=r"2 of 4 workers have not finished their share .*: 2/4, 4/4"):
        coar.fit(fresh, merge=True, progress=False)
    with pytest.raises(IncompleteRunError, match="no worker has made sums for a fit on 100 masks"):
        coar.fit(fresh, masks=100, merge=True, progress=False)


def test_a_damaged_sum_is_found_and_made_again(small, fresh):
    whole = coar.fit(fresh, name="whole", progress=False)
    for number in (1, 2):
        fit_share(fresh, (number, 2))
    file = next(iter((fresh.path / "sums").glob("*/gram/c/1/0/0")))
    content = bytearray(file.read_bytes())
    content[5] ^= 4
    file.write_bytes(bytes(content))
    problems = verify(coar.Run.open(fresh.path))
    assert [(problem.what, problem.mended_by) for problem in problems] == [("damaged", "coar fit --worker")]
    assert repair(fresh, problems) == []
    with pytest.raises(IncompleteRunError, match=r"1 of 2 workers have not finished their share .*: 2/2"):
        coar.fit(fresh, merge=True, progress=False)
    fit_share(fresh, (2, 2))
    alike(coar.fit(fresh, merge=True, progress=False), whole)


def test_another_number_of_workers_is_refused(small, fresh):
    fit_share(fresh, (1, 2))
    with pytest.raises(MismatchError, match="made by 2 workers and 3 were given"):
        fit_share(fresh, (1, 3))


MISTAKES = {
    "no such method": (lambda run: fit_share(run, (1, 2), method="lars"), SettingsError, "unknown method 'lars'"),
    "no mask gradients": (
        lambda run: fit_share(run, (1, 2), method="informed"),
        RegressionError,
        "needs mask gradients",
    ),
    "few masks": (lambda run: fit_share(run, (1, 2), masks=D), RegressionError, "needs more masks than components"),
    "counted from 0": (lambda run: fit_share(run, (0, 2)), SettingsError, "counted from 1/2"),
    "a path for a name": (lambda run: fit_share(run, (1, 2), name="../x"), SettingsError, "cannot name a fit"),
}


@pytest.mark.parametrize(("attempt", "kind", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(fresh, attempt, kind, message):
    before = files(fresh.path)
    with pytest.raises(kind, match=message):
        attempt(fresh)
    assert files(fresh.path) == before


def call(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def test_commands(small, fresh):
    whole = coar.fit(fresh, name="whole", progress=False)
    for number in (2, 1):
        done = call("fit", fresh.path, "--worker", f"{number}/2")
        assert (done.exit_code, f"sums of worker {number}/2 made" in done.output) == (0, True)
    done = call("fit", fresh.path, "--merge")
    assert done.exit_code == 0, done.output
    alike(coar.load(fresh.path, fit="ridge"), whole)
    for words in (["--worker", "1/2", "--merge"], ["--worker", "half"], ["--worker", "1/2", "--refit"]):
        assert call("fit", fresh.path, *words).exit_code == 1


@pytest.mark.slow  # three processes import torch
def test_workers_at_once(fresh):
    command = [sys.executable, "-m", "coar.cli", "fit", str(fresh.path), "--worker"]
    command[1:3] = ["-c", "from coar.cli import main; main()"]
    started = [subprocess.Popen([*command, f"{number}/3"], cwd=ROOT, stderr=subprocess.PIPE) for number in (1, 2, 3)]
    for process in started:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
    whole = coar.fit(fresh, name="whole", progress=False)
    alike(coar.fit(fresh, merge=True, progress=False), whole)


@pytest.mark.slow
def test_shares_in_an_object_store(run, tmp_path, monkeypatch):
    with buckets.s3_server(tmp_path / "moto.log") as port:
        buckets.make_bucket(port, "bucket")
        buckets.use(monkeypatch, port)
        there = coar.store.copying.copy(run, "s3://bucket/r.zarr")
        for number in (1, 2):
            fit_share(there, (number, 2))
        made = arrays(coar.fit(there, merge=True, progress=False))
        whole = arrays(coar.fit(there, name="whole", progress=False))
        assert verify(coar.Run.open("s3://bucket/r.zarr")) == []
    for field, values in whole.items():
        np.testing.assert_array_equal(values, made[field])


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_fits_on_a_cluster(fresh, fresh_gradients):
    """Every method, with many masks, few and none, more blocks than workers, and what cannot be fitted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fits, "CHUNK_BYTES", 2 * 4 * D)
        whole = coar.fit(fresh, name="whole", progress=False)
        cluster = RayCluster(workers=2)
        alike(coar.fit(fresh, cluster=cluster, progress=False), whole)
        few = coar.fit(fresh, masks=D - 2, name="few", progress=False)
        alike(coar.fit(fresh, masks=D - 2, name="few-shared", cluster=cluster, progress=False), few)
        sparse = coar.fit(fresh, method="lasso", name="sparse", progress=False)
        alike(coar.fit(fresh, method="lasso", name="sparse-shared", cluster=cluster, progress=False), sparse)
        for masks in (MASKS, D - 2, 0):
            alone = coar.fit(fresh_gradients, masks=masks, name="alone", progress=False)
            shared = coar.fit(fresh_gradients, masks=masks, cluster=cluster, progress=False)
            alike(shared, alone)
            assert shared.fit == alone.fit
            assert alone.fit.method == "informed"
        patch.setattr(memory, "MOST_TOGETHER", 2)  # blocks without a decomposition
        alone = synthetic.iterative_fit(fresh_gradients, name="small-alone")
        shared = synthetic.iterative_fit(fresh_gradients, name="small", cluster=cluster)
        alike(shared, alone)
        before = files(fresh.path)
        with pytest.raises(RegressionError, match="least squares needs at least 14 masks"):
            coar.fit(fresh, masks=D, method="ols", cluster=cluster, progress=False)
    assert files(fresh.path) == before
    assert verify(coar.Run.open(fresh.path)) == []
