"""Fits against scikit-learn and against textbook formulas written out with explicit matrices."""

import os
import shutil

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge

import coar
from coar.errors import IncompleteRunError, RegressionError, RunError, SettingsError
from coar.regression import sums
from coar.regression.ridge import decompose_gram, decompose_kernel, scores_gram, solve
from coar.regression.sums import Gram, Moments
from coar.store import fits
from coar.store.records import FitRecord
from tests.synthetic import FRACTION, arrays, design, files, fit, linear, make, weights

CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # outputs and results are float32
NOISE = np.linspace(0.01, 20, 20)  # from examples that are nearly exact to examples that are nearly noise
D = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """200 training masks of 12 components, read only for those who do not fit under a name of their own."""
    return make(tmp_path_factory.mktemp("run") / "a.zarr", linear(weights(), 0.7, NOISE), test_masks=30)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """9 training masks of 12 components: the dual form."""
    return make(tmp_path_factory.mktemp("run") / "b.zarr", linear(weights(), 0.7, NOISE), masks=9)


def grid(x):
    """Penalties that ridge chooses from, in units of the mean of the Gram matrix's positive eigenvalues."""
    centred = x - x.mean(0)
    return np.logspace(-4, 4, 65) * (centred**2).sum() / np.linalg.matrix_rank(centred)


def hat(x, penalty):
    """(components, masks) matrix from outputs to weights, and (masks, masks) from outputs to predictions."""
    centred = x - x.mean(0)
    to_weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(x.shape[1]), centred.T)
    return to_weights, 1 / len(x) + centred @ to_weights


def cross_validation_score(x, y, penalty):
    """Golub, Heath and Wahba's score of every column of y."""
    h = hat(x, penalty)[1]
    return len(x) * ((y - h @ y) ** 2).sum(0) / (len(x) - np.trace(h)) ** 2


def ridge_errors(x, y, penalty):
    """Standard errors of one example's ridge weights, from the explicit matrices."""
    to_weights, h = hat(x, penalty)
    variance = ((y - h @ y) ** 2).sum() / (len(x) - np.trace(h))
    return np.sqrt(variance * np.diag(to_weights @ to_weights.T))


def same(found, expected, **tolerance):
    for field, values in arrays(expected).items():
        np.testing.assert_allclose(arrays(found)[field], values, err_msg=field, **tolerance)


def test_ols_is_linear_regression(run):
    x, y = design(run)
    found, expected = fit(run, method="ols"), LinearRegression().fit(x, y)
    np.testing.assert_allclose(found.weights(), expected.coef_, **CLOSE)
    np.testing.assert_allclose(found.intercept, expected.intercept_, **CLOSE)
    assert not found.penalty.any()


def test_ols_standard_errors_are_the_textbook_ones(run):
    x, y = design(run)
    full = np.column_stack([np.ones(len(x)), x])
    inverse = np.linalg.inv(full.T @ full)
    residual = y - full @ (inverse @ full.T @ y)
    variance = (residual**2).sum(0) / (len(x) - D - 1)
    expected = np.sqrt(np.outer(variance, np.diag(inverse)[1:]))
    np.testing.assert_allclose(fit(run, method="ols").standard_errors(), expected, rtol=1e-3)


@pytest.mark.parametrize("which", ["run", "short"])
def test_ridge_is_ridge_at_the_penalty_it_states(which, request):
    run = request.getfixturevalue(which)
    found, (x, y) = fit(run), design(run)
    assert len(set(found.penalty.tolist())) >= 3
    for i, penalty in enumerate(found.penalty):
        expected = Ridge(alpha=float(penalty)).fit(x, y[:, i])
        np.testing.assert_allclose(found.weights()[i], expected.coef_, **CLOSE)
        np.testing.assert_allclose(found.intercept[i], expected.intercept_, **CLOSE)


@pytest.mark.parametrize("which", ["run", "short"])
def test_ridge_penalty_minimises_generalised_cross_validation(which, request):
    run = request.getfixturevalue(which)
    found, (x, y) = fit(run), design(run)
    scores = np.stack([cross_validation_score(x, y, penalty) for penalty in grid(x)])
    at = np.abs(np.log(grid(x))[:, None] - np.log(found.penalty)).argmin(0)
    np.testing.assert_allclose(found.penalty, grid(x)[at], rtol=1e-4)
    np.testing.assert_allclose(scores[at, np.arange(20)], scores.min(0), rtol=1e-4)


