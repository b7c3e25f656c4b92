"""The correction of an informed fit without a decomposition: as near as rounding to the one from a decomposition."""

import logging
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import coar
from coar.errors import RegressionError
from coar.forward.memory_limit import bytes_of
from coar.regression import memory
from coar.regression.fitting import solver_of
from coar.regression.informed.iterative_correction import shrinkage
from coar.regression.memory import plan_fit, plan_of
from coar.store import fits
from coar.store.fits import BegunFit, rows_of_chunk
from coar.store.gradients import MaskGradients
from coar.store.records import FitRequest
from tests.synthetic import FRACTION, add_gradients, fit, iterative_fit, make, no_decomposition, pairwise

D, N = 200, 40
STEP = 10 ** (1 / 8)  # of the grid of penalties
GRADIENTS = 32
CPU, GIB = torch.device("cpu"), 2**30


def run_of(path, missed):
    """A run whose mask gradients miss some of the effects, which differ between components by orders of magnitude."""
    truth, rng = pairwise(N, D, pairs=0.03), np.random.default_rng(5)
    size = np.exp(1.2 * rng.standard_normal(D))
    truth = replace(truth, effect=truth.effect * size, unseen=missed * rng.standard_normal((N, D)) * size)
    return add_gradients(make(path, truth.outputs, components=D, masks=900, blocks=(64, N)), truth, GRADIENTS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("run") / "r.zarr", 0.5)


@pytest.fixture(scope="module")
def well_known(tmp_path_factory):
    """A run whose mask gradients leave little, unless they are taken for those of other examples."""
    return run_of(tmp_path_factory.mktemp("well-known") / "r.zarr", 0.03)


def plan(run, masks):
    """The plan of an informed fit without a decomposition."""
    with no_decomposition():
        return plan_of(run, "informed", masks, gradients=GRADIENTS, memory_limit=None, device=CPU)


def difference(one, other):
    """The largest difference of weights, as a share of the example's largest."""
    return (np.abs(one.weights() - other.weights()) / np.abs(other.weights()).max(1, keepdims=True)).max()


@pytest.mark.parametrize("fitted", [fit, iterative_fit])
@pytest.mark.parametrize("masks", [30, 300])  # both sides of the number of components
def test_masks_that_are_all_alike_are_refused(tmp_path, fitted, masks):
    truth = pairwise(N, D, pairs=0.03)
    made = make(tmp_path / "r.zarr", truth.outputs, components=D, masks=masks, blocks=(64, N), ablated_fraction=1e-9)
    alike = add_gradients(made, truth, GRADIENTS)
    with pytest.raises(RegressionError, match=f"the {masks} masks are all alike"):
        fitted(alike, method="informed")


@pytest.mark.parametrize("masks", [2, 60, 190, 210, 900])  # both sides of the number of components
@pytest.mark.parametrize("way", ["packed", "gram"])
def test_it_is_that_of_the_decomposition(run, monkeypatch, caplog, masks, way):
    caplog.set_level(logging.INFO, logger="coar")
    monkeypatch.setattr(memory, "_ways", lambda *_: [way])
    usual = fit(run, method="informed", masks=masks, name=f"usual-{masks}-{way}")
    assert "from one decomposition of the masks" in caplog.text
    found = iterative_fit(run, method="informed", masks=masks, name=f"small-{masks}-{way}")
    words = {"packed": "from masks of one bit per component", "gram": "masks' Gram matrix in float32"}
    assert words[way] in caplog.text
    assert abs(np.log(found.fit.mask_penalty / usual.fit.mask_penalty)) < 1.01 * np.log(STEP)
    assert difference(found, usual) < 1e-3
    assert difference(found, fit(run, method="informed", masks=0, name="prior")) > (0.5 if masks > 2 else -1)
    np.testing.assert_allclose(found.intercept, usual.intercept, rtol=1e-3, atol=0.02)
    errors = found.standard_errors() / usual.standard_errors()
    assert 0.85 < errors.min() <= errors.max() < 1.2
    assert 0.99 < np.median(errors) < 1.01


