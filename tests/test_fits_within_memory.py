"""Fits whose decomposition would exceed a memory limit: as near as rounding to those that one decomposition gives."""

import logging
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import coar
from coar.errors import RegressionError, SettingsError
from coar.regression import memory
from coar.regression.iterative import traces
from coar.regression.iterative.operators import PackedGram
from coar.regression.memory import plan_fit
from coar.store.fits import BegunFit, rows_of_chunk
from coar.store.records import FitRequest
from tests.synthetic import FRACTION, design, fit, iterative_fit, linear, make, weights

D, N = 300, 12
FEW = 120  # masks, for which products with packed ones are less work than with the Gram matrix
STEP = 10 ** (1 / 8)  # of the grid of penalties
WIDE, MANY = 20_000, 420  # a fit of several chunks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    truth = weights(N, D) / np.sqrt(D)
    path = tmp_path_factory.mktemp("run") / "r.zarr"
    return make(path, linear(truth, 0.7, np.linspace(0.1, 0.7, N)), components=D, masks=900, blocks=(64, N))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A run of few masks and many components, whose fit has five chunks of examples; each test uses its own name."""
    path = tmp_path_factory.mktemp("wide") / "r.zarr"
    rng = np.random.default_rng(0)
    return make(
        path, lambda x: x[:, :50] @ rng.standard_normal((50, MANY)), components=WIDE, masks=40, blocks=(40, MANY)
    )


def pair(run, method, masks):
    usual = fit(run, method=method, masks=masks, name=f"{method}-{masks}")
    return usual, iterative_fit(run, method=method, masks=masks, name=f"{method}-{masks}-small")


@pytest.mark.parametrize("masks", [80, 280, 310, 900])
def test_ridge_is_that_of_the_decomposition(run, caplog, masks):
    caplog.set_level(logging.INFO, logger="coar")
    usual, iterative = pair(run, "ridge", masks)
    assert "from one decomposition of the masks on cpu" in caplog.text
    assert "iteratively, from" in caplog.text
    ratio = iterative.penalty / usual.penalty
    assert (np.abs(np.log(ratio)) < 1.01 * np.log(STEP)).all(), ratio
    same = np.abs(ratio - 1) < 0.01
    assert same.mean() > 0.7
    largest = np.abs(usual.weights()).max(1, keepdims=True)
    assert (np.abs(iterative.weights() - usual.weights()) / largest)[same].max() < 1e-3
    np.testing.assert_allclose(iterative.intercept[same], usual.intercept[same], atol=1e-3)
    errors = iterative.standard_errors()[same] / usual.standard_errors()[same]
    assert 0.6 < errors.min() <= errors.max() < 1.6
    assert 0.95 < np.median(errors) < 1.05


@pytest.mark.parametrize(("method", "masks"), [("lasso", 80), ("lasso", 900), ("ols", 500), ("ols", 900)])
def test_other_methods_are_those_of_the_gram_matrix(run, method, masks):
    usual, iterative = pair(run, method, masks)
    largest = np.abs(usual.weights()).max(1, keepdims=True)
    assert (np.abs(iterative.weights() - usual.weights()) / largest.clip(1e-9)).max() < 1e-3
    np.testing.assert_allclose(iterative.intercept, usual.intercept, atol=2e-3)
    np.testing.assert_allclose(iterative.penalty, usual.penalty, rtol=1e-3, atol=1e-9)


def lasso_with(run, monkeypatch, name, most):
    """Fit the lasso on packed masks with working sets of so many components; also return the number of products."""
    products, times = [], PackedGram.times

    def counted(operator, values):
        products.append(values.shape[1])
        return times(operator, values)

    with monkeypatch.context() as patch:
        patch.setattr(memory, "MOST_WORKING", most)
        patch.setattr(PackedGram, "times", counted)
        return iterative_fit(run, method="lasso", masks=FEW, name=name), len(products)


def test_the_lasso_over_working_sets_is_that_over_all_components(run, monkeypatch):
    usual = fit(run, method="lasso", masks=FEW, name="lasso-usual")
    largest = np.abs(usual.weights()).max(1, keepdims=True).clip(1e-9)
    counts = {}
    for most in (300, 20):
        found, counts[most] = lasso_with(run, monkeypatch, f"lasso-{most}", most)
        np.testing.assert_allclose(found.penalty, usual.penalty, rtol=1e-3)
        assert (np.abs(found.weights() - usual.weights()) / largest).max() < 1e-3
    assert counts[300] < counts[20]
    assert counts[300] < N * 150  # most of them at the penalties of the paths, and not at the steps of their problems


def test_the_lasso_leaves_out_no_component_that_has_a_weight(run, monkeypatch):
    """The duality gap over all components, in float64, at the penalties that the fit chose."""
    found, _ = lasso_with(run, monkeypatch, "lasso-gap", 300)
    x, y = (part[:FEW] for part in design(run))
    x, y = x - x.mean(0), y - y.mean(0)
    slopes = np.abs(x.T @ (y - x @ found.weights().astype(float).T)) / len(x)  # (components, examples)
    assert (slopes <= found.penalty * (1 + 1e-3) + 1e-9).all()


def test_a_penalty_below_which_none_is_resolved_is_said(run, caplog, monkeypatch):
    iterative_fit(run, method="ridge", masks=900, name="resolved")
    assert "the least that conjugate gradients resolve" not in caplog.text
    monkeypatch.setattr(traces, "RESOLVED", 1e-7)  # of what few steps leave
    monkeypatch.setattr(memory, "BASIS", memory.LEAST_BASIS)
    iterative_fit(run, method="ridge", masks=900, name="unresolved")
    assert "ridge: the penalty of" in caplog.text
    assert "the least that conjugate gradients resolve" in caplog.text


@pytest.mark.parametrize("masks", [250, 900])
def test_weights_solve_the_ridge_equations(run, masks):
    found = iterative_fit(run, method="ridge", masks=masks, name=f"equations-{masks}")
    x, y = (part[:masks] for part in design(run))
    x, y = x - x.mean(0), y - y.mean(0)
    for i in range(N):
        exact = np.linalg.solve(x.T @ x + found.penalty[i] * np.eye(D), x.T @ y[:, i])
        np.testing.assert_allclose(found.weights()[i], exact, atol=5e-4 * np.abs(exact).max())


def test_a_component_that_no_mask_ablates_has_no_weight(run, tmp_path):
    rare = make(tmp_path / "r.zarr", linear(weights(N, D), noise=5.0), components=D, masks=300, ablated_fraction=0.01)
    never = design(rare)[0].all(0)
    assert 0 < never.sum() < D
    for method in ("ridge", "lasso"):
        found = iterative_fit(rare, method=method)
        assert np.abs(found.weights()[:, never]).max() < 1e-6
    assert not fit(rare, method="ridge").standard_errors()[:, never].any()
    with pytest.raises(RegressionError, match=r"masks that vary \d+ components"):
        iterative_fit(rare, method="ols")


def test_least_squares_on_hardly_more_masks_than_components_is_refused(run):
    with pytest.raises(RegressionError, match=r"303 masks are so few .* collect 450 or more, or use ridge"):
        iterative_fit(run, method="ols", masks=303)


def test_masks_that_are_all_alike_are_refused(tmp_path):
    alike = make(tmp_path / "r.zarr", linear(weights(N, D)), components=D, masks=30, ablated_fraction=1e-9)
    for method in ("ridge", "lasso"):
        with pytest.raises(RegressionError, match="30 masks are all alike"):
            iterative_fit(alike, method=method)


@pytest.mark.parametrize("method", ["ridge", "lasso"])
def test_a_limit_too_small_for_one_block_names_one_that_is_large_enough(run, method):
    name = f"limits-{method}"
    before = fit(run, method=method, masks=200, name=name).weights()
    with pytest.raises(
        RegressionError, match=r"takes at least .* for one block .* limit is 1e\+03 KiB|977 KiB"
    ) as caught:
        fit(run, method=method, name=name, memory_limit="1MB")
    np.testing.assert_array_equal(coar.load(run.path, name).weights(), before)
    enough = str(caught.value).split("memory_limit='")[1].split("'")[0]
    assert fit(run, method=method, name=name, memory_limit=enough).fit.masks == 900
    with pytest.raises(SettingsError, match="is not a size"):
        fit(run, method=method, name="wrong", memory_limit="much")


def test_a_device_without_float64_is_refused(run):
    for name in ("mps", "mps:0"):
        with pytest.raises(SettingsError, match=r"'mps.*' has no float64, .* device='cpu'"):
            fit(run, method="ridge", name="nowhere", device=name)


def interrupted(run, name, *, missing):
    """Turn a finished fit into one that was cut after some chunks; return the times of its files."""
    request = FitRequest(method="ridge", masks=40, ablated_fraction=FRACTION)
    begun = BegunFit.of(run, name, ("weight", "intercept", "standard_error", "penalty"), request, "decomposed-0")
    run.group[f"attributions/{name}"].attrs["coar"] = {"state": "fitting", "begun": begun.key}
    folder = run.path / "attributions" / name
    for part in missing:
        (folder / part).unlink()
    return {file: file.stat().st_mtime_ns for file in folder.rglob("c/*") if file.is_file()}


def test_an_interrupted_fit_goes_on(wide):
    whole = fit(wide, method="ridge", name="cut")
    values, errors = whole.weights(), whole.standard_errors()
    times = interrupted(wide, "cut", missing=["weight/c/1/0", "penalty/c/3"])
    assert "cut" not in coar.Run.open(wide.path).group["attributions"].attrs
    again = fit(wide, method="ridge", name="cut")
    np.testing.assert_array_equal(again.weights(), values)
    np.testing.assert_array_equal(again.standard_errors(), errors)
    made = {str(f.relative_to(wide.path / "attributions" / "cut")) for f in times if f.stat().st_mtime_ns != times[f]}
    blocks = {name.split("/")[2] for name in made}
    assert blocks == {"1", "3"}


def test_an_interrupted_fit_of_other_data_starts_again(wide):
    fit(wide, method="ridge", name="other")
    times = interrupted(wide, "other", missing=["weight/c/1/0"])
    fit(wide, method="ridge", masks=30, name="other")
    assert all(file.stat().st_mtime_ns != time for file, time in times.items())


KILLED = "import sys, coar; coar.fit(coar.Run.open(sys.argv[1]), method='ridge', name='killed', progress=False)"


@pytest.mark.slow
def test_a_fit_that_is_killed_goes_on(wide):
    whole = fit(wide, method="ridge", name="whole").weights()
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(wide.path)])
    folder = wide.path / "attributions" / "killed"
    while child.poll() is None and not (folder / "weight/c/1/0").exists():
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("weight/c/0/0")}
    assert len(kept) == 1
    assert "killed" not in coar.Run.open(wide.path).group["attributions"].attrs
    np.testing.assert_array_equal(fit(wide, method="ridge", name="killed").weights(), whole)
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in kept.items())


GIB = 2**30


def planned(method, masks, components, limit, examples=64, **more):
    chunk = rows_of_chunk(examples, components)
    return plan_fit(
        method,
        masks=masks,
        components=components,
        examples=examples,
        chunk=chunk,
        limit=limit,
        device=torch.device("cpu"),
        **more,
    )


@pytest.mark.parametrize("method", ["ridge", "lasso", "ols"])
@pytest.mark.parametrize("components", [22_720, 82_944])
def test_plans_keep_the_limit_whatever_the_number_of_masks(method, components):
    needed = []
    for masks in (2_000, 20_000, 100_000, 1_000_000):
        plan = planned(method, masks, components, GIB, examples=5_000)
        assert plan.way == "packed"
        assert plan.together % rows_of_chunk(5_000, components) == 0
        assert plan.held == (masks * components / 8 <= GIB / 4)
        needed.append(plan.needed)
        assert plan.needed <= GIB
    assert max(needed) < 2 * min(needed)
    assert planned(method, 3_000, 2_000, 4 * GIB).way == "decomposed"


def test_the_gram_matrix_is_held_where_that_is_less_work():
    assert planned("lasso", 100_000, 9_216, 2 * GIB, examples=5_000).way == "gram"
    assert planned("lasso", 1_000, 9_216, 2 * GIB // 4, examples=16).way == "packed"


def test_an_informed_fit_learns_from_as_many_examples_as_fit():
    learning = [planned("informed", 0, 458_752, limit * GIB, gradients=64).learning for limit in (4, 6, 8, 32)]
    assert learning == sorted(learning)
    assert learning[0] >= 16
    assert learning[-1] == 64
    with pytest.raises(
        RegressionError, match=r"informed on 458,752 components .* give memory_limit='[\d.]+GiB' or more"
    ):
        planned("informed", 0, 458_752, GIB, gradients=64)


MEASURED = """
import sys
from pathlib import Path
import numpy as np
import torch
import coar
from coar.regression.fitting import fit
from coar.regression.memory import plan_of
from coar.store.gradients import MaskGradients
from tests.synthetic import make

