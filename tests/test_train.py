"""Strengths of their own: what they come to where the best is known, and that the choice is what was judged."""

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.editing import select as choice
from coar.editing.evaluate import SelectionContext
from coar.editing.goal import Objective
from coar.editing.train import MIN_STRENGTH, train_strengths
from tests import test_edit_constants as constants_tests
from tests.synthetic import fit

case = constants_tests.case
GOAL = constants_tests.GOAL
QUICK = {"device": "cpu", "progress": False}


def levelled():
    """A net whose margin is 3 - 4 |y - 1| + 2 z for class 1, and z for class 0, with y and z the first features."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[1].weight.copy_(torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1]]))
        model[1].bias.copy_(torch.tensor([-1.0, 1, 0, 0, 0]))
        model[3].weight.copy_(torch.tensor([[0.0, 0, 9, 0, 0], [-4, -4, 0, 0, 0]]))
        model[3].bias.copy_(torch.tensor([0.0, 3]))
    return model


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Targets of class 1 have y = 4, and are right only where it becomes about 1; its mean is 2, the third is noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    x = np.column_stack([np.where(labels, 4.0, 0.0), np.where(labels, 0.0, 2.0), rng.standard_normal(60)])
    x[:, :2] += 0.01 * rng.standard_normal((60, 2))
    examples, model = (
        coar.Examples(inputs=torch.tensor(x, dtype=torch.float32), targets=torch.tensor(labels)),
        levelled(),
    )
    components = coar.neurons(model, include="0")
    study = coar.Study(model=model, examples=examples, components=components, ablation=coar.Mean(calibration=examples))
    path = tmp_path_factory.mktemp("known") / "r.zarr"
    return study, fit(coar.collect(study, path, masks=40, **QUICK)), labels


def test_the_best_strength_and_constant_are_found_where_they_are_known(known):
    """4 becomes 4 (1 - s) + s c, and is best at 1; what does not matter stays as it is."""
    study, attributions, labels = known
    goal = coar.EditGoal(targets="label == 1", references="label == 0", direction="increase")
    context = SelectionContext.of(attributions, study.model, study.examples, device="cpu")
    light = coar.TradeOff(harm_weight=0.1)
    objective = Objective.of(goal, {"label": labels}, context.base, tradeoff=light, bound=coar.Bound())
    gates, constants = train_strengths(context.exact, objective, np.arange(3), steps=200)
    np.testing.assert_allclose(gates[0] * 4 + (1 - gates[0]) * constants[0], 1, atol=0.15)
    assert gates[0] < 1 - MIN_STRENGTH
    assert gates[2] == 1
    kept, usual = train_strengths(context.exact, objective, np.arange(3), steps=200, with_constants=False)
    np.testing.assert_array_equal(usual, context.exact.constants)
    np.testing.assert_allclose(kept[0], 0, atol=0.02)  # the mean, 2, is as near to 1 as it gets
    found = coar.select(attributions, study.model, study.examples, goal, strength="per_component", **QUICK)
    assert (found.after.targets, found.after.lost) == (1.0, 0.0)


def by_hand(model, edit, parts):
    """Margins with weights and running means changed by hand."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for component, constant, strength in zip(edit.components, edit.replacements, edit.strengths, strict=True):
        state["0.weight"][component.position] *= 1 - strength
        state["1.running_mean"][component.position] -= strength * constant
    return np.concatenate([constants_tests.margins(model, state, part) for part in parts])


