"""Masks: pure functions of (seed, split, index), with the frequencies they promise."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import coar
from coar.errors import SettingsError
from coar.sampling import SPLITS, sampler_from_settings

SAMPLERS = [coar.BernoulliSampler, coar.FixedSizeSampler]
fractions = st.floats(min_value=1e-6, max_value=1 - 1e-6)
seeds = st.integers(min_value=0, max_value=2**63 - 1)
splits = st.sampled_from(SPLITS)
repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def raw_words(seed, split, index, count):
    """Philox words, straight from numpy, as the format fixes them."""
    key = np.array([seed, ("train", "validation", "test", "gradient").index(split)], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, index, 0, 0], dtype=np.uint64)).random_raw(count)


def numbers(seed, split, index, count):
    """Two 32-bit numbers a word, low half first, in plain Python."""
    words = [int(word) for word in raw_words(seed, split, index, -(-count // 2))]
    return [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)][:count]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("count", [1, 7, 8, 688])
def test_masks_are_those_that_philox_gives_by_hand(split, count):
    for seed, index, fraction in ((0, 0, 0.1), (7, 3, 0.5), (2**63 - 1, 10**6, 0.03)):
        drawn = numbers(seed, split, index, count)
        mask = coar.BernoulliSampler(ablated_fraction=fraction, seed=seed).masks(split, [index], count)[0]
        assert mask.tolist() == [number >= round(fraction * 2**32) for number in drawn]
        mask = coar.FixedSizeSampler(ablated_fraction=fraction, seed=seed).masks(split, [index], count)[0]
        ablated = sorted(range(count), key=lambda i: (drawn[i], i))[: max(1, round(fraction * count))]
        assert np.flatnonzero(~mask).tolist() == sorted(ablated)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("indices", [range(4, 5), range(10), range(3, 64, 7)])
def test_stratified_masks_are_those_of_ranks_by_hand(sampler, indices):
    count, seed, size = 9, 5, len(indices)
    drawn = [numbers(seed, "gradient", index, 2 * count) for index in indices]
    masks = sampler(ablated_fraction=0.3, seed=seed).stratified("gradient", indices, count)
    for row in range(size):
        own = []
        for i in range(count):
            rank = sorted(range(size), key=lambda other, i=i: (drawn[other][i], other)).index(row)
            own.append((rank * 2**32 + drawn[row][count + i]) // size)
        ablated = [i for i in range(count) if own[i] < round(0.3 * 2**32)]
        if sampler is coar.FixedSizeSampler:
            ablated = sorted(range(count), key=lambda i: (own[i], i))[: round(0.3 * count)]
        assert np.flatnonzero(~masks[row]).tolist() == sorted(ablated)


@pytest.mark.parametrize(("fraction", "size"), [(0.1, 10), (0.1, 16), (0.5, 7), (0.03, 32)])
def test_stratified_masks_share_out_a_components_ablations_and_nothing_else(fraction, size):
    sampler, count = coar.BernoulliSampler(ablated_fraction=fraction, seed=1), 400
    groups = np.stack(
        [sampler.stratified("gradient", range(first, first + size), count) for first in range(0, 40 * size, size)]
    )
    times = (~groups).sum(1)  # (groups, components)
    assert set(np.unique(times)) <= {int(np.floor(size * fraction)), int(np.ceil(size * fraction))}
    assert (~groups).mean() == pytest.approx(fraction, abs=5 * np.sqrt(fraction / groups.size))
    together = (~groups).reshape(-1, count).astype(float)
    joint = np.corrcoef(together.T)[np.triu_indices(count, 1)]
    assert joint.std() == pytest.approx(1 / np.sqrt(len(together)), rel=0.1)  # different components are independent


def test_a_number_at_the_threshold_itself_keeps():
    drawn = numbers(0, "train", 0, 20)
    for i, number in enumerate(drawn):
        mask = coar.BernoulliSampler(ablated_fraction=number / 2**32).masks("train", [0], 20)[0]
        assert mask[i]
        assert mask.tolist() == [other >= number for other in drawn]


def test_known_answers():
    """Fixed for ever: a run's masks are remade from its seed by later versions."""
    masks = coar.BernoulliSampler(ablated_fraction=0.5, seed=0).masks("train", range(4), 64)
    packed = [row.tobytes().hex() for row in np.packbits(masks, axis=1, bitorder="little")]
    assert packed == ["84b771a72194b64c", "f196d2c434832ab9", "9a672975e8da7309", "243758f536d90293"]
    masks = coar.FixedSizeSampler(ablated_fraction=0.25, seed=1).masks("test", range(2), 32)
    ablated = [np.flatnonzero(~row).tolist() for row in masks]
    assert ablated == [[1, 2, 5, 9, 12, 23, 27, 30], [0, 7, 9, 13, 20, 26, 30, 31]]


@pytest.mark.parametrize("cls", SAMPLERS)
def test_order_and_company_do_not_matter(cls):
    sampler = cls(ablated_fraction=0.2, seed=5)
    whole = sampler.masks("train", range(50), 77)
    order = np.random.default_rng(0).permutation(50)
    np.testing.assert_array_equal(sampler.masks("train", order.tolist(), 77), whole[order])
    np.testing.assert_array_equal(cls(ablated_fraction=0.2, seed=5).masks("train", [31], 77)[0], whole[31])
    assert sampler.masks("train", [], 77).shape == (0, 77)
    assert whole.dtype == bool


