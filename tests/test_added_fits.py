"""Attributions of other methods that are added to a run: stored, scored, and refused when they do not fit."""

import numpy as np
import pytest
import torch

import coar
from coar.errors import IncompleteRunError, SettingsError
from tests.synthetic import FRACTION, design, fit, linear, make, weights

D = 12
INTERCEPT = 0.7


def truth():
    """The weights that made the outputs, one row per example."""
    return np.asarray(weights(), dtype=np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    steps = [{("train", FRACTION): 60, ("test", FRACTION): 40}]
    return make(tmp_path_factory.mktemp("run") / "r.zarr", linear(weights(), INTERCEPT), steps=steps)


def test_the_true_weights_predict_every_output(run):
    x, y = design(run, "test", FRACTION)
    added = coar.add_fit(run, "truth", truth())
    np.testing.assert_allclose(added.predict(x.astype(bool)), y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(added.intercept, INTERCEPT, atol=1e-4)
    row = coar.evaluate(run, fits=["truth"]).table.iloc[0]
    assert row.pearson == pytest.approx(1, abs=1e-5)
    assert row.slope == pytest.approx(1, abs=1e-4)
    assert (added.fit.method, row.masks, row.gradients) == ("added", 0, 0)


def test_intercepts_may_be_given_and_tensors_too(run):
    given = torch.linspace(-1, 1, len(truth()))
    added = coar.add_fit(run, "tensors", torch.from_numpy(truth()), given)
    np.testing.assert_array_equal(added.intercept, given.numpy())
    np.testing.assert_array_equal(added.weights(), truth())


def test_an_added_fit_is_replaced_by_its_own_kind_alone_and_never_loaded_unasked(run):
    fit(run)
    coar.add_fit(run, "mine", truth())
    coar.add_fit(run, "mine", 2 * truth())
    np.testing.assert_array_equal(coar.load(run.path, "mine").weights(), 2 * truth())
    assert coar.load(run.path).fit.method == "ridge"
    before = coar.load(run.path, "ridge").weights()
    with pytest.raises(SettingsError, match="has a fit 'ridge' by ridge; choose another name"):
        coar.add_fit(run, "ridge", truth())
    np.testing.assert_array_equal(coar.load(run.path, "ridge").weights(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.T, r"shape \(12, 20\); \(20, 12\) \(examples, components\) was expected; it looks transposed"),
        (lambda w: w[:-1], r"shape \(19, 12\); \(20, 12\) \(examples, components\) was expected$"),
        (lambda w: np.where(w == w[3, 5], np.nan, w), r"1 numbers that are not finite, such as \(3, 5\)"),
        (lambda w: [["a"] * D], "not an array of numbers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_and_nothing_is_stored(run, change, message):
    with pytest.raises(SettingsError, match=message):
        coar.add_fit(run, "wrong", change(truth()))
    with pytest.raises(coar.errors.RunError, match="no finished fit 'wrong'"):
        coar.load(run.path, "wrong")


def test_without_training_masks_intercepts_must_be_given(tmp_path):
    bare = make(tmp_path / "r.zarr", linear(weights()), masks=0, test_masks=9)
    with pytest.raises(IncompleteRunError, match="no training masks to choose intercepts on; give intercept="):
        coar.add_fit(bare, "mine", truth())
    assert coar.add_fit(bare, "mine", truth(), np.zeros(len(truth()))).fit.method == "added"
