"""The five ready tasks, on a trained net of digits and on nets with a shortcut planted in them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.editing.tasks import PRESETS, preset
from coar.errors import BoundError, GoalError, SettingsError
from tests.synthetic import fit

QUICK = {"device": "cpu", "progress": False}


def margins(model, examples):
    """Correct logit less the largest other one."""
    with torch.no_grad():
        logits = model(examples.inputs)
    rows = torch.arange(len(logits))
    correct = logits[rows, examples.targets].clone()
    logits[rows, examples.targets] = -torch.inf
    return (correct - logits.amax(1)).numpy()


@pytest.fixture(scope="module")
def case(digits, tmp_path_factory):
    """A study of digits, its attributions from mask gradients, further scans to choose on, and scans to judge on."""
    whole = digits.study()
    wrong = np.flatnonzero(margins(whole.model, whole.examples) <= 0)
    study = replace(whole, examples=whole.examples.subset(np.union1d(np.arange(200), wrong)))
    path = tmp_path_factory.mktemp("digits") / "r.zarr"
    run = coar.collect(study, path, masks=0, gradients=32, device="cpu", progress=False)
    return study, fit(run), digits.choosing().subset(range(400)), digits.judge()


@pytest.fixture(scope="module")
def forgotten(case):
    study, attributions, more, judge = case
    return coar.forget_class(attributions, study.model, study.examples, judge, label=3, choosing=more, **QUICK)


def test_forget_class_forgets_it_and_nothing_else(case, forgotten):
    study, _, more, judge = case
    (edit,) = forgotten.edits
    before, after = margins(study.model, judge) > 0, margins(edit.apply(study.model), judge) > 0
    labels = judge.targets.numpy()
    assert before[labels == 3].mean() > 0.90
    assert after[labels == 3].mean() <= 0.05
    assert before[labels != 3].mean() - after[labels != 3].mean() < 0.02
    assert forgotten.name == "forget-3"
    assert forgotten.table["accuracy_after"][:2].tolist() == [after[labels == 3].mean(), after[labels != 3].mean()]
    lost = []
    for c in {*range(10)} - {3}:
        parts = [part.subset(part.targets.numpy() == c) for part in (study.examples, more)]
        old, new = (
            np.concatenate([margins(net, p) for p in parts]) > 0 for net in (study.model, edit.apply(study.model))
        )
        lost.append(old.mean() - new.mean())
    assert np.mean(lost) <= PRESETS["forget"].bound.mean
    assert max(lost) <= PRESETS["forget"].bound.group
    np.testing.assert_allclose(forgotten.selections[0].after.lost, np.mean(lost), atol=1e-9)


@pytest.mark.slow
def test_each_digit_is_forgotten_at_no_cost_to_the_others(digits, tmp_path):
    """Averaged over the ten: at most 2 % left, the others down by at most 0.3 points, the worst of them by 3."""
    study, judge = digits.study(), digits.judge()
    run = coar.collect(study, tmp_path / "r.zarr", masks=0, gradients=96, device="cpu", progress=False)
    attributions, labels = fit(run), judge.targets.numpy()
    before = margins(study.model, judge) > 0
    left, others, worst = [], [], []
    for label in range(10):
        task = coar.forget_class(
            attributions, study.model, study.examples, judge, label=label, choosing=digits.choosing(), **QUICK
        )
        after = margins(task.edits[0].apply(study.model), judge) > 0
        changes = [after[labels == c].mean() - before[labels == c].mean() for c in {*range(10)} - {label}]
        left.append(after[labels == label].mean())
        others.append(np.mean(changes))
        worst.append(min(changes))
    assert np.mean(left) <= 0.02
    assert np.mean(others) >= -0.003
    assert np.mean(worst) >= -0.03


def test_curve_goes_from_the_model_to_the_edit(case, forgotten):
    study, _, _, judge = case
    curve = forgotten.curve.pivot_table(index="components", columns="group", values="accuracy")
    assert curve.index.tolist() == list(range(len(forgotten.edits[0]) + 1))
    labels = judge.targets.numpy()
    for row, net in ((curve.iloc[0], study.model), (curve.iloc[-1], forgotten.edits[0].apply(study.model))):
        right = margins(net, judge) > 0
        assert row.to_dict() == {"targets": right[labels == 3].mean(), "references": right[labels != 3].mean()}


def test_edit_of_a_task_can_be_undone(case, forgotten):
    study, _, _, _ = case
    (edit,) = forgotten.edits
    restored = edit.undo(edit.apply(study.model)).state_dict()
    assert all(torch.equal(value, restored[name]) for name, value in study.model.state_dict().items())


def test_tasks_pass_their_options_on(case):
    study, attributions, more, judge = case
    common = (attributions, study.model, study.examples)
    goal = coar.EditGoal(targets="label == 5", references="label != 5", direction="decrease")
    options = {"rule": "welch", "budget": 6, "bound": coar.Bound(mean=1, group=1), "choosing": more, **QUICK}
    task = coar.forget_class(*common, judge, label=5, **options)
    assert task.edits == (coar.select(*common, goal, **options).edit,)
    other = coar.reach_goal(*common, judge, goal=goal, name="forget-5", **options)
    assert (other.name, other.edits) == (task.name, task.edits)
    assert other.table.equals(coar.judge_edit(task.edits[0], study.model, judge, device="cpu"))


@pytest.mark.slow
def test_fix_errors_corrects_what_it_says_it_corrects(case):
    study, attributions, more, judge = case
    result = coar.fix_errors(attributions, study.model, study.examples, judge, choosing=more, **QUICK)
    before = margins(study.model, study.examples)
    wrong = np.flatnonzero(before <= 0)
    assert result.table["id"].tolist() == study.examples.metadata["id"][wrong].tolist()
    assert len(wrong) > 0
    edits = iter(zip(result.edits, result.selections, strict=True))
    for i, row in zip(wrong, result.table.itertuples(), strict=True):
        if not row.components:
            assert not row.corrected
            continue
        edit, found = next(edits)
        edited = edit.apply(study.model)
        assert edit.goal.targets == (i,)
        assert edit.goal.references == tuple(np.flatnonzero(before > 0))
        assert (margins(edited, study.examples)[i] > 0) == row.corrected
        np.testing.assert_allclose(row.margin_after, margins(edited, study.examples)[i], atol=1e-4)
        assert row.judge_before == (margins(study.model, judge) > 0).mean()
        assert row.judge_after == (margins(edited, judge) > 0).mean()
        assert found.after.lost <= PRESETS["fix"].bound.mean
    assert next(edits, None) is None
    assert result.table["corrected"].mean() >= 0.9


@pytest.mark.parametrize(("seed", "possible"), [(1, True), (3, False)])
def test_errors_are_corrected_only_within_the_bound(tmp_path, seed, possible):
    """Without the trick all tricked points are right; but with seed 3 one of them is right by the trick alone."""
    study, judge = replace(planted(), examples=tricked(15, seed)), tricked(40, 2)
    attributions = fit(coar.collect(study, tmp_path / "r.zarr", masks=60, device="cpu", progress=False))
    before = margins(study.model, study.examples)
    wrong = np.flatnonzero(before <= 0)
    limit = coar.Bound(mean=0, group=0)
    options = {"bound": limit, **QUICK}
    result = coar.fix_errors(attributions, study.model, study.examples, judge, strength="full", **options)
    assert result.table["id"].tolist() == study.examples.metadata["id"][wrong].tolist()
    assert (result.table["corrected"] == possible).all()
    assert len(result.edits) == len(result.selections) == (len(wrong) if possible else 0)
    for edit, i in zip(result.edits, wrong, strict=False):
        after = margins(edit.apply(study.model), study.examples)
        assert after[i] > 0
        assert not ((before > 0) & (after <= 0)).any()
    if not possible:
        assert (result.table["components"] == 0).all()
        assert (result.table["points"] == 0).all()
        np.testing.assert_allclose(result.table["margin_after"], before[wrong], rtol=1e-5)
        in_part = coar.fix_errors(attributions, study.model, study.examples, judge, **options)
        assert in_part.table["corrected"].any()
        assert (in_part.table["strength"][in_part.table["corrected"]] < 1).all()


def test_edit_that_does_not_correct_its_error_is_none(tmp_path):
    """Without neuron 1 nothing speaks for either class of point 9: better than before, and still not right."""
    study, judge = replace(planted(), examples=tricked(15, 7)), tricked(40, 2)
    attributions = fit(coar.collect(study, tmp_path / "r.zarr", masks=60, device="cpu", progress=False))
    free = {"bound": coar.Bound(mean=1, group=1), "tradeoff": coar.TradeOff(harm_weight=1e-3), "budget": 1}
    result = coar.fix_errors(attributions, study.model, study.examples, judge, **free, **QUICK)
    table = result.table.set_index("id")
    assert table.loc[9, "margin_before"] < 0
    assert not table.loc[9, "corrected"]
    assert table.loc[9, "components"] == 0
    assert table.drop([9, 13, 24, 28])["corrected"].all()  # those wrong by the trick alone
    assert len(result.edits) == table["corrected"].sum()


def test_nothing_to_fix_is_a_goal_error(case):
    study, attributions, _, judge = case
    right = study.examples.subset(margins(study.model, study.examples) > 0)
    with pytest.raises(GoalError, match=r"classifies all .* correctly"):
        coar.fix_errors(attributions, study.model, right, judge, **QUICK)


@pytest.mark.parametrize("budget", [0, -1, 337])
@pytest.mark.parametrize("task", ["forget", "fix"])
def test_tasks_refuse_budgets_outside_the_components(case, task, budget):
    study, attributions, _, judge = case
    run, options = {"forget": (coar.forget_class, {"label": 3}), "fix": (coar.fix_errors, {})}[task]
    with pytest.raises(SettingsError, match=f"budget of {budget} .*1 to 336"):
        run(attributions, study.model, study.examples, judge.subset(range(40)), budget=budget, **options, **QUICK)


def test_class_that_is_not_there_is_a_goal_error(case):
    study, attributions, _, judge = case
    with pytest.raises(GoalError, match="label == 17"):
        coar.forget_class(attributions, study.model, study.examples, judge, label=17, **QUICK)


def tricked(count, seed):
    """Pairs of points of two classes: plain, and with a last feature that says class 0 whatever the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    x = np.column_stack([(2 * labels - 1)[:, None] * 1.5 + rng.standard_normal((count, 2)), np.zeros(count)])
    with_trick = x.copy()
    with_trick[:, 2] = 1
    columns = {
        "pair": np.tile(np.arange(count), 2),
        "triggered": np.repeat([0, 1], count),
        "attacked": np.repeat([0, 1], count),
        "group": np.repeat(["plain", "tricked"], count),
    }
    inputs = torch.tensor(np.concatenate([x, with_trick]), dtype=torch.float32)
    return coar.Examples(inputs=inputs, targets=torch.tensor(np.tile(labels, 2)), metadata=columns)