@pytest.mark.parametrize("constants", ["goal", "run"])
@pytest.mark.parametrize("bound", [0.02, 0.3])
def test_choice_is_what_was_judged_and_within_the_bound(case, bound, constants):
    study, attributions, more = case
    parts, limit = (study.examples, more), coar.Bound(mean=bound, group=2 * bound)
    options = {"choosing": more, "bound": limit, "constants": constants, "strength": "per_component", **QUICK}
    found = coar.select(attributions, study.model, study.examples, GOAL, **options)
    labels = np.concatenate([part.targets.numpy() for part in parts])
    base = np.concatenate([constants_tests.margins(study.model, study.model.state_dict(), part) for part in parts])
    now = by_hand(study.model, found.edit, parts)
    lost = [((base > 0).astype(float) - (now > 0))[labels == c] for c in (0, 2)]
    assert found.after.targets == (now[labels == 1] > 0).mean() < found.before.targets
    np.testing.assert_allclose(found.after.lost, np.mean([one.mean() for one in lost]), atol=1e-9)
    error = np.sqrt(sum(one.var() / len(one) for one in lost)) / 2
    assert found.after.lost + error <= bound
    assert max(one.mean() for one in lost) <= 2 * bound
    assert len(set(found.edit.strengths)) > 1
    assert found.constants == constants
    np.testing.assert_allclose(
        constants_tests.margins(study.model, found.edit.apply(study.model).state_dict(), more), now[90:], atol=1e-4
    )


def test_budget_trains_the_strongest_again(case, monkeypatch):
    """By themselves, so that they are not what they were in a crowd."""
    study, attributions, more = case
    calls, plain = [], choice.train_strengths

    def watched(evaluator, objective, free, **options):
        gates, constants = plain(evaluator, objective, free, **options)
        calls.append((set(free.tolist()), gates))
        return gates, constants

    monkeypatch.setattr(choice, "train_strengths", watched)
    options = {"choosing": more, "bound": coar.Bound(mean=1, group=1), "strength": "per_component", **QUICK}
    few = coar.select(attributions, study.model, study.examples, GOAL, budget=2, **options)
    (every, first), (allowed, second) = calls
    assert len(every) == len(study.components)
    assert (first < 1).sum() > 2
    assert allowed == set(np.argsort(first, kind="stable")[:2].tolist())
    numbers = [study.components.index(one.name) for one in few.edit.components]
    assert set(numbers) == allowed
    shares = np.array(few.edit.strengths) / (1 - second[numbers])
    np.testing.assert_allclose(shares, shares[0], rtol=1e-5)  # all of it, or the same part of each


def test_harm_weighs_more_until_the_bound_holds(case, monkeypatch):
    study, attributions, more = case
    weights = []
    plain = choice.train_strengths

    def watched(evaluator, objective, free, **options):
        weights.append(objective.weights[objective.references].sum())
        return plain(evaluator, objective, free, **options)

    monkeypatch.setattr(choice, "train_strengths", watched)
    options = {"choosing": more, "strength": "per_component", "tradeoff": coar.TradeOff(harm_weight=0.001), **QUICK}
    for bound in (1, 0.03):
        weights.clear()
        limit = coar.Bound(mean=bound, group=1)
        coar.select(attributions, study.model, study.examples, GOAL, bound=limit, **options)
        np.testing.assert_allclose(weights, 0.001 * np.array(choice.HARM_WEIGHTS[: len(weights)]), rtol=1e-9)
        assert (len(weights) == 1) == (bound == 1)


def test_experts_keep_their_constants(case):
    study, attributions, more = case
    context = SelectionContext.of(attributions, study.model, study.examples, choosing=more, device="cpu")
    labels = np.concatenate([study.examples.targets, more.targets])
    objective = Objective.of(GOAL, {"label": labels}, context.base, tradeoff=coar.TradeOff(), bound=coar.Bound())
    fade_all = {"steps": 20, "seed": 0}
    strongest = int(train_strengths(context.exact, objective, np.arange(6), **fade_all)[0].argmin())
    marked = [one._replace(side="expert") if i == strongest else one for i, one in enumerate(study.components)]
    context.exact.table = type(study.components)(marked)
    gates, constants = train_strengths(context.exact, objective, np.arange(6), **fade_all)
    assert gates[strongest] < 1
    moved = constants != context.exact.constants
    assert not moved[strongest]
    assert moved.any()
