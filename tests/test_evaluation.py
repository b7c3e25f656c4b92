"""Held-out scores against scipy, example by example."""

import numpy as np
import pytest
import scipy.stats

import coar
from coar.errors import IncompleteRunError, RunError
from coar.evaluation import evaluate, score
from coar.store import fits
from coar.store.records import FitRecord
from tests.synthetic import FRACTION, design, fit, linear, make, weights

N, D = 20, 12
CONSTANT = [3, 11]
TESTS = (0.05, FRACTION, 0.6)


def outputs(masks):
    """Linear and noisy, with ties, and two examples that never vary."""
    y = linear(weights(), 0.7, np.linspace(0.05, 5, N))(masks)
    y[:, 5:8] = np.round(y[:, 5:8])
    y[:, CONSTANT] = 0.1
    return y


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Test masks at three fractions, on either side of the training masks; read only."""
    steps = [
        {("test", 0.05): 40, ("test", FRACTION): 17, ("train", FRACTION): 60},
        {("test", 0.6): 30, ("test", FRACTION): 50, ("train", FRACTION): 90},
    ]
    made = make(tmp_path_factory.mktemp("run") / "r.zarr", outputs, steps=steps)
    fit(made)
    fit(made, method="ols", name="least-squares", masks=70)
    return made


@pytest.fixture(scope="module")
def evaluation(run):
    return evaluate(run)


def expected(run, name, fraction):
    """Predictions and outputs of the test masks at a fraction, from the stored weights."""
    x, y = design(run, "test", fraction)
    group = run.group[f"attributions/{name}"]
    return x @ group["weight"][:].T.astype(float) + group["intercept"][:], y


@pytest.mark.parametrize("fraction", TESTS)
@pytest.mark.parametrize("name", ["ridge", "least-squares"])
def test_scores_of_each_example(evaluation, run, name, fraction):
    predicted, truth = expected(run, name, fraction)
    assert truth.shape == ({0.05: 40, FRACTION: 50, 0.6: 30}[fraction], N)
    scores = evaluation.per_example.query("fit == @name and ablated_fraction == @fraction").set_index("example")
    assert scores.index.tolist() == list(range(N))
    for i in set(range(N)) - set(CONSTANT):
        p, t = predicted[:, i], truth[:, i]
        by_hand = {
            "pearson": scipy.stats.pearsonr(p, t).statistic,
            "spearman": scipy.stats.spearmanr(p, t).statistic,
            "explained_variance": 1 - ((t - p) ** 2).sum() / ((t - t.mean()) ** 2).sum(),
            "slope": scipy.stats.linregress(p, t).slope,
        }
        np.testing.assert_allclose(scores.loc[i, list(by_hand)].astype(float), list(by_hand.values()), rtol=1e-5)
    assert scores.loc[CONSTANT, ["pearson", "spearman", "explained_variance"]].isna().all(axis=None)


def test_table_sums_up_the_examples(evaluation):
    table = evaluation.table
    assert evaluation.ablated_fraction == FRACTION
    assert table[["fit", "ablated_fraction"]].to_numpy().tolist() == [
        [name, fraction] for name in ("least-squares", "ridge") for fraction in TESTS
    ]
    assert table["test_masks"].tolist() == [40, 50, 30] * 2
    assert table["masks"].tolist() == [70] * 3 + [90] * 3
    assert table["undefined"].tolist() == [len(CONSTANT)] * 6
    for row in table.itertuples():
        chosen = evaluation.per_example.query("fit == @row.fit and ablated_fraction == @row.ablated_fraction").dropna()
        assert len(chosen) == N - len(CONSTANT)
        for column in ("pearson", "spearman", "explained_variance", "slope"):
            np.testing.assert_allclose(getattr(row, column), chosen[column].mean(), rtol=1e-12)
        np.testing.assert_allclose(row.median, np.median(chosen["pearson"]))
        np.testing.assert_allclose(row.tenth_percentile, np.quantile(chosen["pearson"], 0.1))


def test_bootstrap_interval_is_that_of_scipy(evaluation):
    for row in evaluation.table.itertuples():
        chosen = evaluation.per_example.query("fit == @row.fit and ablated_fraction == @row.ablated_fraction").dropna()
        found = scipy.stats.bootstrap(
            (chosen["pearson"].to_numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=1
        ).confidence_interval
        assert row.low < row.pearson < row.high
        width = found.high - found.low
        np.testing.assert_allclose([row.low, row.high], [found.low, found.high], atol=0.05 * width)


def test_bootstrap_interval_shrinks_with_more_examples(tmp_path):
    widths = []
    for examples in (12, 300):
        truth = weights(examples)
        run = make(tmp_path / f"{examples}.zarr", linear(truth, noise=2.0), test_masks=40, masks=60)
        fit(run)
        row = evaluate(run).table.iloc[0]
        widths.append(row["high"] - row["low"])
    assert 2.5 < widths[0] / widths[1] < 10  # the square root of 25 is 5


def test_seed_moves_only_the_interval(run, evaluation):
    again, other = evaluate(run).table, evaluate(run, seed=1).table
    assert again.equals(evaluation.table)
    assert not np.array_equal(other["low"], again["low"])
    assert other.drop(columns=["low", "high"]).equals(again.drop(columns=["low", "high"]))


def test_exact_attributions_score_one(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights(), 0.7), test_masks=40)
    fit(run, method="ols")
    row = evaluate(run).table.iloc[0]
    np.testing.assert_allclose(row[["pearson", "spearman", "explained_variance", "slope"]].astype(float), 1, atol=1e-4)


def test_attributions_twice_too_large_have_half_the_slope(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights(), 0.7), test_masks=40)
    writer = fits.FitWriter(run, "double", ("weight", "intercept"), FitRecord(method="double", masks=0))
    writer.write(slice(0, N), weight=2 * weights(), intercept=np.zeros(N))
    writer.finish()
    row = evaluate(run).table.iloc[0]
    np.testing.assert_allclose(row[["pearson", "slope"]].astype(float), [1, 0.5], rtol=1e-5)
    assert row["explained_variance"] < 0


def test_attributions_of_nothing_are_undefined_everywhere(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights()), test_masks=9)
    writer = fits.FitWriter(run, "zero", ("weight", "intercept"), FitRecord(method="zero", masks=0))
    writer.write(slice(0, N), weight=np.zeros((N, D)), intercept=np.ones(N))
    writer.finish()
    row = evaluate(run).table.iloc[0]
    assert row["undefined"] == N
    assert row[["pearson", "low", "high", "median", "tenth_percentile"]].isna().all()


def test_chosen_fits_in_the_order_asked_for(run):
    table = evaluate(run, fits=["ridge"]).table
    assert set(table["fit"]) == {"ridge"}
    assert evaluate(run, fits=["ridge", "least-squares"]).table["fit"].tolist() == ["ridge"] * 3 + ["least-squares"] * 3


def test_score_is_one_row_per_example(run, evaluation):
    found = score(coar.load(run.path), run, 0.6)
    rows = evaluation.per_example.query("fit == 'ridge' and ablated_fraction == 0.6").drop(
        columns=["fit", "ablated_fraction"]
    )
    np.testing.assert_allclose(found.to_numpy(), rows.to_numpy())


def test_training_outputs_do_not_reach_the_scores(tmp_path):
    run = make(
        tmp_path / "r.zarr",
        outputs,
        steps=[{("test", FRACTION): 20, ("train", FRACTION): 60}, {("test", FRACTION): 33}],
    )
    fit(run)
    before = evaluate(run)
    values = run.array("outputs")[:]
    values[run.array("split")[:] == "train"] = 1e30
    run.array("outputs")[:] = values
    assert evaluate(run).per_example.equals(before.per_example)


@pytest.mark.parametrize("test_masks", [0, 1])
def test_too_few_test_masks_is_an_error(tmp_path, test_masks):
    run = make(tmp_path / "r.zarr", linear(weights()), test_masks=test_masks)
    fit(run)
    with pytest.raises(IncompleteRunError, match=r"fewer than two test masks.*--test-masks"):
        evaluate(run)


def test_no_fits_is_an_error(tmp_path):
    with pytest.raises(RunError, match=r"no attributions to evaluate.*coar fit"):
        evaluate(make(tmp_path / "r.zarr", linear(weights()), test_masks=9))


def test_unknown_fit_is_an_error(run):
    with pytest.raises(RunError, match="no finished fit 'lasso'"):
        evaluate(run, fits=["lasso"])


def test_incomplete_run_is_an_error(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights()), test_masks=9)
    fit(run)
    (run.path / "outputs/c/0/0").unlink()
    with pytest.raises(IncompleteRunError, match="have not been collected"):
        evaluate(run)


def test_pairs_of_fits_are_compared_example_by_example(evaluation, run):
    paired = evaluation.paired("ridge", "least-squares")
    scores = ["pearson", "spearman", "explained_variance", "slope"]
    assert paired.score.tolist() == scores * len(TESTS)
    for row in paired.itertuples():
        at = evaluation.per_example.query("ablated_fraction == @row.ablated_fraction")
        wide = at.pivot_table(index="example", columns="fit", values=row.score)
        differences = (wide["ridge"] - wide["least-squares"]).dropna().to_numpy()
        assert row.examples == len(differences) == N - len(CONSTANT)
        assert row.mean == pytest.approx(differences.mean())
        assert row.better == pytest.approx((differences > 0).mean())
        interval = scipy.stats.bootstrap((differences,), np.mean, n_resamples=4000, method="percentile", rng=1)
        width = interval.confidence_interval.high - interval.confidence_interval.low
        assert (row.low, row.high) == pytest.approx(tuple(interval.confidence_interval), abs=0.1 * width)


def test_pairs_name_the_fits_there_are(evaluation):
    with pytest.raises(RunError, match=r"no fit 'mine' \(fits: "):
        evaluation.paired("ridge", "mine")