def test_another_process_makes_the_same_masks():
    code = (
        "import coar, hashlib\n"
        "for cls in (coar.BernoulliSampler, coar.FixedSizeSampler):\n"
        "    masks = cls(ablated_fraction=0.3, seed=11).masks('test', range(9), 101)\n"
        "    print(hashlib.sha256(masks.tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    masks = [cls(ablated_fraction=0.3, seed=11).masks("test", range(9), 101) for cls in SAMPLERS]
    assert done.stdout.split() == [hashlib.sha256(rows.tobytes()).hexdigest() for rows in masks]


@pytest.mark.parametrize("cls", SAMPLERS)
def test_seeds_splits_and_indices_give_other_masks(cls):
    rows = [
        tuple(cls(ablated_fraction=0.5, seed=seed).masks(split, [index], 128)[0])
        for seed in (0, 1, 2**40)
        for split in SPLITS
        for index in (0, 1, 2, 500)
    ]
    assert len(set(rows)) == len(rows)


def test_masks_of_neighbouring_indices_share_no_random_numbers():
    drawn = [set(raw_words(0, split, index, 2000).tolist()) for split in SPLITS for index in range(4)]
    assert len(set.union(*drawn)) == sum(map(len, drawn))
    masks = coar.BernoulliSampler(ablated_fraction=0.5).masks("train", range(3), 4000)
    shifted = [np.mean(masks[0][lag:] == masks[1][: 4000 - lag]) for lag in range(20)]
    assert max(abs(np.array(shifted) - 0.5)) < 5 * 0.5 / np.sqrt(3980)


@pytest.mark.parametrize("cls", SAMPLERS)
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_components_are_ablated_as_often_as_promised(cls, fraction):
    n, d = 4000, 60
    expected = fraction if cls is coar.BernoulliSampler else max(1, round(fraction * d)) / d
    masks = cls(ablated_fraction=fraction, seed=2).masks("train", range(n), d)
    sigma = np.sqrt(expected * (1 - expected) / n)
    assert (np.abs((~masks).mean(axis=0) - expected) < 5 * sigma).all()
    if cls is coar.BernoulliSampler:
        assert abs((~masks).mean() - fraction) < 5 * sigma / np.sqrt(d)


def test_components_are_ablated_independently():
    n, d = 4000, 60
    masks = coar.BernoulliSampler(ablated_fraction=0.2, seed=3).masks("train", range(n), d)
    correlations = np.corrcoef(masks.T.astype(float))[np.triu_indices(d, 1)]
    assert np.abs(correlations).max() < 5.5 / np.sqrt(n)
    assert abs(correlations.mean()) < 5 / np.sqrt(n * len(correlations))
    counts = (~masks).sum(axis=1)
    assert counts.var() == pytest.approx(d * 0.2 * 0.8, rel=5 * np.sqrt(2 / n))


@given(fraction=fractions, seed=seeds, split=splits, index=st.integers(0, 2**60), components=st.integers(1, 300))
@repeatable
def test_fixed_size_masks_have_exactly_their_size(fraction, seed, split, index, components):
    mask = coar.FixedSizeSampler(ablated_fraction=fraction, seed=seed).masks(split, [index], components)[0]
    expected = min(max(round(fraction * components), 1), max(components - 1, 1))
    assert (~mask).sum() == expected
    assert mask.shape == (components,)


@pytest.mark.parametrize("cls", SAMPLERS)
@given(low=fractions, high=fractions, seed=seeds, split=splits, index=st.integers(0, 2**60))
@repeatable
def test_smaller_fractions_ablate_subsets(cls, low, high, seed, split, index):
    low, high = sorted((low, high))
    sampler = cls(ablated_fraction=0.5, seed=seed)
    few = ~sampler.masks(split, [index], 200, ablated_fraction=low)
    many = ~sampler.masks(split, [index], 200, ablated_fraction=high)
    assert (few <= many).all()
    np.testing.assert_array_equal(~cls(ablated_fraction=low, seed=seed).masks(split, [index], 200), few)


@given(fraction=fractions, seed=seeds)
@repeatable
def test_settings_make_the_same_sampler_again(fraction, seed):
    for cls in SAMPLERS:
        sampler = cls(ablated_fraction=fraction, seed=seed)
        assert sampler_from_settings(sampler.settings()) == sampler
        assert sampler.settings()["name"] == cls.__name__
    assert coar.BernoulliSampler(seed=seed) != coar.FixedSizeSampler(seed=seed)


@pytest.mark.parametrize("cls", SAMPLERS)
@pytest.mark.parametrize(
    "setting",
    [
        *[{"ablated_fraction": value} for value in (0, 1, -0.1, 1.5, float("nan"), float("inf"), "a tenth", None)],
        *[{"seed": value} for value in (-1, 2**63, 0.5, "x", None)],
        {"fraction": 0.1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_errors(cls, setting):
    with pytest.raises(SettingsError, match=next(iter(setting))):
        cls(**setting)


@pytest.mark.parametrize("value", [0.0, 1.0, -1, 2, float("nan")])
def test_other_fractions_are_checked_too(value):
    with pytest.raises(SettingsError, match="outside"):
        coar.BernoulliSampler().masks("test", [0], 5, ablated_fraction=value)


def test_samplers_cannot_be_changed_and_unknown_ones_are_errors():
    sampler = coar.BernoulliSampler()
    with pytest.raises(ValidationError):
        sampler.seed = 3
    for bad in ({"name": "Sobol"}, {}):
        with pytest.raises(SettingsError, match="unknown sampler"):
            sampler_from_settings(bad)
