"""The search for a set of components: steps forward and back, the bound, and what is confirmed on all examples."""

from dataclasses import replace

import numpy as np

import coar
from coar.editing.evaluate import GatedEvaluator, SelectionContext
from coar.editing.goal import Objective
from coar.editing.search import GROWTH, MAX_UNMET, ROUNDS, Search, checked_search
from tests import test_select
from tests.test_select import NEURONS, N, goal, judged, margins

case = test_select.case


def test_components_are_dropped_again_when_that_helps(case):
    study, attributions, more = case
    evaluator = GatedEvaluator(attributions, study.model, more, device="cpu")
    base = evaluator.margins(evaluator.gates([])[None])[0]
    columns = {"label": more.targets.numpy()}
    objective = Objective.of(goal(), columns, base, tradeoff=coar.TradeOff(), bound=coar.Bound(mean=1, group=1))
    costs = {i: judged(study.model, (more,), (i,))[0] for i in range(NEURONS)}
    worst, good = max(costs, key=costs.get), min(costs, key=costs.get)
    search = Search(evaluator, objective, NEURONS)
    search.start_again(NEURONS)  # without it the empty set would lead
    search.evaluate([(worst, good)], evaluator.constants)
    search.improve(np.array([worst]))
    assert search.leading.ablated == (good,)


def test_breaking_the_bound_grows_dearer_until_it_holds(case):
    study, attributions, more = case
    evaluator = GatedEvaluator(attributions, study.model, more, device="cpu")
    base = evaluator.margins(evaluator.gates([])[None])[0]
    parts = {"tradeoff": coar.TradeOff(harm_weight=1e-6), "bound": coar.Bound(mean=0, group=0)}
    objective = Objective.of(goal(), {"label": more.targets.numpy()}, base, **parts)
    start = (tuple(range(0, NEURONS, 2)), evaluator.constants)
    cheap = Search(evaluator, objective, NEURONS, penalty=1e-9)
    cheap.evaluate([start[0]], start[1])
    cheap.improve(np.arange(NEURONS))
    assert cheap.leading.outcome.excess > 0
    assert cheap.harm_weight == GROWTH**ROUNDS
    np.testing.assert_allclose(cheap.penalty, 1e-9 * cheap.harm_weight)
    dear = Search(evaluator, objective, NEURONS, penalty=1e3)
    dear.evaluate([start[0]], start[1])
    dear.improve(np.arange(NEURONS))
    assert dear.leading.outcome.excess == 0
    assert dear.penalty == 1e3
    cheap.start_again(NEURONS)
    assert (cheap.penalty, cheap.harm_weight) == (1e-9, 1)
    (fresh,) = cheap.evaluate([start[0]], start[1])
    assert cheap.leading is fresh  # whatever was evaluated before


def test_references_far_from_the_edge_count_as_unchanged(case):
    study, attributions, more = case
    evaluator = GatedEvaluator(attributions, study.model, more, device="cpu")
    base = evaluator.margins(evaluator.gates([])[None])[0]
    labels = more.targets.numpy()
    objective = Objective.of(goal(), {"label": labels}, base, tradeoff=coar.TradeOff(), bound=coar.Bound())
    (found,) = Search(evaluator, objective, NEURONS, n_boundary_references=5).evaluate([(0, 3)], evaluator.constants)
    others = np.flatnonzero(labels != 1)
    far = others[np.argsort(base[others])][5:]
    np.testing.assert_array_equal(found.margins[far], base[far])
    tried = np.setdiff1d(np.arange(60), far)
    np.testing.assert_allclose(found.margins[tried], margins(study.model, more, (0, 3))[tried], atol=1e-4)


def test_a_choice_that_breaks_the_bound_on_all_examples_is_mended_there(case):
    """The search took a set to be within the bound, as evaluator in low precision may; on all examples it is not."""
    study, attributions, more = case
    context = SelectionContext.of(attributions, study.model, study.examples, choosing=more, device="cpu")
    columns = {"label": np.concatenate([study.examples.targets, more.targets])}
    bound = coar.Bound(mean=0.1, group=0.2)
    objective = Objective.of(goal(), columns, context.base, tradeoff=coar.TradeOff(), bound=bound)
    search = Search(context.evaluator, objective, NEURONS, n_boundary_references=N + 60)  # that is, all
    everything = tuple(range(NEURONS))
    (broken,) = search.evaluate([everything], context.exact.constants)
    assert broken.outcome.excess > 0
    search.evaluated[-1] = replace(broken, outcome=replace(broken.outcome, excess=0.0, value=-1.0))  # the best by far
    free = np.arange(NEURONS)
    mended = checked_search(search, context.exact, free).best
    assert 0 < len(mended.ablated) < NEURONS
    _, _, lost, error = judged(study.model, (study.examples, more), mended.ablated)
    assert np.mean(lost) + error <= bound.mean
    assert max(lost) <= bound.group
    assert checked_search(search, context.exact, free[:0]).best.ablated == ()
    alone = [one for one in search.evaluate([(i,) for i in free], broken.constants) if one.outcome.excess == 0]
    poor = max(
        (one for one in alone if one.outcome.value < search.evaluated[0].outcome.value),
        key=lambda one: one.outcome.value,
    )
    search.evaluated[2:] = [poor]
    assert objective.unmet_fraction(poor.outcome) > objective.unmet_fraction(broken.outcome) + MAX_UNMET
    alone, mended = (checked_search(search, context.exact, some) for some in (free[:0], free))
    assert alone.best.ablated == poor.ablated  # what holds is of use, but leaves more targets than was hoped for
    assert len(mended.evaluated) > len(alone.evaluated) == 3
    assert mended.best.outcome.value <= poor.outcome.value
