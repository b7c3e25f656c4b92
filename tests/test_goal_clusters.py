"""Examples that go together: the standard error in the bound, against resampled clusters, and what is chosen by it."""

import numpy as np
import pytest

import coar
from coar.editing.goal import Objective
from coar.errors import GoalError
from tests import test_select
from tests.test_select import N, chosen, goal, margins, select

case = test_select.case


def outcome(labels, base, now, source=None):
    """What margins amount to for references in the classes 1 and 2, whose clusters are numbered by `source`."""
    objective = Objective.of(
        goal(targets="label == 0", references="label != 0", clusters=None if source is None else "source"),
        {"label": labels} if source is None else {"label": labels, "source": source},
        base,
        tradeoff=coar.TradeOff(),
        bound=coar.Bound(mean=0, group=1),
    )
    return objective.outcome(now)


def mean_loss(labels, base, now):
    """The share of right answers that classes lose, averaged over the classes 1 and 2."""
    return np.mean([((base[labels == c] > 0).astype(float) - (now[labels == c] > 0)).mean() for c in (1, 2)])


def drawn(seed, count=300):
    """Margins of `count` examples before and after, the latter worse."""
    rng = np.random.default_rng(seed)
    base = rng.normal(1.5, 1, count)
    return base, base - rng.exponential(0.6, count)


def test_copies_of_an_example_have_no_more_information_than_one():
    base, now = drawn(0)
    labels = np.arange(len(base)) % 3
    once = outcome(labels, base, now)
    copies = [np.tile(part, 3) for part in (labels, base, now)]
    clustered = outcome(*copies, np.tile(np.arange(len(base)), 3))
    np.testing.assert_allclose(clustered.excess, once.excess, rtol=1e-12)
    error = once.excess - once.lost
    np.testing.assert_allclose(outcome(*copies).excess, once.lost + error / np.sqrt(3), rtol=1e-9)


def test_error_is_the_scatter_over_resampled_clusters():
    """Clusters of unequal sizes, some of them in both classes: resampled whole, they scatter as the error says."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 5, 250)
    source = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.concatenate([[0], 1 + (rng.random(len(source) - 1) < 0.2 + 0.6 * (source[1:] % 2))])
    base = rng.normal(1.5, 1, len(source))
    now = base - np.repeat(rng.exponential(0.6, len(sizes)), sizes) - rng.exponential(0.1, len(source))
    found = outcome(labels, base, now, source)
    members = [np.flatnonzero(source == one) for one in range(len(sizes))]
    losses = []
    for _ in range(4_000):
        rows = np.concatenate([members[one] for one in rng.integers(0, len(sizes), len(sizes))])
        losses.append(mean_loss(labels[rows], base[rows], now[rows]))
    error = found.excess - found.lost
    assert error == pytest.approx(np.std(losses), rel=0.05)
    alone = outcome(labels, base, now)
    assert alone.excess - alone.lost < 0.9 * error


def test_choice_holds_the_bound_with_clusters(case):
    """A set that holds a bound for independent examples, not for these clusters, is taken only without them."""
    study, attributions, more = case
    parts = (study.examples, more)
    labels = np.concatenate([part.targets for part in parts])
    base = np.concatenate([margins(study.model, part, ()) for part in parts])

    def select(clusters, bound, parts):
        limits = {"bound": coar.Bound(mean=bound, group=1), "tradeoff": coar.TradeOff(harm_weight=0.5)}
        how = {"choosing": parts[1], "constants": "run", "progress": False, **limits}
        return chosen(coar.select(attributions, study.model, parts[0], goal(clusters=clusters), **how), study)

    best = select(None, 1, parts)
    now = np.concatenate([margins(study.model, part, best) for part in parts])
    lost = ((now > 0).astype(float) - (base > 0)) * (labels != 1)
    source = lost.argsort(kind="stable").argsort() // 5  # references that are lost stand together, as versions would
    tagged = [
        coar.Examples(inputs=part.inputs, targets=part.targets, metadata={"source": of})
        for part, of in zip(parts, np.split(source, [N]), strict=True)
    ]

    def errors(ablated):
        now = np.concatenate([margins(study.model, part, ablated) for part in parts])
        lost, sums, alone = (base > 0).astype(float) - (now > 0), np.zeros(source.max() + 1), 0.0
        for c in (0, 2):
            of = labels == c
            np.add.at(sums, source[of], (lost[of] - lost[of].mean()) / of.sum() / 2)
            alone += lost[of].var() / of.sum() / 4
        mean = np.mean([lost[labels == c].mean() for c in (0, 2)])
        return mean + np.sqrt((sums**2).sum()), mean + np.sqrt(alone)

    clustered, independent = errors(best)
    assert clustered - independent > 1e-3
    bound = (clustered + independent) / 2
    assert select(None, bound, tagged) == best
    other = select("source", bound, tagged)
    assert errors(other)[0] <= bound


def test_a_column_of_clusters_that_is_not_there(case):
    with pytest.raises(GoalError, match="clusters names column 'source'; there are id, label: choose one of them"):
        select(case, goal(clusters="source"))
    assert goal(clusters="label").clusters_of({"label": np.array([4, 7, 4])}).tolist() == [0, 1, 0]
    assert goal().clusters_of({"label": np.array([4, 7, 4])}).tolist() == [0, 1, 2]
