"""Sparse fits against scikit-learn's Lasso, and their penalties against a slow search through the same path."""

import shutil

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import Lasso
from typer.testing import CliRunner

import coar
from coar.cli.common import app
from coar.errors import RegressionError, RunError
from coar.regression import lasso, sums
from coar.regression.sums import Gram, Moments
from coar.store import fits
from tests.synthetic import design, fit, linear, make, weights

CLOSE = 1e-4  # of an example's largest weight
NOISE = np.linspace(0.2, 8, 20)
D = 12


def sparse_weights(examples=20, components=40, kept=5, seed=5):
    """(examples, components) weights, all but `kept` of them zero in every row."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((examples, components))
    for row in truth:
        row[rng.choice(components, kept, replace=False)] = rng.choice([-1, 1], kept) * rng.uniform(1, 3, kept)
    return truth


def digits():
    """Real pictures as masks: 1,797 rows of 64 pixels, dark or not; neighbours alike, and some corners never dark."""
    pictures = load_digits()
    x = (pictures.data > 7).astype(float)
    y = np.column_stack([pictures.target == label for label in range(10)]).astype(float)
    return x, np.column_stack([y, pictures.data[:, 20:26] @ np.ones(6)])


def correlated(rows=400, columns=60, seed=6):
    """Masks whose neighbouring columns agree five times in six, and outputs of a few columns plus noise."""
    rng = np.random.default_rng(seed)
    change = rng.random((rows, columns)) < 1 / 6
    change[:, 0] = rng.random(rows) < 0.5
    x = np.cumsum(change, axis=1) % 2
    truth = sparse_weights(15, columns)
    return x.astype(float), x @ truth.T + rng.standard_normal((rows, 15)) * np.linspace(0.1, 3, 15)


PROBLEMS = {
    "digits": digits,
    "digits, fewer rows than columns": lambda: tuple(part[:50] for part in digits()),
    "correlated": correlated,
    "correlated, fewer rows than columns": lambda: correlated(rows=45),
    "correlated, as many rows as columns": lambda: correlated(rows=60),
}


def summed(x, y):
    """The design and the moments of rows, exactly."""
    wide, outputs = torch.from_numpy(x), torch.from_numpy(y)
    gram = Gram(wide.T @ wide, wide.sum(0), len(x))
    moments = Moments(wide.T @ outputs, outputs.sum(0), (outputs**2).sum(0), torch.zeros(y.shape[1]), len(x))
    return lasso.Design.of(gram), moments, moments.centred(gram.total)


def solved(x, y):
    """The package's solution."""
    masks, moments, product = summed(x, y)
    return lasso.solve(masks, product, mean=moments.mean(), variation=moments.variation())


def oracle(x, y, penalty):
    """Coordinate descent on the rows themselves, to far below what is compared."""
    return Lasso(alpha=float(penalty), tol=1e-11, max_iter=200_000).fit(x, y)


def assert_lasso(x, y, weight, intercept, penalty):
    """Every example's weights are the lasso's at the penalty they state."""
    for i, alpha in enumerate(penalty):
        expected = oracle(x, y[:, i], alpha)
        size = np.abs(expected.coef_).max()
        np.testing.assert_allclose(weight[i], expected.coef_, rtol=0, atol=CLOSE * size, err_msg=str(i))
        np.testing.assert_allclose(intercept[i], expected.intercept_, rtol=1e-5, atol=CLOSE * size * x.shape[1] ** 0.5)


def slow_score(x, y, penalty):
    """Generalised cross-validation score with the number of weights that are not zero as degrees of freedom."""
    model = oracle(x, y, penalty)
    freedom = len(x) - 1 - (model.coef_ != 0).sum()
    return ((y - model.predict(x)) ** 2).sum() / freedom**2 if freedom > 0 else np.inf


def slow_search(x, y):
    """Penalty of the lowest score, from large to small until five in a row are no better, and that score."""
    highest = np.abs((x - x.mean(0)).T @ (y - y.mean())).max() / len(x)
    best, chosen, behind = np.inf, None, 0
    for share in 10.0 ** np.linspace(0, -3, 30):
        score = slow_score(x, y, share * highest * (1 + 1e-12))
        best, chosen, behind = (score, share * highest, 0) if score < best else (best, chosen, behind + 1)
        if behind == 5:
            break
    return chosen, best


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """200 training masks of 12 components, read only for those who do not fit under a name of their own."""
    return make(tmp_path_factory.mktemp("run") / "a.zarr", linear(weights(), 0.7, NOISE), test_masks=30)