@pytest.mark.parametrize("which", ["run", "short"])
def test_ridge_standard_errors_are_the_explicit_formula(which, request):
    run = request.getfixturevalue(which)
    found, (x, y) = fit(run), design(run)
    expected = [ridge_errors(x, y[:, i], float(penalty)) for i, penalty in enumerate(found.penalty)]
    np.testing.assert_allclose(found.standard_errors(), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("masks", [3, 8, 12, 13, 14, 40])
def test_primal_and_dual_forms_agree(masks):
    rng = np.random.default_rng(masks)
    x = torch.tensor(rng.random((masks, D)) > FRACTION, dtype=torch.float32)
    y = torch.tensor(x.numpy() @ weights(6).T + rng.standard_normal((masks, 6)))
    mean, variation = y.mean(0), ((y - y.mean(0)) ** 2).sum(0)
    wide = x.double()
    gram = Gram(wide.T @ wide, wide.sum(0), masks)
    moments = Moments(wide.T @ y, y.sum(0), (y**2).sum(0), torch.zeros(6), masks)
    primal = decompose_gram(gram)
    dual, left = decompose_kernel(x)
    one = solve(primal, scores_gram(primal, gram.total, moments), mean, variation, method="ridge")
    other = solve(dual, left.T @ (y - mean), mean, variation, method="ridge")
    for field in ("weight", "intercept", "standard_error", "penalty"):
        np.testing.assert_allclose(getattr(one, field), getattr(other, field), rtol=1e-6, atol=1e-9, err_msg=field)


@pytest.mark.parametrize(
    "settings", [{"method": "ols"}, {"method": "ridge"}, {"method": "ridge", "masks": 10}], ids=str
)
def test_blocks_and_groups_of_any_size_give_the_same(run, tmp_path, monkeypatch, settings):
    whole = fit(run, **settings, name="whole")
    shutil.copytree(run.path, tmp_path / "copy.zarr")
    monkeypatch.setattr(fits, "CHUNK_BYTES", 3 * 4 * D)  # chunks of three examples
    monkeypatch.setattr(sums, "MOMENT_BYTES", 7 * 8 * D)  # sums of six examples at a time
    monkeypatch.setattr(sums, "BATCH", 1)  # one block of masks at a time
    cut = fit(coar.Run.open(tmp_path / "copy.zarr"), **settings, name="cut")
    assert len(list((tmp_path / "copy.zarr/attributions/cut/weight/c").iterdir())) == 7
    same(cut, whole, rtol=1e-4, atol=1e-5)


def test_constant_examples_get_zeros(tmp_path):
    def outputs(masks):
        y = linear(weights(), 0.7, 1.0)(masks)
        y[:, [0, 4, 19]] = [0.1, 0, -123.456]
        return y

    run = make(tmp_path / "r.zarr", outputs)
    for found in (fit(run), fit(run, method="ols"), fit(run, masks=8, name="dual")):
        values = arrays(found)
        assert all(np.isfinite(array).all() for array in values.values())
        assert np.abs(values["weight"][[0, 4, 19]]).max() < 1e-5
        assert values["standard_error"][[0, 4, 19]].max() < 1e-5
        np.testing.assert_allclose(values["intercept"][[0, 4, 19]], [0.1, 0, -123.456], rtol=1e-5, atol=1e-6)
        assert np.abs(values["weight"][[1, 5]]).max() > 0.1


def test_masks_that_are_all_alike_are_refused(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights(), noise=0.5), masks=30, ablated_fraction=1e-6)
    assert design(run)[0].all()
    for masks in (8, 30):
        with pytest.raises(RegressionError):
            fit(run, masks=masks)


def test_component_that_is_never_ablated_gets_zero(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights(), noise=0.5), masks=30, ablated_fraction=0.03)
    x, y = design(run)
    never = x.all(0)
    assert 0 < never.sum() < D
    found = fit(run)
    assert np.abs(found.weights()[:, never]).max() < 1e-6
    expected = Ridge(alpha=float(found.penalty[3])).fit(x, y[:, 3])
    np.testing.assert_allclose(found.weights()[3], expected.coef_, **CLOSE)
    with pytest.raises(RegressionError, match="rank"):
        fit(run, method="ols")


def test_95_percent_of_true_weights_lie_within_1_96_standard_errors(tmp_path):
    truth = weights(200, 20)
    run = make(tmp_path / "r.zarr", linear(truth, 0.5, 1.5), components=20, masks=300)
    found = fit(run, method="ols")
    inside = np.abs(found.weights() - truth) < 1.96 * found.standard_errors()
    assert abs(inside.mean() - 0.95) < 0.012  # 4,000 weights: three and a half standard deviations of their share


def interleaved(path, outputs):
    """Training masks in three segments, with test and validation masks between them."""
    train, test = ("train", FRACTION), ("test", FRACTION)
    steps = [
        {test: 10, train: 37},
        {train: 60, ("validation", FRACTION): 21},
        {test: 33, ("test", 0.5): 9, train: 101},
        {test: 50},
    ]
    return make(path, outputs, steps=steps)


@pytest.mark.parametrize(
    "settings", [{"method": "ols"}, {"method": "ridge"}, {"method": "ridge", "masks": 11}], ids=str
)
def test_only_training_masks_are_read(tmp_path, settings):
    clean = interleaved(tmp_path / "clean.zarr", linear(weights(), 0.7, NOISE))
    spoilt = interleaved(tmp_path / "spoilt.zarr", linear(weights(), 0.7, NOISE))
    outputs = spoilt.array("outputs")[:]
    others = np.flatnonzero(spoilt.array("split")[:] != "train")
    outputs[others] = 1e30 * (-1.0) ** others[:, None]
    spoilt.array("outputs")[:] = outputs
    x, y = design(spoilt)
    assert x.shape == (101, D)
    assert np.abs(y).max() < 1e3
    found = fit(spoilt, **settings)
    same(found, fit(clean, **settings), rtol=0, atol=0)
    rows = settings.get("masks", 101)
    expected = Ridge(alpha=float(found.penalty[2])).fit(x[:rows], y[:rows, 2]).coef_
    np.testing.assert_allclose(found.weights()[2], expected, **CLOSE)


