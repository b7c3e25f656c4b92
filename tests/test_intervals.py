"""Intervals of accuracies and their changes, against scipy, a published example, and drawn samples."""

import numpy as np
import pytest
from scipy.stats import binomtest

from coar.editing.intervals import change_interval, mean_interval, share_interval

ALONE = np.arange(10_000)


def of(right, count):
    """So many right examples of a number."""
    return np.arange(count) < right


@pytest.mark.parametrize(("right", "count"), [(0, 40), (2, 4), (1, 1), (7, 9), (399, 400)])
def test_shares_have_wilsons_interval(right, count):
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(share_interval(of(right, count), ALONE[:count]), expected, atol=1e-12)


def test_changes_have_newcombes_interval():
    """36 pairs right in both, 12 in the first, 2 in the second alone, none in neither (Newcombe 1998, table II)."""
    first = np.repeat([True, True, False], [36, 12, 2])
    second = np.repeat([True, False, True], [36, 12, 2])
    np.testing.assert_allclose(change_interval(second, first, ALONE[:50]), (0.0569, 0.3404), atol=1e-4)


def test_no_change_among_few_examples_is_uncertain():
    right = np.ones(40, dtype=bool)
    low, high = change_interval(right, right, ALONE[:40])
    assert (low, high) == pytest.approx(
        (share_interval(right, ALONE[:40])[0] - 1, 1 - share_interval(right, ALONE[:40])[0])
    )


def test_intervals_cover_the_truth_of_drawn_samples():
    """Of 60 examples 80 % are right before, and 1 in 8 of these is wrong after; 95 % of intervals have the change."""
    rng, covered, narrow = np.random.default_rng(0), 0, 0
    for _ in range(1_000):
        before = rng.random(60) < 0.8
        after = before & (rng.random(60) < 0.875)
        low, high = change_interval(before, after, ALONE[:60])
        covered += low <= -0.1 <= high
        narrow += low > -0.1 or high < -0.1
    assert 0.93 < covered / 1_000 < 0.99
    assert covered + narrow == 1_000


def test_copies_of_examples_add_nothing():
    """Each example five times, as one cluster, has the interval of one each; as independent ones, a narrower."""
    rng = np.random.default_rng(1)
    before, after = rng.random(40) < 0.9, rng.random(40) < 0.7
    five = [np.repeat(part, 5) for part in (before, after, ALONE[:40])]
    np.testing.assert_allclose(share_interval(five[1], five[2]), share_interval(after, ALONE[:40]))
    np.testing.assert_allclose(change_interval(*five), change_interval(before, after, ALONE[:40]))
    low, high = share_interval(five[1], ALONE[:200])
    whole = share_interval(after, ALONE[:40])
    assert whole[0] < low < high < whole[1]
    np.testing.assert_allclose(
        share_interval(np.ones(200, dtype=bool), five[2]), share_interval(np.ones(40, dtype=bool), ALONE[:40])
    )


def test_the_mean_of_groups_has_the_root_of_summed_squares():
    means, ends = np.array([0.5, 0.9]), np.array([[0.4, 0.6], [0.6, 0.95]])
    low, high = mean_interval(means, ends)
    assert (low, high) == pytest.approx((0.7 - np.hypot(0.1, 0.3) / 2, 0.7 + np.hypot(0.1, 0.05) / 2))