def fitted(run, **settings):
    return fit(run, method="lasso", **settings)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_lasso_is_scikit_learns_at_the_penalty_it_states(problem):
    x, y = PROBLEMS[problem]()
    found = solved(x, y)
    chosen = found.weight.count_nonzero(dim=1)
    assert chosen.max() > 5
    assert chosen.min() < x.shape[1]
    assert_lasso(x, y, found.weight.numpy(), found.intercept.numpy(), found.penalty)


@pytest.mark.parametrize("masks", [200, 9])
def test_fit_of_a_run_is_scikit_learns(run, masks):
    found = fitted(run, masks=masks, name=f"first-{masks}")
    x, y = (part[:masks] for part in design(run))
    assert len(set(found.penalty.tolist())) == 20
    assert_lasso(x, y, found.weights(), found.intercept, found.penalty)


@pytest.mark.parametrize("masks", [200, 9])
def test_penalty_is_what_a_slow_search_finds(run, masks):
    x, y = (part[:masks] for part in design(run))
    expected = [slow_search(x, column)[0] for column in y.T]
    np.testing.assert_allclose(fitted(run, masks=masks, name=f"first-{masks}").penalty, expected, rtol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_score_is_the_lowest_as_far_as_the_path_is_solved(problem):
    x, y = PROBLEMS[problem]()
    expected = [slow_search(x, column) for column in y.T]
    found = solved(x, y).penalty.numpy()
    same = np.isclose(found, [penalty for penalty, _ in expected], rtol=1e-6)
    assert same.mean() > 0.8
    for i in np.flatnonzero(~same):
        assert slow_score(x, y[:, i], found[i]) < 1.03 * expected[i][1]


def test_noise_alone_gets_no_weights():
    x, _ = correlated()
    y = np.random.default_rng(3).standard_normal((len(x), 50))
    found = solved(x, y)
    empty = (found.weight == 0).all(1)
    assert empty.sum() > 10
    highest = np.abs((x - x.mean(0)).T @ (y - y.mean(0))).max(0) / len(x)
    np.testing.assert_allclose(found.penalty[empty], highest[empty], rtol=1e-6)


@pytest.mark.parametrize(("masks", "most_spurious"), [(600, 0), (35, 20)])
def test_sparse_truth_is_recovered(tmp_path, masks, most_spurious):
    truth = sparse_weights()
    run = make(tmp_path / "r.zarr", linear(truth, 0.4), components=40, masks=masks)
    found = fitted(run).weights()
    assert found[truth != 0].all()
    assert np.count_nonzero(found[truth == 0]) <= most_spurious
    np.testing.assert_allclose(found, truth, atol=0.06)


def test_sparse_truth_is_recovered_under_noise_better_than_by_ridge(tmp_path):
    truth = sparse_weights()
    run = make(tmp_path / "r.zarr", linear(truth, 0.4, 1.0), components=40, masks=300)
    found, dense = fitted(run).weights(), fit(run, method="ridge").weights()
    assert found[truth != 0].all()
    assert 5 < np.count_nonzero(found, axis=1).mean() < 20
    assert ((found - truth) ** 2).sum() < 0.7 * ((dense - truth) ** 2).sum()


@pytest.mark.parametrize("masks", [200, 10])
def test_blocks_and_groups_of_any_size_give_the_same(run, tmp_path, monkeypatch, masks):
    whole = fitted(run, masks=masks, name="whole", refit=True)
    shutil.copytree(run.path, tmp_path / "copy.zarr")
    monkeypatch.setattr(fits, "CHUNK_BYTES", 3 * 4 * D)  # chunks of three examples
    monkeypatch.setattr(sums, "MOMENT_BYTES", 7 * 8 * D)  # sums of six examples at a time
    monkeypatch.setattr(sums, "BATCH", 1)  # one block of masks at a time
    cut = fitted(coar.Run.open(tmp_path / "copy.zarr"), masks=masks, name="cut")
    assert len(list((tmp_path / "copy.zarr/attributions/cut/weight/c").iterdir())) == 7
    np.testing.assert_allclose(cut.weights(), whole.weights(), rtol=0, atol=CLOSE * np.abs(whole.weights()).max())
    np.testing.assert_allclose(cut.intercept, whole.intercept, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(cut.penalty, whole.penalty, rtol=1e-5)


@pytest.mark.parametrize("masks", [200, 8])
def test_constant_examples_get_zeros(tmp_path, masks):
    def outputs(keep):
        y = linear(weights(), 0.7, 1.0)(keep)
        y[:, [0, 4, 19]] = [0.1, 0, -123.456]
        return y

    found = fitted(make(tmp_path / "r.zarr", outputs, masks=masks))
    assert not found.weights()[[0, 4, 19]].any()
    assert not found.penalty[[0, 4, 19]].any()
    np.testing.assert_allclose(found.intercept[[0, 4, 19]], [0.1, 0, -123.456], rtol=1e-6)
    assert np.isfinite(found.weights()).all()
    assert np.count_nonzero(found.weights()) > 20


def test_component_that_is_never_ablated_gets_zero(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights(), noise=0.5), masks=30, ablated_fraction=0.03)
    x, y = design(run)
    never = x.all(0)
    assert 0 < never.sum() < D
    found = fitted(run)
    assert not found.weights()[:, never].any()
    assert_lasso(x, y, found.weights(), found.intercept, found.penalty)


def test_masks_that_are_all_alike_are_refused(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights(), noise=0.5), masks=30, ablated_fraction=1e-6)
    assert design(run)[0].all()
    with pytest.raises(RegressionError, match="30 masks are all alike"):
        fitted(run)