def test_penalty_and_weights_do_not_depend_on_how_many_examples_are_together(well_known, monkeypatch):
    whole = iterative_fit(well_known, method="informed", masks=150, name="whole")
    monkeypatch.setattr(fits, "CHUNK_BYTES", 7 * 4 * D)
    monkeypatch.setattr(memory, "MOST_TOGETHER", 7)
    planned = replace(plan(well_known, 150), choosing=3)
    assert (planned.together, planned.learning) == (7, N)
    monkeypatch.setattr("coar.regression.fitting.plan_of", lambda *_, **__: planned)
    parts = iterative_fit(well_known, method="informed", masks=150, name="parts")
    assert parts.fit.mask_penalty == pytest.approx(whole.fit.mask_penalty, rel=1e-9)
    assert difference(parts, whole) < 1e-4


def test_a_penalty_is_chosen_on_the_examples_that_were_learned_from(well_known, monkeypatch):
    few = replace(plan(well_known, 100), learning=16)
    monkeypatch.setattr("coar.regression.fitting.plan_of", lambda *_, **__: few)
    found = iterative_fit(well_known, method="informed", masks=100, name="few")
    monkeypatch.setattr("coar.regression.fitting.plan_of", lambda *_, **__: replace(few, way="decomposed"))
    usual = fit(well_known, method="informed", masks=100, name="few-usual")
    assert found.fit.mask_penalty == pytest.approx(usual.fit.mask_penalty, rel=1e-6)
    assert difference(found, usual) < 1e-3


def test_components_that_no_mask_ablates_keep_the_weights_of_the_gradients(tmp_path):
    truth = pairwise(N, 60)
    run = make(tmp_path / "r.zarr", truth.outputs, components=60, masks=40, ablated_fraction=0.03)
    add_gradients(run, truth, GRADIENTS)
    rows = run.plan.rows("train", 0.03)
    never = run.masks_at(rows).all(0)
    assert 0 < never.sum() < 60
    prior = fit(run, method="informed", masks=0, name="prior")
    found = iterative_fit(run, method="informed")
    np.testing.assert_array_equal(found.weights()[:, never], prior.weights()[:, never])
    np.testing.assert_allclose(found.standard_errors()[:, never], prior.standard_errors()[:, never], rtol=1e-6)


@pytest.mark.parametrize("masks", [150, 400, 3000])
def test_the_equivalent_of_the_diagonal_is_near_the_diagonal(masks):
    rng = np.random.default_rng(masks)
    column = np.maximum(np.exp(rng.standard_normal(300)), 1e-2)
    scaled = (rng.random((masks, 300)) < 0.1) * column
    scaled -= scaled.mean(0)
    gram = scaled.T @ scaled
    penalty = np.trace(gram) / 300
    exact = np.diag(np.linalg.solve(gram + penalty * np.eye(300), gram))
    found = shrinkage(torch.from_numpy(np.diag(gram).copy()), exact.sum()).numpy()
    assert found.sum() == pytest.approx(exact.sum(), rel=1e-9)
    assert np.abs(found - exact).max() < 0.06
    assert np.sqrt(np.mean((found - exact) ** 2)) < 0.1 * exact.std()


def planned(masks, components, limit, examples=64, device="cpu"):
    chunk = rows_of_chunk(examples, components)
    sizes = {"masks": masks, "components": components, "examples": examples, "chunk": chunk, "gradients": 64}
    return plan_fit("informed", **sizes, limit=limit, device=torch.device(device), sites=24)


@pytest.mark.parametrize(("components", "limit"), [(22_720, GIB), (82_944, 2 * GIB)])
def test_plans_keep_the_limit_whatever_the_number_of_masks(components, limit):
    plans = [planned(masks, components, limit, examples=5_000) for masks in (2_000, 20_000, 100_000, 1_000_000)]
    assert {plan.way for plan in plans} == {"packed"}
    assert all(plan.needed <= limit for plan in plans)
    assert [plan.held for plan in plans] == [True, True, False, False]
    assert all(plan.learning >= 16 and plan.choosing >= 1 for plan in plans)


