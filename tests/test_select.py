"""Verified selection: trade-off and bound by hand, and the sets found against all sets there are."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.editing import select as choice
from coar.editing.evaluate import GatedEvaluator, SelectionContext
from coar.editing.goal import Objective
from coar.editing.select import select_in
from coar.errors import GoalError, SettingsError

NEURONS, N = 8, 90


def blobs(count, seed):
    """Three classes of points in six dimensions that overlap a little."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    centres = np.random.default_rng(0).standard_normal((3, 6))
    x = centres[labels] + rng.standard_normal((count, 6)) * 1.5
    return coar.Examples(inputs=torch.tensor(x, dtype=torch.float32), targets=torch.tensor(labels))


@pytest.fixture(scope="module", params=[0, 1, 2])
def case(request, tmp_path_factory):
    """A trained net of eight hidden neurons, attributions of 90 points, and 60 points to choose on beside them."""
    studied = blobs(N, 10 + request.param)
    torch.manual_seed(request.param)
    model = nn.Sequential(nn.Linear(6, NEURONS), nn.ReLU(), nn.Linear(NEURONS, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(studied.inputs), studied.targets).backward()
        optimizer.step()
    study = coar.Study(model=model, examples=studied, components=coar.neurons(model, exclude="2"))
    path = tmp_path_factory.mktemp("selection") / "r.zarr"
    run = coar.collect(study, path, masks=200, device="cpu", progress=False)
    return study, coar.fit(run, progress=False), blobs(60, 99)


def goal(**changes):
    parts = {"targets": "label == 1", "references": "label != 1", "direction": "decrease"}
    return coar.EditGoal(**{**parts, **changes})


def margins(model, examples, ablated):
    """Correct logit less the largest other, with hidden neurons held at their biases as zeroed weights leave them."""
    first, _, last = model
    with torch.no_grad():
        hidden = first(examples.inputs)
        hidden[:, list(ablated)] = first.bias[list(ablated)]
        logits = last(hidden.relu()).numpy()
    labels = examples.targets.numpy()
    return np.array(
        [row[y] - max(v for c, v in enumerate(row) if c != y) for row, y in zip(logits, labels, strict=True)]
    )


def judged(model, parts, ablated, *, target=1, sign=1, harm=12.0):
    """The trade-off, accuracy on targets, and the accuracy lost per group, one example at a time."""
    now = np.concatenate([margins(model, part, ablated) for part in parts])
    base = np.concatenate([margins(model, part, ()) for part in parts])
    labels = np.concatenate([part.targets.numpy() for part in parts])
    value = sum(1 / (1 + math.exp(-sign * m)) for m in now[labels == target]) / (labels == target).sum()
    others = [c for c in range(3) if c != target]
    for c in others:
        value += harm / len(others) * sum(1 / (1 + math.exp(m)) for m in now[labels == c]) / (labels == c).sum()
    changes = [(base[labels == c] > 0).astype(float) - (now[labels == c] > 0) for c in others]
    error = math.sqrt(sum(change.var() / len(change) for change in changes)) / len(others)
    return value, (now[labels == target] > 0).mean(), [change.mean() for change in changes], error


def chosen(found, study):
    return tuple(study.components.index(component.name) for component in found.edit.components)


def select(case, wanted, **options):
    study, attributions, more = case
    return coar.select(
        attributions,
        study.model,
        study.examples,
        wanted,
        **{"choosing": more, "device": "cpu", "progress": False, **options},
    )


@pytest.mark.parametrize(("direction", "sign"), [("decrease", 1), ("increase", -1)])
@pytest.mark.parametrize("bound", [0.02, 0.3])
def test_choice_is_the_best_of_all_sets_within_the_bound(case, direction, sign, bound):
    study, _, more = case
    parts = (study.examples, more)
    limit = coar.Bound(mean=bound, group=2 * bound)
    within = {}
    for size in range(NEURONS + 1):
        for ablated in itertools.combinations(range(NEURONS), size):
            value, _, lost, error = judged(study.model, parts, ablated, sign=sign)
            if np.mean(lost) + error <= bound and max(lost) <= 2 * bound:
                within[ablated] = value
    if min(within, key=within.get) == ():
        with pytest.raises(GoalError, match="widen the bound"):
            select(case, goal(direction=direction), bound=limit, constants="run")
        return
    found = select(case, goal(direction=direction), bound=limit, constants="run")
    assert found.constants == "run"
    value, accuracy, lost, error = judged(study.model, parts, chosen(found, study), sign=sign)
    np.testing.assert_allclose(found.after.value, value, rtol=1e-4)
    np.testing.assert_allclose(
        [found.after.targets, found.after.lost, found.after.worst], [accuracy, np.mean(lost), max(lost)]
    )
    assert found.after.excess == 0
    assert np.mean(lost) + error <= bound
    assert max(lost) <= 2 * bound
    start, best = within[()], min(within.values())
    assert best - 1e-6 <= value <= best + 0.1 * (start - best)


def test_penalty_of_a_broken_bound_is_how_far_it_is_broken():
    base = np.array([3.0, 2.0, 1.0, 1.0, 2.0, -1.0])
    labels = np.array([0, 0, 1, 1, 2, 2])
    of = {"label": labels}
    objective = Objective.of(
        goal(targets="label == 0", references="label != 0"),
        of,
        base,
        tradeoff=coar.TradeOff(harm_weight=4.0, target_scale=2.0, reference_scale=0.5),
        bound=coar.Bound(mean=0.1, group=0.2),
    )
    now = np.array([-1.0, 4.0, -2.0, 1.0, 2.0, 0.5])
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    harmed = 0.5 * (sigmoid(4) + sigmoid(-2)) + 0.5 * (sigmoid(-4) + sigmoid(-1))
    outcome = objective.outcome(now)
    np.testing.assert_allclose(outcome.value, 0.5 * (sigmoid(-0.5) + sigmoid(2)) + 4 * harmed / 2)
    assert (outcome.targets, outcome.lost, outcome.worst) == (0.5, 0.0, 0.5)  # class 1 lost one, class 2 gained one
    error = math.sqrt(0.25 / 2 + 0.25 / 2) / 2  # each class changes in one of two examples
    np.testing.assert_allclose(outcome.excess, (0.0 + error - 0.1) + (0.5 - 0.2))
    assert objective.unmet_fraction(outcome) == 0.5
    step = 1e-6
    for i in (2, 3, 4, 5):  # references
        moved = now.copy()
        moved[i] += step
        slope = (objective.values(moved) - objective.values(now)) / step
        rows = np.array([i])
        np.testing.assert_allclose(objective.weights[i] * objective.slopes(now[rows], rows), slope, rtol=1e-3)
    rows, before = np.arange(6), np.array([-1.0, 4.0, -1.9, 0.5, 9.0, 0.5])  # lost by references: 0.1, -0.5, 7 and 0
    targets, required = [sigmoid(-0.5) / 2, sigmoid(2) / 2], objective.required_margins(before)
    np.testing.assert_array_equal(required, [np.nan, np.nan, *before[2:]])
    np.testing.assert_allclose(
        objective.shortfall_slopes(now, required, rows), [*targets, -0.2 / 0.5, 0, -1 / 0.5, 0], atol=1e-12
    )


def test_targets_with_partners_count_by_what_they_lack_of_their_margins():
    of = {"bad": np.array([0, 1, 0, 1, 0]), "pair": np.array([7, 9, 9, 7, 8])}
    base = np.array([6.0, -3.0, 2.0, -1.0, 5.0])
    for direction, partners in {"decrease": [-1] * 5, "increase": [-1, 2, -1, 0, -1]}.items():
        objective = Objective.of(
            coar.EditGoal(targets="bad == 1", references="bad == 0", direction=direction, pairs="pair"),
            of,
            base,
            tradeoff=coar.TradeOff(target_scale=2.0, reference_scale=4.0),
            bound=coar.Bound(),
        )
        np.testing.assert_array_equal(objective.partners, partners)
    required = objective.required_margins(base)
    np.testing.assert_array_equal(required, [6, 2, 2, 6, 5])
    now = np.array([7.0, 1.0, 1.0, 0.0, 0.0])
    wrong = [1 / (1 + math.exp(margin / 2)) / 2 for margin in (1.0, 0.0)]
    lacking = [0, 1 / 4 / 4, 1 / 4 / 4, 1 / 4, 1 / 4]
    expected = [lacking[0], lacking[1] + wrong[0], lacking[2], lacking[3] + wrong[1], lacking[4]]
    np.testing.assert_allclose(objective.shortfall_slopes(now, required, np.arange(5)), -np.array(expected), atol=1e-12)


def test_passes_are_those_of_the_model(case, monkeypatch):
    study, attributions, more = case
    seen = []
    linear = nn.functional.linear

    def counted(x, *weights):
        seen.append(len(x) * (3 if torch.is_grad_enabled() else 1) if x.shape[-1] == 6 else 0)
        return linear(x, *weights)

    monkeypatch.setattr(nn.functional, "linear", counted)
    evaluator = GatedEvaluator(attributions, study.model, more, device="cpu")
    masks = ~np.eye(4, NEURONS, dtype=bool)  # which differ in the first layer already, so that no start is shared
    evaluator.margins(masks, np.arange(5))
    evaluator.slopes(np.full(NEURONS, 0.5), np.arange(1))  # the first passes also check the model and its gradients
    before = evaluator.passes
    seen.clear()
    evaluator.margins(masks)
    evaluator.margins(masks[:2], np.arange(7))
    evaluator.slopes(np.full(NEURONS, 0.5), np.arange(11))
    assert evaluator.passes - before == sum(seen) == 4 * 60 + 2 * 7 + 3 * 11


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_slopes_are_differences_of_outputs_at_partial_gates(case, level):
    study, attributions, more = case
    evaluator = GatedEvaluator(attributions, study.model, more, device="cpu")
    gates = np.linspace(0.2, 1, NEURONS)
    gates[3] = level
    rows = np.array([5, 2, 40])
    first, _, last = study.model

    def smooth(gates):
        with torch.no_grad():
            z = torch.tensor(gates)
            hidden = z * first(more.inputs[rows]).double() + (1 - z) * first.bias.double()
            logits = hidden.relu() @ last.weight.double().T + last.bias.double()
        labels = more.targets[rows]
        return [float(r[y] - torch.cat([r[:y], r[y + 1 :]]).logsumexp(0)) for r, y in zip(logits, labels, strict=True)]

    margin, slopes = evaluator.slopes(gates, rows)
    np.testing.assert_allclose(margin, smooth(gates), atol=1e-4)
    step = 1e-4 if level < 1 else -1e-4
    moved = gates.copy()
    moved[3] += step
    np.testing.assert_allclose(slopes[:, 3], (np.array(smooth(moved)) - smooth(gates)) / step, atol=2e-3)


def test_search_widens_where_targets_are_left_unchanged(case, monkeypatch):
    study, _, more = case
    wide, parts = coar.Bound(mean=1, group=1), (study.examples, more)
    monkeypatch.setattr(choice, "STAGES", (choice.Stage(2, 1, 1.0),))
    narrow = select(case, goal(), bound=wide)
    assert narrow.after.targets > 0.1
    assert len(narrow.edit) == 1
    monkeypatch.setattr(choice, "STAGES", (choice.Stage(2, 1, 1.0), choice.Stage(NEURONS, NEURONS, 0.1)))
    widened = select(case, goal(), bound=wide)
    assert len(widened.edit) > 1
    assert judged(study.model, parts, chosen(widened, study))[0] < judged(study.model, parts, chosen(narrow, study))[0]
    monkeypatch.setattr(choice, "MAX_UNMET", 1.0)  # any share may be left
    assert select(case, goal(), bound=wide).edit == narrow.edit


def test_sets_tried_near_the_edge_are_checked_on_all_examples(case):
    study, _, more = case
    parts = (study.examples, more)
    found = select(case, goal(), bound=coar.Bound(mean=1, group=1), n_boundary_references=20, constants="run")
    value, accuracy, lost, _ = judged(study.model, parts, chosen(found, study))
    np.testing.assert_allclose(
        [found.after.value, found.after.targets, found.after.lost, found.after.worst],
        [value, accuracy, np.mean(lost), max(lost)],
        rtol=1e-4,
    )


def test_goals_share_examples(case):
    study, attributions, more = case
    context = SelectionContext.of(attributions, study.model, study.examples, choosing=more, device="cpu")
    start = context.passes
    assert start == N + 60  # one pass of each, whatever the number of goals
    for label in (0, 1):
        wanted = goal(targets=f"label == {label}", references=f"label != {label}")
        options = {"bound": coar.Bound(mean=1, group=1), "progress": False}
        one = select_in(context, wanted, coar.SelectionOptions(**options))
        other = select(case, wanted, **options)
        assert one.edit == other.edit
        measured = N + 60 if label == 0 else 0  # how much channels vary is measured for the first goal alone
        assert one.passes == other.passes - start - (N + 60 - measured)


@pytest.mark.parametrize("budget", [1, 3])
@pytest.mark.parametrize("rule", ["verified", "welch"])
def test_budget_is_kept(case, budget, rule):
    attributions = case[1]
    found = select(case, goal(), budget=budget, rule=rule, bound=coar.Bound(mean=1, group=1))
    assert 1 <= len(found.edit) <= budget
    assert found.edit.goal == goal()
    if rule == "welch":
        longest = coar.edit(attributions, goal(), budget=NEURONS)
        assert found.edit.components == longest.components[: len(found.edit)]


@pytest.mark.parametrize("rule", ["welch", "predicted"])
def test_orders_by_attributions_are_cut_where_the_trade_off_is_best(case, rule):
    study, attributions, more = case
    found = select(case, goal(), rule=rule, max_loss=5, bound=coar.Bound(mean=1, group=1))
    whole = coar.edit(attributions, goal(), budget=NEURONS, rule=rule, max_loss=5)
    order = [study.components.index(one.name) for one in whole.components]
    values = [judged(study.model, (study.examples, more), order[:n])[0] for n in range(len(order) + 1)]
    assert chosen(found, study) == tuple(order[: len(found.edit)])
    assert len(found.edit) == int(np.argmin(values))
    np.testing.assert_allclose(found.after.value, min(values), rtol=1e-4)


def test_same_seed_same_choice(case):
    wide = coar.Bound(mean=1, group=1)
    one, other = (select(case, goal(), bound=wide, seed=5) for _ in range(2))
    assert one.edit == other.edit
    assert one.evaluated.equals(other.evaluated)


def test_result_has_all_evaluated_sets_and_the_number_of_examples(case):
    found = select(case, goal(), bound=coar.Bound(mean=1, group=1))
    first, best = found.evaluated.iloc[0], found.evaluated[found.evaluated["within"]]["trade_off"].min()
    assert (first["components"], first["trade_off"]) == (0, found.before.value)
    assert found.after.value == best
    assert found.examples == N + 60
    assert found.passes > 0


def test_further_examples_are_references_of_a_goal_by_positions(case):
    study, _, more = case
    targets = tuple(range(1, N, 3))  # all of class 1
    references = tuple(i for i in range(N) if i % 3 != 1)
    wide = coar.Bound(mean=1, group=1)
    options = {"bound": wide, "tradeoff": coar.TradeOff(harm_weight=1), "constants": "run"}
    found = select(case, goal(targets=targets, references=references), **options)
    now = [margins(study.model, part, chosen(found, study)) for part in (study.examples, more)]
    np.testing.assert_allclose(found.after.targets, (now[0][list(targets)] > 0).mean())
    labels = np.concatenate([study.examples.targets.numpy()[list(references)], more.targets.numpy()])
    base = [margins(study.model, part, ()) for part in (study.examples, more)]
    lost = (np.concatenate([base[0][list(references)], base[1]]) > 0).astype(float)
    lost -= np.concatenate([now[0][list(references)], now[1]]) > 0
    np.testing.assert_allclose(found.after.lost, np.mean([lost[labels == c].mean() for c in range(3)]), atol=1e-12)


def test_a_rule_that_needs_a_model_is_refused_without_one(case):
    with pytest.raises(SettingsError, match=r"rule 'verified' evaluates .* call coar\.select"):
        coar.edit(case[1], goal(), budget=2, rule="verified")


MISTAKES = {
    "unknown option": ({"budgets": 3}, SettingsError, "budgets: Extra inputs are not permitted"),
    "no steps": ({"steps": 0}, SettingsError, "steps: Input should be greater than or equal to 1"),
    "unknown rule": ({"rule": "luck"}, SettingsError, "unknown rule 'luck'"),
    "unknown constants": ({"constants": "best"}, SettingsError, "unknown constants 'best'; choose goal or run"),
    "no budget": ({"budget": 0}, SettingsError, "budget of 0"),
    "more than all": ({"budget": NEURONS + 1}, SettingsError, "budget of 9 .*1 to 8"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_settings_that_make_no_sense_are_refused(case, mistake):
    options, kind, words = MISTAKES[mistake]
    with pytest.raises(kind, match=words):
        select(case, goal(), **options)


def test_goal_that_no_set_nears_says_the_best_that_was_found(tmp_path):
    """One component separates both classes; without it all are taken for the class to forget."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        for layer, values in ((model[0].weight, [[1.0]]), (model[0].bias, [0.5]), (model[1].weight, [[-1.0], [1.0]])):
            layer.copy_(torch.tensor(values))
    x = torch.linspace(-9, 9, 40)[:, None]
    examples = coar.Examples(inputs=x, targets=(x[:, 0] > 0).long())
    study = coar.Study(model=model, examples=examples, components=coar.neurons(model, exclude="1"))
    attributions = coar.fit(coar.collect(study, tmp_path / "r.zarr", masks=20, progress=False), progress=False)
    wanted = goal(references="label == 0")
    with pytest.raises(
        GoalError, match=r"within the bound, 1\.0% lost .* from 100\.0% to 100\.0%, and loses 95\.0% on"
    ):
        coar.select(attributions, model, examples, wanted, constants="run", device="cpu", progress=False)


@pytest.mark.parametrize("direction", ["decrease", "increase"])
def test_targets_that_meet_the_goal_already_are_a_goal_error(case, direction):
    study, _, _ = case
    right = margins(study.model, study.examples, ()) > 0
    done = np.flatnonzero(right if direction == "increase" else ~right)
    assert 0 < len(done) < N
    rest = np.setdiff1d(np.arange(N), done)
    state = "right" if direction == "increase" else "wrong"
    with pytest.raises(GoalError, match=f"all {len(done)} targets {state} already"):
        select(case, goal(targets=done, references=rest, direction=direction))


def test_other_examples_than_the_studied_are_refused(case):
    study, attributions, more = case
    with pytest.raises(GoalError, match="by their ids"):
        coar.select(attributions, study.model, more, goal(), device="cpu", progress=False)
    tokens = coar.Examples(inputs={"x": more.inputs}, targets=more.targets)
    with pytest.raises(GoalError, match="other inputs"):
        select(case, goal(), choosing=tokens)
