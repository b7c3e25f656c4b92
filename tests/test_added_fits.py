"""Attributions of other methods that are added to a run: stored, scored, and refused when they do not fit."""

import logging

import numpy as np
import pandas as pd
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


@pytest.mark.parametrize("axis", ["rows", "columns", "both"])
def test_labels_bring_a_table_into_order(run, axis):
    rng = np.random.default_rng(0)
    rows = rng.permutation(20) if axis != "columns" else np.arange(20)
    columns = rng.permutation(D) if axis != "rows" else np.arange(D)
    names = np.array(run.components.names)
    ids = run.metadata["id"]
    table = pd.DataFrame(truth()[np.ix_(rows, columns)], index=ids[rows], columns=names[columns])
    given = pd.Series(np.linspace(-1, 1, 20)[rows], index=ids[rows])
    added = coar.add_fit(run, "labelled", table, given)
    np.testing.assert_array_equal(added.weights(), truth())
    np.testing.assert_allclose(added.intercept, np.linspace(-1, 1, 20), rtol=1e-6)
    again = coar.add_fit(run, "again", added.to_pandas(), given)
    np.testing.assert_array_equal(again.weights(), truth())


def test_tables_without_labels_are_in_the_runs_order(run):
    np.testing.assert_array_equal(coar.add_fit(run, "plain", pd.DataFrame(truth())).weights(), truth())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.rename(columns={"layer0[1]": "layer9[1]"}), r"the header of weight has 'layer9\[1\]'"),
        (lambda t: t.drop(columns="layer0[1]"), r"the header of weight lacks 'layer0\[1\]'"),
        (lambda t: t.rename(index={3: 77}), r"the index of weight has 77; give the ids of the run's examples"),
        (lambda t: t.set_axis(["layer0[0]"] * 2 + list(t.columns[2:]), axis=1), r"header of weight lacks"),
        (lambda t: t.loc[:, ["layer0[1]", *t.columns]], "header of weight has a label twice"),
    ],
)
def test_labels_that_are_not_the_runs_are_refused(run, change, message):
    table = pd.DataFrame(truth(), index=pd.Index(run.metadata["id"], name="id"), columns=list(run.components.names))
    with pytest.raises(SettingsError, match=message):
        coar.add_fit(run, "wrong", change(table))
    with pytest.raises(coar.errors.RunError, match="no finished fit 'wrong'"):
        coar.load(run.path, "wrong")


@pytest.mark.parametrize("wrong", ["rows", "columns"])
@pytest.mark.parametrize("fitted", [False, True])
def test_an_array_in_another_order_is_doubted(tmp_path, caplog, wrong, fitted):
    """By its predictions of outputs under held-out masks; the right order and a run without such masks are silent."""
    caplog.set_level(logging.WARNING)
    made = make(tmp_path / "r.zarr", linear(weights(), INTERCEPT, noise=0.5), masks=60, test_masks=40)
    if fitted:
        fit(made)
    coar.add_fit(made, "right", truth())
    assert caplog.text == ""
    coar.add_fit(made, "turned", np.roll(truth(), 1, axis=0 if wrong == "rows" else 1))
    assert "fit 'turned' predicts outputs under held-out masks with a mean correlation of" in caplog.text
    assert "rows or columns are in another order" in caplog.text
    assert ("and 'ridge' with 0.8" in caplog.text) == fitted
    caplog.clear()
    bare = make(tmp_path / "bare.zarr", linear(weights()), masks=60)
    coar.add_fit(bare, "turned", truth()[::-1])
    assert caplog.text == ""
