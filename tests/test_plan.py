"""The rows of the mask axis: they only ever grow at their end."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar.errors import SettingsError
from coar.sampling import BernoulliSampler, FixedSizeSampler
from coar.store.plan import ROW_SPLITS, Plan, Segment

FRACTIONS = (0.05, 0.1, 0.5)
KEYS = st.tuples(st.sampled_from(ROW_SPLITS), st.sampled_from(FRACTIONS))
WANTED = st.dictionaries(KEYS, st.integers(0, 30), max_size=4)
VALID = Plan().extended({("test", 0.1): 20, ("train", 0.1): 100})


def expanded(plan):
    """List every row as (split, fraction, index)."""
    return [(s, fraction, first + i) for s, fraction, first, count in plan.segments for i in range(count)]


def grown(requests):
    plan = Plan()
    for wanted in requests:
        plan = plan.extended(wanted)
    return plan


@given(st.lists(WANTED, max_size=6))
def test_no_extension_moves_a_row(requests):
    plan, most, lengths = Plan(), {}, []
    for wanted in requests:
        before = plan
        plan = plan.extended(wanted)
        assert expanded(plan)[: len(before)] == expanded(before)
        most = {key: max(most.get(key, 0), wanted.get(key, 0)) for key in most | wanted}
        lengths += [len(plan)] if len(plan) > len(before) else []
    assert plan.extents == tuple(lengths)
    assert len(plan) == sum(most.values()) == len(expanded(plan))
    for (split, fraction), count in most.items():
        assert plan.count(split, fraction) == count
        rows = plan.rows(split, fraction)
        assert [expanded(plan)[row] for row in rows] == [(split, fraction, i) for i in range(count)]


@given(st.lists(WANTED, max_size=6))
def test_asking_again_changes_nothing(requests):
    plan = grown(requests)
    for wanted in requests:
        assert plan.extended(wanted) == plan


@given(st.lists(WANTED, max_size=4), st.integers(0, 130), st.integers(0, 130))
def test_pieces_are_the_rows(requests, start, stop):
    plan = grown(requests)
    pieces = list(plan.pieces(start, stop))
    assert expanded(Plan(tuple(pieces))) == expanded(plan)[start:stop]
    assert all(piece.count > 0 for piece in pieces)


@given(st.lists(WANTED, max_size=6))
def test_json_round_trip(requests):
    plan = grown(requests)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(st.lists(WANTED, max_size=6))
def test_fractions_of_a_split_in_the_order_of_rows(requests):
    plan = grown(requests)
    for split in ROW_SPLITS:
        seen = [fraction for s, fraction, _ in expanded(plan) if s == split]
        assert plan.fractions(split) == sorted(set(seen), key=seen.index)


@pytest.mark.parametrize("sampler", [BernoulliSampler(seed=3), FixedSizeSampler(ablated_fraction=0.3)], ids=repr)
def test_masks_are_those_of_the_sampler_row_by_row(sampler):
    plan = grown([{("test", 0.1): 3, ("train", 0.1): 5}, {("train", 0.1): 9, ("test", 0.5): 4}])
    masks = plan.masks(sampler, 13, 2, 14)
    rows = [sampler.masks(s, [i], 13, ablated_fraction=fraction)[0] for s, fraction, i in expanded(plan)[2:14]]
    assert masks.dtype == bool
    np.testing.assert_array_equal(masks, rows)
    assert plan.masks(sampler, 13, 4, 4).shape == (0, 13)


def test_label_names_split_index_and_fraction():
    plan = VALID.extended({("train", 0.1): 130})
    assert plan.label(0) == "test mask 0 at ablated fraction 0.1"
    assert plan.label(37) == "train mask 17 at ablated fraction 0.1"
    assert plan.label(149) == "train mask 129 at ablated fraction 0.1"


@pytest.mark.parametrize("count", [-1, 2.5, True, "3", None])
def test_counts_that_are_none(count):
    with pytest.raises(SettingsError, match="whole number"):
        VALID.extended({("train", 0.1): count})


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_fractions_that_are_none(fraction):
    with pytest.raises(SettingsError, match="ablated fraction"):
        VALID.extended({("train", fraction): 5})


def test_segments_are_as_asked():
    assert VALID.segments == (Segment("test", 0.1, 0, 20), Segment("train", 0.1, 0, 100))
    assert VALID.extended({("train", 0.1): 230}).segments[2:] == (Segment("train", 0.1, 100, 130),)
    assert VALID.extended({("train", 0.1): 230}).extents == (120, 250)


MALFORMED = {
    "empty": {},
    "no extents": {"segments": []},
    "a list": [],
    "nothing": None,
    "no list of segments": {"segments": 3, "extents": []},
    "short segment": {"segments": [["train", 0.1, 5]], "extents": [5]},
    "unknown split": {"segments": [["training", 0.1, 0, 5]], "extents": [5]},
    "no number": {"segments": [["train", 0.1, 0, "five"]], "extents": [5]},
    "no rows": {"segments": [["train", 0.1, 0, 0]], "extents": [0]},
    "negative count": {"segments": [["train", 0.1, 0, -5]], "extents": [-5]},
    "negative first": {"segments": [["train", 0.1, -1, 5]], "extents": [5]},
    "gap": {"segments": [["train", 0.1, 3, 5]], "extents": [5]},
    "fraction of everything": {"segments": [["train", 1.5, 0, 5]], "extents": [5]},
    "extents too short": {"segments": [["train", 0.1, 0, 5]], "extents": []},
    "extents disagree": {"segments": [["train", 0.1, 0, 5]], "extents": [6]},
    "extents descend": {"segments": [["train", 0.1, 0, 5]], "extents": [4, 2, 5]},
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_json(data):
    with pytest.raises((ValueError, TypeError)):
        Plan.from_json(data)
