"""Informed fits against synthetic truths whose best linear model is known, and against ridge on real digits."""

import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest

import coar
from coar.errors import RegressionError, SettingsError
from coar.regression import memory
from coar.regression.informed import learning
from coar.regression.informed import prior as priors
from coar.store import fits
from coar.store.gradients import MaskGradients
from tests.synthetic import FRACTION, Pairwise, add_gradients, fit, iterative_fit, make, pairwise

KEPT = 1 - FRACTION
VARIANCE = FRACTION * KEPT


def run_of(path, truth, *, gradients=64, mask_groups=10, masks=0, test_masks=100, **settings):
    run = make(path, truth.outputs, components=truth.effect.shape[1], masks=masks, test_masks=test_masks, **settings)
    return add_gradients(run, truth, gradients, mask_groups=mask_groups) if gradients else run


@pytest.fixture(scope="module")
def truth():
    return pairwise()


@pytest.fixture(scope="module")
def run(truth, tmp_path_factory):
    """64 mask gradients and 400 masks of 60 examples and 32 components; each test fits under its own name."""
    return run_of(tmp_path_factory.mktemp("run") / "r.zarr", truth, masks=400)


def off(attributions, truth):
    """Mean over examples of the share of the outputs' variance that errors of the weights cost."""
    _, variance = truth.shares()
    return float((((attributions.weights() - truth.best()) ** 2).sum(1) * VARIANCE / variance).mean())


def correlations(run, names):
    table = coar.evaluate(run, fits=list(names)).table
    return dict(zip(table["fit"], table["pearson"], strict=True))


def test_weights_approach_the_truth_as_mask_gradients_are_added(truth, tmp_path):
    run = run_of(tmp_path / "r.zarr", truth, gradients=16)
    few, more, many = (off(fit(add_gradients(run, truth, count), method="informed"), truth) for count in (16, 64, 256))
    assert few < 0.04
    assert more < 0.5 * few
    assert many < 0.5 * more


@pytest.mark.parametrize("ends", [(2.0, 0.2), (0.1, 3.0), (30.0, 10.0)])
def test_gradients_that_are_off_by_a_factor_at_either_end_do_as_well(run, truth, tmp_path, ends):
    scaled = replace(truth, ends=np.array(ends)[:, None] * np.ones(32))
    other = fit(run_of(tmp_path / "r.zarr", scaled, masks=400), method="informed")
    np.testing.assert_allclose(other.weights(), fit(run, method="informed").weights(), atol=2e-3)


