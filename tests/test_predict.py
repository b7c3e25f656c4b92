"""Choices by attributions alone: the integer programme against all sets, and intervals by hand."""

import itertools
import math

import numpy as np
import pytest

import coar
from coar.attributions import Attributions, Origin, group_means
from coar.components.table import Components
from coar.editing.select import candidates, welch_t
from coar.errors import GoalError, SettingsError
from tests.synthetic import fit, linear, make, table, weights

N, D = 30, 12
LABELS = np.arange(N) % 3


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "r.zarr"
    return fit(make(path, linear(weights(N), 0.7, 0.3), metadata={"label": LABELS, "pair": np.arange(N) // 3}))


def goal(**changes):
    parts = {"targets": "label == 1", "references": "label != 1", "direction": "decrease"}
    return coar.EditGoal(**{**parts, **changes})


@pytest.mark.parametrize("direction", ["decrease", "increase"])
@pytest.mark.parametrize(("budget", "max_loss"), [(3, 0.5), (12, 0.2), (5, 4.0)])
def test_choice_is_the_best_of_all_sets(found, direction, budget, max_loss):
    w, error = found.weights().astype(float), found.standard_errors().astype(float)
    sign = 1 if direction == "decrease" else -1
    sure = sign * w[LABELS == 1].mean(0) - error[LABELS == 1].mean(0)
    loss = np.stack([w[c == LABELS].mean(0) for c in (0, 2)])
    best = 0.0
    for size in range(budget + 1):
        for chosen in itertools.combinations(np.flatnonzero(sure > 0), size):
            rows = list(chosen)
            if (loss[:, rows].sum(1) <= max_loss + 1e-9).all():
                best = max(best, sure[rows].sum())
    edit = coar.edit(found, goal(direction=direction), budget=budget, rule="predicted", max_loss=max_loss)
    rows = [found.components.index(one.name) for one in edit.components]
    assert len(rows) <= budget
    assert (loss[:, rows].sum(1) <= max_loss + 1e-6).all()
    np.testing.assert_allclose(sure[rows].sum(), best, rtol=2e-3)


def test_prediction_is_a_sum_of_weights_with_an_interval(found):
    edit = coar.edit(found, goal(), budget=3)
    rows = [found.components.index(one.name) for one in edit.components]
    w, error = found.weights().astype(float), found.standard_errors().astype(float)
    predicted = coar.predict_edit(found, edit)
    for change, chosen in ((predicted.targets, LABELS == 1), (predicted.references, LABELS != 1)):
        mean = -w[chosen][:, rows].sum(1).mean()
        np.testing.assert_allclose(change.mean, mean, rtol=1e-6)
        errors = error[chosen][:, rows].mean(0)
        residual = (errors**2).mean() * 200 * 0.3 * 0.7 * min(3 / (0.3 * D), 1)
        reach = 1.96 * math.sqrt((errors**2).sum() + residual)
        np.testing.assert_allclose([change.low, change.high], [mean - reach, mean + reach], rtol=1e-6)
    by_class = {c: -w[c == LABELS][:, rows].sum(1).mean() for c in (0, 2)}
    assert predicted.group == min(by_class, key=by_class.get)
    np.testing.assert_allclose(predicted.worst.mean, min(by_class.values()), rtol=1e-6)


def test_without_standard_errors_there_is_no_interval(tmp_path):
    run = make(tmp_path / "r.zarr", linear(weights(N), 0.7, 0.3), metadata={"label": LABELS})
    sparse = fit(run, method="lasso")
    predicted = coar.predict_edit(sparse, coar.edit(sparse, goal(), budget=3))
    assert math.isnan(predicted.targets.low)
    assert math.isnan(predicted.targets.high)
    assert "no interval" in str(predicted.worst)
    assert not math.isnan(predicted.worst.mean)


def test_interval_covers_what_noisy_masks_make_of_a_linear_truth(tmp_path):
    """Of forty runs with outputs linear in the masks, at most a few have the true change outside."""
    truth = weights(N)
    missed = 0
    for seed in range(40):
        run = make(tmp_path / f"{seed}.zarr", linear(truth, 0.7, 1.5, seed=seed), masks=80, metadata={"label": LABELS})
        attributions = fit(run, method="ols")
        edit = coar.edit(attributions, goal(), budget=4)
        rows = [attributions.components.index(one.name) for one in edit.components]
        change = coar.predict_edit(attributions, edit).references
        missed += not change.low <= -truth[LABELS != 1][:, rows].sum(1).mean() <= change.high
    assert missed <= 4


def test_noise_is_not_chosen(tmp_path):
    """With outputs that no component moves, nothing is beyond its standard error in most components."""
    run = make(tmp_path / "r.zarr", linear(np.zeros((N, D)), 0.7, 1.0), masks=60, metadata={"label": LABELS})
    attributions = fit(run, method="ols")
    try:
        edit = coar.edit(attributions, goal(), budget=D, rule="predicted", max_loss=10.0)
    except GoalError:
        return
    assert len(edit) <= D // 4


def test_pairs_are_scored_by_their_differences(found):
    paired = goal(targets="label == 1", references="label == 0", pairs="pair")
    w = found.weights().astype(float)
    difference = w[LABELS == 1] - w[LABELS == 0]
    expected = difference.mean(0) / (difference.std(0, ddof=1) / math.sqrt(len(difference)))
    np.testing.assert_allclose(welch_t(found, paired), expected, rtol=1e-6)


def test_references_without_a_target_leave_differences_as_they_are(found):
    """And come last, whatever their places."""
    few = np.flatnonzero(LABELS == 1)[2::2].tolist()
    some = goal(targets=few, references="label == 0", pairs="pair")
    pairs = found.metadata["pair"]
    targets, references = some.resolve(found.metadata)
    assert pairs[targets].tolist() == pairs[references[: len(few)]].tolist() == sorted(pairs[few].tolist())
    assert sorted(references.tolist()) == np.flatnonzero(LABELS == 0).tolist()
    assert len(references) > len(few)
    partners = [np.flatnonzero((LABELS == 0) & (pairs == pairs[i]))[0] for i in few]
    w = found.weights().astype(float)
    difference = w[few] - w[partners]
    expected = difference.mean(0) / (difference.std(0, ddof=1) / math.sqrt(len(few)))
    np.testing.assert_allclose(welch_t(found, some), expected, rtol=1e-6)


def test_candidates_hold_the_best_of_each_ranking(found):
    w, error = found.weights().astype(float), found.standard_errors().astype(float)
    few = candidates(found, goal(), 6)
    assert len(few) == len(set(few.tolist())) == 6
    strong = w[LABELS == 1].mean(0) - error[LABELS == 1].mean(0)
    gap = strong - w[LABELS != 1].mean(0)
    assert {int(welch_t(found, goal()).argmax()), int(strong.argmax()), int(gap.argmax())} <= set(few.tolist())
    assert sorted(candidates(found, goal(), D).tolist()) == list(range(D))


def test_group_means_are_those_of_each_group(found):
    rows = np.array([4, 1, 22, 9, 11])
    groups = np.array(["b", "a", "b", "b", "a"])
    w = found.weights().astype(float)
    expected = [w[[1, 11]].mean(0), w[[4, 22, 9]].mean(0)]
    np.testing.assert_allclose(group_means(found, rows, groups), expected, rtol=1e-5)


MISTAKES = {
    "no budget": ({"budget": 0}, {}, SettingsError, "budget of 0"),
    "negative loss": ({"max_loss": -1.0}, {}, SettingsError, "max_loss: Input should be greater than or equal to 0"),
    "infinite loss": ({"max_loss": math.inf}, {}, SettingsError, "max_loss: Input should be a finite number"),
    "missing groups": ({}, {"groups": "kind"}, GoalError, "groups names column 'kind'; there are id, label, pair"),
    "missing pairs": ({}, {"pairs": "twin"}, GoalError, "pairs names column 'twin'"),
    "pairs of three": ({}, {"pairs": "pair"}, GoalError, r"pair == 0 belongs to 2 references"),
    "half a pair": (
        {},
        {"references": "label == 0 and id > 2", "pairs": "pair"},
        GoalError,
        r"1 values of 'pair', first 0, belong to a target but to no reference",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_makes_no_sense_is_refused(found, mistake):
    options, changes, kind, words = MISTAKES[mistake]
    with pytest.raises(kind, match=words):
        coar.edit(found, goal(**changes), rule="predicted", **{"budget": 3, **options})


def test_edit_without_a_goal_needs_one(found):
    one = coar.edit(found, goal(), budget=2)
    both = one + coar.edit(found, goal(direction="increase"), budget=2)
    with pytest.raises(GoalError, match="give goal="):
        coar.predict_edit(found, both)
    assert coar.predict_edit(found, both, goal=goal()).targets.low < 0


class Held:
    """Attributions in memory, so that a table as large as a vision transformer's need not be collected."""

    def __init__(self, values):
        self.values = values

    def read(self, field, *slices):
        return self.values[field][slices]

    def fields(self):
        return list(self.values)


@pytest.mark.slow
def test_many_components_and_references_are_chosen_among():
    n, d = 1_000, 82_944
    rng = np.random.default_rng(0)
    values = rng.standard_normal((n, d), dtype=np.float32)
    labels = np.arange(n) % 10
    values[labels == 1, 500] += 5
    held = Held({"weight": values, "standard_error": np.full((n, d), 0.1, np.float32), "intercept": np.zeros(n)})
    origin = Origin(np.zeros(d, np.float32), {}, {"ablation": {"name": "Mean"}, "weights": "0" * 64})
    metadata = {"id": np.arange(n), "label": labels}
    attributions = Attributions(Components(table(d)), metadata, {"masks": 0}, origin, held)
    edit = coar.edit(attributions, goal(), budget=20, rule="predicted")
    assert edit.components[0].name == table(d)[500].name
    assert len(edit) == 20