def test_example_that_does_not_converge_is_named(tmp_path, monkeypatch):
    def outputs(keep):
        y = linear(weights(), 0.7, 1.0)(keep)
        y[:, :13] = 0.5  # at its solution from the start
        return y

    run = make(tmp_path / "r.zarr", outputs)
    monkeypatch.setattr(fits, "CHUNK_BYTES", 3 * 4 * D)
    monkeypatch.setattr(lasso, "STEPS", 2)
    with pytest.raises(RegressionError, match="example 13 within 2 steps on 200 masks"):
        fitted(run)
    assert "lasso" not in fits.fit_names(run)


def test_refining_leaves_weights_that_should_be_zero_as_they_are():
    masks, moments, product = summed(*correlated())
    target = product / len(correlated()[0]) / (moments.variation() / len(correlated()[0])).sqrt()
    penalty, weight = lasso.follow(masks, target, labels=torch.arange(15))
    weight = lasso.refined(masks, target, weight=weight, product=masks.covariance @ weight, penalty=penalty)
    wrong = torch.where(weight == 0, 1e-9, weight)
    kept = lasso.refined(masks, target, weight=wrong, product=masks.covariance @ wrong, penalty=penalty)
    torch.testing.assert_close(kept, wrong, rtol=0, atol=0)


def test_steps_that_are_too_long_are_an_error_and_not_taken_for_a_solution(run, monkeypatch):
    monkeypatch.setattr(lasso, "largest_eigenvalue", lambda matrix: 0.2 * float(torch.linalg.eigvalsh(matrix)[-1]))
    monkeypatch.setattr(lasso, "STEPS", 2_000)  # by then weights are no numbers any more
    with pytest.raises(RegressionError, match="did not converge for example"):
        fitted(run, name="too-long")


def test_there_are_no_standard_errors_and_a_message_says_so(run, tmp_path):
    found = fitted(run)
    with pytest.raises(RunError, match="lasso gives no standard errors; fit with ridge or ols"):
        found.standard_errors()
    assert found[3].standard_error is None
    assert "standard_error" not in found[3].top(2)
    found.to_safetensors(tmp_path / "a.safetensors")
    again = coar.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(again.weights(), coar.load(run.path, "lasso").weights())
    np.testing.assert_array_equal(again.penalty, found.penalty)


def test_lasso_takes_the_place_of_another_method_under_its_name(run):
    fit(run, method="ridge", name="one")
    found = fitted(run, name="one")
    assert found.fit.method == "lasso"
    assert not (run.path / "attributions/one/standard_error").exists()
    np.testing.assert_array_equal(found.weights(), fitted(run, name="two").weights())


def test_lasso_is_scored_beside_ridge(run):
    fit(run, method="ridge")
    fitted(run)
    table = coar.evaluate(run, fits=["lasso", "ridge"]).table.set_index("fit")
    assert table.loc["lasso", "pearson"] == pytest.approx(table.loc["ridge", "pearson"], abs=0.1)


def test_command_line_gives_the_same(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "copy.zarr")
    result = CliRunner().invoke(app, ["fit", str(tmp_path / "copy.zarr"), "--method", "lasso", "--name", "said"])
    assert result.exit_code == 0, result.output
    assert "lasso), fitted on 200 masks" in result.stdout
    np.testing.assert_array_equal(coar.load(tmp_path / "copy.zarr", "said").weights(), fitted(run).weights())