@pytest.mark.parametrize("masks", [2, 9, 60])
def test_masks_takes_the_first_training_masks(run, masks):
    found = fit(run, masks=masks, name=f"first-{masks}")
    x, y = (part[:masks] for part in design(run))
    assert found.fit.masks == masks
    for i in (0, 10, 19):
        expected = Ridge(alpha=float(found.penalty[i])).fit(x, y[:, i])
        np.testing.assert_allclose(found.weights()[i], expected.coef_, **CLOSE)


MISTAKES = {
    "unknown method": ({"method": "elastic"}, SettingsError, "elastic.*ridge"),
    "one mask": ({"masks": 1}, RegressionError, "1 masks.*2 to 200"),
    "no mask": ({"masks": 0}, RegressionError, "2 to 200"),
    "more masks than there are": ({"masks": 201}, RegressionError, "201.*200"),
    "too few for least squares": ({"method": "ols", "masks": 13}, RegressionError, "at least 14 masks"),
    "dual least squares": ({"method": "ols", "masks": 12}, RegressionError, "at least 14 masks"),
    **{f"named {name!r}": ({"name": name}, SettingsError, "cannot name a fit") for name in ("a/b", "a b", "..", "1st")},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(run, mistake):
    settings, kind, words = MISTAKES[mistake]
    with pytest.raises(kind, match=words):
        fit(run, **settings)


def test_a_refused_fit_leaves_the_stored_one_as_it_is(run):
    fit(run, method="ols", name="kept")
    before = files(run.path / "attributions/kept")
    with pytest.raises(RegressionError):
        fit(run, method="ols", name="kept", masks=13)
    assert files(run.path / "attributions/kept") == before
    assert coar.load(run.path, "kept").fit.masks == 200


def test_a_refused_fit_leaves_nothing_behind(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights()), masks=10)
    with pytest.raises(RegressionError):
        fit(run, method="ols")
    assert not coar.verify(run)


def test_run_without_training_masks_is_refused(tmp_path):
    with pytest.raises(RegressionError, match="at least two training masks"):
        fit(make(tmp_path / "r.zarr", linear(weights()), masks=0, test_masks=5))


def test_incomplete_run_is_refused(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights()))
    (run.path / "outputs/c/3/1").unlink()
    with pytest.raises(IncompleteRunError, match="1 of 39 units"):
        fit(run)


def aged(run, name):
    """Date every file of a fit back to 1970; return how to list those that were written since."""
    folder = run.path / "attributions" / name
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))
    return lambda: [path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_mtime > 0]


def test_stored_fit_is_returned_and_refit_only_when_asked(run):
    first = fit(run, name="stored")
    written = aged(run, "stored")
    same(fit(run, name="stored"), first, rtol=0, atol=0)
    assert not written()
    same(fit(run, name="stored", refit=True), first, rtol=0, atol=0)
    assert len(written()) >= 8  # four arrays, each a description and a chunk


@pytest.mark.parametrize("change", [{"masks": 50}, {"method": "ols"}], ids=str)
def test_stored_fit_of_other_settings_is_replaced(run, change):
    fit(run, name="changed", refit=True)
    written = aged(run, "changed")
    found = fit(run, name="changed", **change)
    assert written()
    assert {key: getattr(found.fit, key) for key in change} == change


def test_extended_run_is_fitted_again(tmp_path):
    outputs = linear(weights(), noise=0.5)
    fit(make(tmp_path / "r.zarr", outputs, masks=50))
    longer = make(tmp_path / "long.zarr", outputs, steps=[{("train", FRACTION): 50}, {("train", FRACTION): 80}])
    shutil.copytree(tmp_path / "r.zarr/attributions", longer.path / "attributions")
    assert fit(longer).fit.masks == 80


def test_fit_cut_short_counts_for_nothing_until_it_is_made_again(run, tmp_path):
    whole = fit(run, name="whole-again")
    shutil.copytree(run.path, tmp_path / "copy.zarr")
    copy = coar.Run.open(tmp_path / "copy.zarr")
    shutil.rmtree(copy.path / "attributions/whole-again")
    writer = fits.FitWriter(copy, "whole-again", fits.FIELDS, FitRecord(method="ridge", masks=0))
    writer.write(slice(0, 20), weight=np.ones((20, D)))
    with pytest.raises(RunError, match="whole-again"):
        coar.load(copy.path, "whole-again")
    assert "whole-again" not in fits.fit_names(copy)
    same(fit(copy, name="whole-again"), whole, rtol=0, atol=0)
    same(coar.load(copy.path, "whole-again"), whole, rtol=0, atol=0)