def kilobytes(field):
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])

torch.set_num_threads(1)
path, components, examples, masks, limit = Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5]
run = make(
    path, lambda x: x[:, :examples], components=components, masks=max(masks, 2), blocks=(min(masks, 256) or 2, examples)
)
stored, rng = MaskGradients(run), np.random.default_rng(0)
stored.extend(64)
for unit in stored.missing_units():
    ends = rng.standard_normal((2, examples, components), dtype=np.float32)
    stored.write_unit(unit, *ends, rng.standard_normal((stored.rounds[unit.round], examples), dtype=np.float32))
del ends
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = kilobytes("VmRSS")
fit(run, method="informed", masks=masks, memory_limit=limit, device="cpu", progress=False)
plan = plan_of(run, "informed", masks, gradients=64, memory_limit=limit, device=torch.device("cpu"))
print(plan.needed / 1024, kilobytes("VmHWM") - before, plan.way)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("components", "examples", "masks", "limit", "way"),
    [
        (9_216, 128, 0, "4GiB", "decomposed"),
        (60_000, 16, 0, "4GiB", "decomposed"),
        (22_720, 24, 1_000, "800MB", "packed"),
    ],
)
def test_an_informed_fit_takes_what_its_plan_says(tmp_path, components, examples, masks, limit, way):
    sizes = map(str, (components, examples, masks))
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "r.zarr"), *sizes, limit]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    planned_bytes, taken = map(float, done.stdout.split()[:2])
    assert done.stdout.split()[2] == way
    assert 0.75 < planned_bytes / taken < 1.25