def test_factors_of_single_components_are_learned(tmp_path):
    truth = pairwise(200, 16)
    plain = off(fit(run_of(tmp_path / "plain.zarr", truth), method="informed"), truth)
    uneven = replace(truth, ends=np.where(np.arange(16) % 2, 3.0, 0.5) * np.ones((2, 1)))
    run = run_of(tmp_path / "uneven.zarr", uneven)
    found = fit(run, method="informed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "STAGES", ())
        by_site = fit(run, method="informed", name="by-site")
    assert "gains" in found.fit.stages
    assert off(found, truth) < 0.1 * off(by_site, truth)
    assert off(found, truth) < 4 * plain


def test_what_gradients_do_not_show_is_learned_where_examples_share_it(tmp_path):
    truth, rng = pairwise(300, 16, shared=2, own=0.1), np.random.default_rng(1)
    kinds = np.linalg.svd(truth.effect, full_matrices=False)[0][:, :2] * np.sqrt(300)
    unseen = 0.5 * kinds @ rng.standard_normal((2, 16))
    hidden = replace(truth, effect=truth.effect + unseen, unseen=unseen)
    found = fit(run_of(tmp_path / "r.zarr", hidden), method="informed")
    ignored = float(((unseen**2).sum(1) * VARIANCE / hidden.shares()[1]).mean())
    assert "structure" in found.fit.stages
    assert off(found, hidden) < 0.5 * ignored, (off(found, hidden), ignored)


@pytest.mark.parametrize("masks", [40, 150, 400])
def test_informed_beats_ridge_from_the_same_masks(run, masks):
    scores = {}
    for method in ("informed", "ridge"):
        fit(run, method=method, masks=masks, name=f"{method}-{masks}")
    scores = correlations(run, [f"informed-{masks}", f"ridge-{masks}"])
    assert scores[f"informed-{masks}"] > scores[f"ridge-{masks}"] + 0.003
    alone = fit(run, method="informed", masks=0, name="alone")
    assert scores[f"informed-{masks}"] > correlations(run, ["alone"])["alone"] - 0.002
    assert alone.fit.masks == 0


def test_digits_from_64_mask_gradients_beat_ridge_from_500_masks(digits, tmp_path):
    whole = digits.study()
    what = replace(whole, examples=whole.examples.subset(range(60)))
    options = {"device": "cpu", "progress": False}
    run = coar.collect(what, tmp_path / "r.zarr", gradients=64, masks=500, test_masks=150, **options)
    fit(run, method="informed", masks=0, name="gradients")
    fit(run, method="informed")
    fit(run, method="ridge")
    scores = correlations(run, ["gradients", "informed", "ridge"])
    assert scores["gradients"] > scores["ridge"] + 0.02, scores
    assert scores["informed"] > scores["gradients"], scores


def test_blocks_of_examples_of_any_size_give_the_same(truth, tmp_path, monkeypatch):
    def fitted(name, masks, **settings):
        found = fit(run_of(tmp_path / name, truth, masks=80, **settings), method="informed", masks=masks)
        return found.weights(), found.standard_errors(), found.intercept

    for masks in (0, 20, 80):  # none, fewer than components, more
        whole = fitted(f"whole-{masks}", masks, blocks=(16, 60))
        with monkeypatch.context() as patch:
            patch.setattr(fits, "CHUNK_BYTES", 7 * 4 * 32)  # seven examples at a time
            patch.setattr("coar.store.gradients.CHUNK_BYTES", 5 * 4 * 32)
            cut = fitted(f"cut-{masks}", masks, blocks=(5, 11))
        for one, other in zip(whole, cut, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def spread_of(run):
    outputs = MaskGradients(run).outputs(len(MaskGradients(run).rounds), slice(0, run.n_examples))
    return outputs.std(0, ddof=1).astype(float)


def by_hand(run, prior, masks):
    """Ridge on what the prior leaves, in units of its columns, from explicit matrices: weights and penalty."""
    rows = run.plan.rows("train", FRACTION)[:masks]
    x = run.masks_at(rows).astype(float)
    y = run.outputs_at(rows, slice(0, run.n_examples)).astype(float)
    spread = spread_of(run)
    column = np.sqrt(((prior / spread[:, None]) ** 2).mean(0))
    column = np.maximum(column / column.mean(), 1e-2)
    scaled = (x - x.mean(0)) * column
    residual = y - x @ prior.T
    residual -= residual.mean(0)
    gram = scaled.T @ scaled
    scores = {}
    for penalty in np.logspace(-4, 4, 65) * np.trace(gram) / np.linalg.matrix_rank(scaled):
        hat = scaled @ np.linalg.solve(gram + penalty * np.eye(len(gram)), scaled.T)
        freedom = masks - 1 - np.trace(hat)
        if freedom >= masks / 2:
            scores[penalty] = (((residual - hat @ residual) ** 2).sum(0) / freedom**2 / spread**2).sum()
    best = min(scores, key=scores.get)
    more = np.linalg.solve(gram + best * np.eye(len(gram)), scaled.T @ residual).T * column
    return prior + more, best


@pytest.mark.parametrize("fitted", [fit, iterative_fit])  # from a decomposition, and without it
@pytest.mark.parametrize("masks", [20, 32, 33, 100])
def test_correction_by_masks_is_ridge_on_what_the_mask_gradients_leave(run, caplog, masks, fitted):
    caplog.set_level(logging.INFO, logger="coar")
    prior = fit(run, method="informed", masks=0, name="prior").weights().astype(float)
    found = fitted(run, method="informed", masks=masks, name=f"corrected-{masks}-{fitted.__name__}")
    assert ("iteratively" in caplog.text) == (fitted is iterative_fit)
    weights, penalty = by_hand(run, prior, masks)
    assert found.fit.mask_penalty == pytest.approx(penalty, rel=1e-3)
    np.testing.assert_allclose(found.weights(), weights, atol=1e-4)


@pytest.mark.parametrize("masks", [0, 50])
def test_intercept_makes_the_mean_right(run, masks):
    found = fit(run, method="informed", masks=masks, name=f"mean-{masks}")
    mask_gradients, rows = MaskGradients(run), run.plan.rows("train", FRACTION)[:masks]
    own = np.concatenate([mask_gradients.masks(i) for i in range(len(mask_gradients.rounds))])[
        :, mask_gradients.group_of(slice(0, 60))
    ]  # (mask gradients, n, d)
    predicted = (own * found.weights()).sum(2) + found.intercept
    outputs = [mask_gradients.outputs(len(mask_gradients.rounds), slice(0, 60))]
    if masks:
        outputs.append(run.outputs_at(rows, slice(0, 60)))
        predicted = np.concatenate([predicted, found.predict(run.masks_at(rows))])
    np.testing.assert_allclose(predicted.mean(0), np.concatenate(outputs).mean(0), atol=1e-4)


SEEDS = range(6)


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """Fits without masks, and with a few, for several seeds of truth and masks."""
    found = []
    for seed in SEEDS:
        truth = pairwise(100, 24, pairs=0.5, seed=seed)
        made = run_of(
            tmp_path_factory.mktemp("run") / "r.zarr", truth, mask_groups=64, masks=60, test_masks=0, seed=seed
        )
        found.append([truth, fit(made, method="informed", masks=0, name="alone"), fit(made, method="informed")])
    return found


def test_quality_of_the_prior_agrees_with_the_truth(trials):
    strayed = []
    for truth, alone, _ in trials:
        quality = alone.fit.prior_quality
        share = float(truth.shares()[0].mean())
        strayed.append([(quality.error - off(alone, truth)), quality.reachable**2 - share, quality.deviation])
        assert quality.explained < share + quality.deviation
    error, reachable, deviation = np.array(strayed).T
    assert (np.abs(error) < 4 * deviation).all(), strayed
    assert (np.abs(reachable) < 4 * deviation + 0.01).all(), strayed
    assert abs(error.mean()) < 3 * deviation.mean() / np.sqrt(len(SEEDS))
    assert abs(reachable.mean()) < 3 * deviation.mean() / np.sqrt(len(SEEDS)) + 0.005
    assert (deviation < 0.02).all()


def test_intervals_cover_the_truth(trials):
    for place in (1, 2):  # without masks, and with them
        covered = []
        for row in trials:
            error, found = np.abs(row[place].weights() - row[0].best()), row[place]
            covered.append((error < 1.96 * found.standard_errors()).mean())
            assert found.standard_errors().mean() < 4 * np.sqrt((error**2).mean())
        assert np.mean(covered) > 0.9, covered
        assert min(covered) > 0.85, covered
    shrunk = [(row[2].standard_errors() / row[1].standard_errors()).mean() for row in trials]
    assert max(shrunk) < 1  # masks only add knowledge


def test_gradients_do_not_explain_the_outputs_that_came_with_them(tmp_path):
    """Where the best linear model is none, each mask gradient's gradients still go with its own output."""
    mixed = pairwise(100, 24, pairs=0.5)
    truth = Pairwise(-KEPT * mixed.pair.sum(2), mixed.pair, mixed.ends)
    np.testing.assert_allclose(truth.best(), 0, atol=1e-12)
    found = fit(run_of(tmp_path / "r.zarr", truth), method="informed")
    quality = found.fit.prior_quality
    assert abs(quality.explained) < 0.02
    assert abs(quality.error) < 4 * quality.deviation
    masks = np.random.default_rng(0).random((50, 100, 24)) > FRACTION
    outputs, gradients = truth.mask_gradients(masks.astype(float))
    own = (gradients * (masks - KEPT)).sum(2)  # what each mask gradient's gradients say of its output
    assert np.corrcoef(own.flatten(), (outputs - outputs.mean(0)).flatten())[0, 1] > 0.9


def test_many_masks_lead_to_least_squares(truth, tmp_path):
    run = run_of(tmp_path / "r.zarr", truth, gradients=16, masks=4000)
    apart = []
    for masks in (100, 600, 4000):
        pair = [fit(run, method=method, masks=masks, name=f"{method}-{masks}") for method in ("informed", "ols")]
        apart.append(np.abs(pair[0].weights() - pair[1].weights()).mean())
    assert apart[2] < 0.02
    assert apart[1] < apart[0] / 2
    assert apart[2] < apart[1] / 2


def test_dead_components_and_constant_outputs(run, truth, tmp_path):
    truth = Pairwise(truth.effect.copy(), truth.pair.copy(), truth.ends)
    truth.effect[:, 7] = 0
    truth.pair[:, 7] = truth.pair[:, :, 7] = 0
    plain = fit(run_of(tmp_path / "plain.zarr", truth, masks=100), method="informed")
    truth.effect[[3, 40]] = 0
    truth.pair[[3, 40]] = 0
    still = run_of(tmp_path / "still.zarr", truth, masks=100)
    for name in ("gradient_outputs", "outputs"):
        values = still.array(name)[...]
        values[..., 40] += np.float32(0.1)  # whose mean over the mask gradients is not quite itself
        still.array(name)[...] = values
    found = fit(still, method="informed")
    assert np.abs(found.weights()[[3, 40]]).max() < 1e-6
    np.testing.assert_allclose(found.intercept[[3, 40]], [0, 0.1], atol=1e-6)
    assert np.isfinite(found.standard_errors()).all()
    assert np.abs(found.weights()[:, 7]).max() < 1e-3
    others = np.setdiff1d(np.arange(60), [3, 40])
    errors = [np.square(fitted.weights()[others] - truth.effect[others]).mean() for fitted in (found, plain)]
    assert errors[0] < 1.5 * errors[1], errors


def test_learning_from_some_of_the_examples_is_nearly_as_good(tmp_path, monkeypatch):
    truth = pairwise(600, 16)
    run = run_of(tmp_path / "r.zarr", truth, mask_groups=64, blocks=(16, 600))
    whole = off(fit(run, method="informed", name="whole"), truth)
    monkeypatch.setattr(memory, "MOST_LEARNING", 16 * 160)  # every fourth example would meet 16 mask groups
    chosen = np.arange(600)[priors.learning_examples(run, 160)]
    assert len(chosen) == 120
    assert set(MaskGradients(run).group_of(slice(None))[chosen]) == set(range(64))
    assert off(fit(run, method="informed", name="part"), truth) < 1.6 * whole


def test_mask_gradients_are_used_by_whole_rounds(truth, tmp_path, caplog):
    long = add_gradients(run_of(tmp_path / "long.zarr", truth, gradients=32), truth, 64)
    for mask_gradients in (32, 64):
        short = fit(run_of(tmp_path / f"{mask_gradients}.zarr", truth, gradients=mask_gradients), method="informed")
        part = fit(long, method="informed", gradients=mask_gradients, name=f"part-{mask_gradients}")
        assert part.fit.gradients == mask_gradients
        assert off(part, truth) == pytest.approx(off(short, truth), rel=0.25)
    part = fit(long, method="informed", gradients=63, name="part-63")
    assert part.fit.gradients == 48
    assert "48 of the 63 mask gradients are used" in caplog.text
    with pytest.raises(SettingsError, match=r"65 mask gradients .* has 64; choose up to 64, or collect more"):
        fit(long, method="informed", gradients=65)


def test_a_fit_is_made_again_only_when_asked_or_when_mask_gradients_were_added(truth, tmp_path):
    run = run_of(tmp_path / "r.zarr", truth, gradients=16, masks=20)
    first = fit(run, method="informed").weights()
    assert fit(run, method="informed", refit=True).fit.gradients == 16
    np.testing.assert_array_equal(fit(run, method="informed").weights(), first)
    grown = fit(add_gradients(run, truth, 32), method="informed")
    assert grown.fit.gradients == 32
    assert not np.array_equal(grown.weights(), first)


def test_too_few_mask_gradients(truth, tmp_path):
    run = run_of(tmp_path / "r.zarr", truth, gradients=0, masks=20)
    with pytest.raises(
        RegressionError, match=r"needs mask gradients, and .* has none; collect some, such as --gradients 64"
    ):
        fit(run, method="informed")
    assert fit(run).fit.method == "ridge"
    add_gradients(run, truth, 7)
    with pytest.raises(RegressionError, match=r"at least 8 mask gradients and would use 7 of the 7 .* --gradients"):
        fit(run, method="informed")
    with pytest.raises(RegressionError, match="would use 0 of the 7"):
        fit(run, method="informed", gradients=0)
    assert fit(run, gradients=0).fit.method == "ridge"
    assert fit(add_gradients(run, truth, 9), method="informed").fit.gradients == 9


def test_gradients_that_are_all_zero(truth, tmp_path):
    run = run_of(tmp_path / "r.zarr", replace(truth, ends=np.zeros((2, 32))), masks=20)
    with pytest.raises(RegressionError, match=r"every mask gradient in .* is zero.* fit masks by ridge"):
        fit(run)
    assert coar.Run.open(run.path).group.get("attributions/informed") is None
    assert fit(run, method="ridge").fit.masks == 20


def test_mask_gradients_alone_give_attributions_that_do_everything(truth, tmp_path):
    run = run_of(tmp_path / "r.zarr", truth, masks=0, test_masks=0)
    assert len(run.plan) == 0
    found = fit(run)
    assert (found.fit.method, found.fit.masks) == ("informed", 0)
    with pytest.raises(RegressionError, match="needs at least two training masks"):
        fit(run, method="ridge")
    found.to_safetensors(tmp_path / "a.safetensors")
    for other in (coar.load(tmp_path / "a.safetensors"), coar.load(run.path)):
        assert other.fit == found.fit
        np.testing.assert_array_equal(other.weights(), found.weights())
        np.testing.assert_array_equal(other.standard_errors(), found.standard_errors())
        masks = np.random.default_rng(0).random((5, 32)) > 0.5
        expected = masks @ found.weights().T.astype(float) + found.intercept
        np.testing.assert_allclose(other.predict(masks), expected, atol=1e-4)
        assert len(other[3].top(4)) == 4
    goal = coar.EditGoal(targets="id == 3", references="id != 3", direction="decrease")
    assert len(coar.edit(found, goal, budget=5).components) == 5
    judged = run_of(tmp_path / "judged.zarr", truth)
    assert fit(judged).fit.masks == 0
    row = coar.evaluate(judged).table.iloc[0]
    assert (row["fit"], row["masks"], row["gradients"]) == ("informed", 0, 64)
    assert row["pearson"] > 0.9


def judged(path, truth, masks, **settings):
    """A run with validation masks beside its training masks."""
    wanted = {("train", FRACTION): masks, ("validation", FRACTION): 60, ("test", FRACTION): 60}
    return run_of(path, truth, steps=[wanted], **settings)


def half_blind(truth):
    """Gradients that see only every other component."""
    return replace(truth, ends=np.where(np.arange(32) % 2, 1.0, 0.0) * np.ones((2, 1)))


@pytest.mark.parametrize(("blind", "masks", "method"), [(False, 200, "informed"), (True, 1500, "ridge")])
def test_auto_takes_what_predicts_validation_masks_better(truth, tmp_path, blind, masks, method):
    run = judged(tmp_path / "r.zarr", half_blind(truth) if blind else truth, masks)
    chosen = fit(run)
    assert chosen.fit.method == method
    loaded = coar.load(run.path)
    assert loaded.fit == chosen.fit
    np.testing.assert_array_equal(loaded.weights(), chosen.weights())
    rows = run.plan.rows("validation", FRACTION)
    x, y = run.masks_at(rows), run.outputs_at(rows, slice(0, 60)).astype(float)
    for name in ("informed", "ridge"):
        found = coar.load(run.path, name)
        pairs = zip(found.predict(x).T.astype(float), y.T, strict=True)
        expected = np.mean([np.corrcoef(predicted, outputs)[0, 1] for predicted, outputs in pairs])
        assert found.fit.validation == pytest.approx(expected, abs=1e-5)
        assert found.fit.validation <= chosen.fit.validation


def test_auto_without_validation_masks_or_under_a_name_is_informed(truth, tmp_path):
    run = judged(tmp_path / "r.zarr", half_blind(truth), 1500)
    assert fit(run, name="mine").fit.method == "informed"
    bare = run_of(tmp_path / "bare.zarr", half_blind(truth), masks=100)
    assert fit(bare).fit.method == "informed"
    assert fit(bare).fit.validation is None
    assert sorted(bare.group["attributions"].group_keys()) == ["informed"]


def test_validation_masks_that_come_later_are_scored(truth, tmp_path):
    first = {("train", FRACTION): 100}
    more = [{("validation", FRACTION): count, ("train", FRACTION): 100} for count in (20, 60)]
    scores = []
    for number, steps in enumerate(([first], [first, more[0]], [first, *more])):
        run = run_of(tmp_path / f"{number}.zarr", truth, steps=steps)
        if number:
            shutil.copytree(tmp_path / f"{number - 1}.zarr/attributions", run.path / "attributions")
            run = coar.Run.open(run.path)
        weights = fit(run).weights()
        record = coar.load(run.path, "informed").fit
        scores.append((record.validation, record.validation_masks))
        assert np.isfinite(weights).all()
    assert [count for _, count in scores] == [0, 20, 60]
    assert scores[1][0] != scores[2][0]