def planted():
    """A study of a net whose hidden neuron 2 alone reads the trick."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    first = [[2.0, 1.5, 0.0], [-1.5, -2.0, 0.0], [0.0, 0.0, 12.0], [0.1, 0.1, 0.0]]
    last = [[-1.0, 1.0, 2.0, 0.01], [1.0, -1.0, -2.0, 0.01]]
    with torch.no_grad():
        for layer, weight in ((model[0], first), (model[2], last)):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.zero_()
    return coar.Study(model=model, examples=tricked(60, 1), components=coar.neurons(model, exclude="2"))


@pytest.fixture(scope="module")
def shortcut(tmp_path_factory):
    study = planted()
    path = tmp_path_factory.mktemp("shortcut") / "r.zarr"
    return study, fit(coar.collect(study, path, masks=60, device="cpu", progress=False))


TASKS = {
    "backdoor": (coar.remove_backdoor, {}, "triggered == 1"),
    "typographic": (coar.resist_typographic, {}, "attacked == 1"),
    "worst group": (coar.strengthen_group, {}, "group == 'tricked'"),
    "named group": (coar.strengthen_group, {"group": "tricked"}, "group == 'tricked'"),
}


@pytest.mark.parametrize("kind", TASKS)
def test_planted_shortcut_is_removed(shortcut, kind):
    study, attributions = shortcut
    task, options, targets = TASKS[kind]
    judge = tricked(80, 2)
    result = task(attributions, study.model, study.examples, judge, **options, **QUICK)
    (edit,) = result.edits
    assert "0[2]" in [one.name for one in edit.components]
    assert edit.goal.targets == targets
    assert edit.goal.pairs == (None if "group" in kind else "pair")
    right = margins(edit.apply(study.model), judge) > 0
    before = margins(study.model, judge) > 0
    assert before[80:].mean() < 0.6
    assert right[80:].mean() == right[:80].mean() == before[:80].mean()
    assert result.table["accuracy_after"][:2].tolist() == [right[80:].mean(), right[:80].mean()]


@pytest.mark.parametrize("task", PRESETS)
def test_rankings_ablate_fully_unless_the_options_say_otherwise(task):
    usual = PRESETS[task].strength
    assert preset(task, {}) == preset(task, {"rule": None}) == PRESETS[task]
    for rule in ("welch", "predicted"):
        assert preset(task, {"rule": rule}).strength == "full"
        assert preset(task, {"rule": rule, "strength": "minimal"}).strength == "minimal"
        assert preset(task, {"rule": rule}).bound == PRESETS[task].bound
    assert preset(task, {"rule": "verified"}).strength == usual


@pytest.mark.parametrize("kind", ["backdoor", "typographic"])
def test_published_ranking_is_tried_where_strengths_are_trained(shortcut, kind):
    """On these pairs it helps nobody within the bound, and says so."""
    study, attributions = shortcut
    with pytest.raises(BoundError, match="no set of components"):
        TASKS[kind][0](attributions, study.model, study.examples, tricked(80, 2), rule="welch", **QUICK)


MISSING = {
    "backdoor": (coar.remove_backdoor, "triggered"),
    "typographic": (coar.resist_typographic, "attacked"),
    "group": (coar.strengthen_group, "group"),
    "pairs": (coar.remove_backdoor, "pair"),
}


@pytest.mark.parametrize("kind", MISSING)
def test_missing_column_is_a_goal_error(shortcut, kind):
    study, attributions = shortcut
    task, column = MISSING[kind]
    fewer = {name: values for name, values in study.examples.metadata.items() if name != column}
    examples = coar.Examples(inputs=study.examples.inputs, targets=study.examples.targets, metadata=fewer)
    with pytest.raises(GoalError, match=f"no metadata column '{column}'"):
        task(attributions, study.model, examples, tricked(80, 2), **QUICK)


def test_pairs_that_do_not_match_are_a_goal_error(shortcut):
    study, attributions = shortcut
    judge = tricked(80, 2)
    judge = judge.subset(np.arange(len(judge)) != 3)
    with pytest.raises(GoalError, match=r"1 values of 'pair', first 3"):
        coar.remove_backdoor(attributions, study.model, study.examples, judge, **QUICK)