SHARED = """
import sys
from pathlib import Path
import torch
import coar
from coar.regression.fitting import fit
from coar.regression.memory import plan_of

def kilobytes(field):
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])

torch.set_num_threads(1)
run, method = coar.Run.open(sys.argv[1]), sys.argv[2]
plan = plan_of(run, method, len(run.plan), memory_limit="8GiB", device=torch.device("cpu"))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = kilobytes("VmRSS")
fit(run, method=method, memory_limit="8GiB", device="cpu", progress=False)
print(plan.needed / 1024, kilobytes("VmHWM") - before, plan.way)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("method", "masks", "components", "examples"),
    [
        ("ridge", 1_000, 9_216, 64),
        ("ridge", 6_000, 3_000, 16),
        ("ridge", 4_000, 2_304, 1_000),
        ("ridge", 300, 8_000, 260),
        ("ols", 3_456, 2_304, 4),
        ("lasso", 1_000, 2_304, 4),
        ("lasso", 5_000, 1_500, 64),
    ],
)
def test_a_fit_from_one_decomposition_takes_what_its_plan_says(tmp_path, method, masks, components, examples):
    made = make(
        tmp_path / "r.zarr",
        linear(weights(examples, components) / np.sqrt(components), noise=0.3),
        components=components,
        masks=masks,
        blocks=(256, examples),
    )
    command = [sys.executable, "-c", SHARED, str(made.path), method]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    planned_bytes, taken = map(float, done.stdout.split()[:2])
    assert done.stdout.split()[2] == "decomposed"
    assert 0.75 < planned_bytes / taken < 1.25