def test_the_decomposition_is_taken_where_it_fits():
    assert planned(2_000, 2_000, 4 * GIB).way == "decomposed"
    assert planned(100_000, 9_216, 3 * GIB, examples=5_000).way == "gram"
    assert planned(2_000, 2_000, 4 * GIB, device="cuda").way != "decomposed"
    assert planned(0, 2_000, 4 * GIB, device="cuda").way == "decomposed"  # there is nothing to decompose


@pytest.mark.parametrize("masks", [0, 40, 900])
def test_a_limit_that_is_too_small_names_one_that_is_large_enough(run, masks):
    with pytest.raises(RegressionError, match=r"informed on 200 components and \d+ masks takes at least") as caught:
        fit(run, method="informed", masks=masks, name="limits", memory_limit="40MB")
    enough = str(caught.value).split("memory_limit='")[1].split("'")[0]
    assert fit(run, method="informed", masks=masks, name="limits", memory_limit=enough).fit.masks == masks


@pytest.mark.parametrize(("masks", "components"), [(2_000, 22_720), (100_000, 22_720), (3_000, 82_944)])
def test_the_named_limit_is_enough_at_published_sizes(masks, components):
    with no_decomposition():
        with pytest.raises(RegressionError) as caught:
            planned(masks, components, 50 * 2**20)
        enough = bytes_of(str(caught.value).split("memory_limit='")[1].split("'")[0])
        quarter = int(memory.HELD_SHARE * enough * 8 / components)  # may stay in memory, but leave too little of it
        for more in (1, 1.3, 2, 4):
            limit = int(enough * more)
            assert all(planned(many, components, limit).needed <= limit for many in (masks, quarter))


def test_what_is_sent_to_workers_holds_no_masks(run):
    rows = run.plan.rows("train", FRACTION)
    solver = solver_of(run, rows, len(MaskGradients(run).rounds), plan=plan(run, 900))
    sent = len(pickle.dumps(solver.correction))
    assert sent < 10 * 8 * D
    assert sent < 900 * D / 8


def test_an_interrupted_fit_goes_on(run, monkeypatch):
    monkeypatch.setattr(fits, "CHUNK_BYTES", 7 * 4 * D)
    monkeypatch.setattr(memory, "MOST_TOGETHER", 7)
    whole = iterative_fit(run, method="informed", masks=150, name="cut")
    values, errors = whole.weights(), whole.standard_errors()
    request = FitRequest(method="informed", masks=150, ablated_fraction=FRACTION, gradients=GRADIENTS)
    begun = BegunFit.of(run, "cut", ("weight", "intercept", "standard_error"), request, plan(run, 150).key)
    run.group["attributions/cut"].attrs["coar"] = {"state": "fitting", "begun": begun.key}
    folder = run.path / "attributions" / "cut"
    (folder / "weight/c/2/0").unlink()
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("c/*") if file.is_file()}
    again = iterative_fit(run, method="informed", masks=150, name="cut")
    np.testing.assert_array_equal(again.weights(), values)
    np.testing.assert_array_equal(again.standard_errors(), errors)
    made = {str(file.relative_to(folder)) for file, time in times.items() if file.stat().st_mtime_ns != time}
    assert {name.split("/")[2] for name in made} == {"2"}


KILLED = """
import sys, coar
from coar.regression import memory
from coar.store import fits
from tests.synthetic import iterative_fit
fits.CHUNK_BYTES, memory.MOST_TOGETHER = 4 * 200, 1  # one example in a block
iterative_fit(coar.Run.open(sys.argv[1]), method="informed", name="killed")
"""


@pytest.mark.slow
def test_a_fit_that_is_killed_goes_on(run, monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(run.path)])
    folder = run.path / "attributions" / "killed"
    while child.poll() is None and not (folder / "weight/c/3/0").exists():
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("weight/c/[012]/0")}
    assert len(kept) == 3
    assert "killed" not in coar.Run.open(run.path).group["attributions"].attrs
    monkeypatch.setattr(fits, "CHUNK_BYTES", 4 * D)
    monkeypatch.setattr(memory, "MOST_TOGETHER", 1)
    whole = iterative_fit(run, method="informed", name="whole-for-killed")
    found = iterative_fit(run, method="informed", name="killed")
    np.testing.assert_array_equal(found.weights(), whole.weights())
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in kept.items())
