"""How far two results are apart, and what NaN, infinities and other shapes count as."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from coar.equivalence import (
    ALLOWED,
    Comparison,
    Fallback,
    FastPath,
    Kind,
    allowed_difference,
    compare,
    difference,
    rounding,
)

BASE = [1.0, -4.0, 2.0]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_difference_is_relative_to_the_largest_expected_value(kind):
    assert difference(kind(BASE), kind([1.0, -4.0, 2.5])) == pytest.approx(0.125)
    assert difference(kind(BASE), kind(BASE)) == 0


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_agrees_with_itself_alone(odd):
    assert difference(np.array([*BASE, odd]), np.array([*BASE, odd])) == 0
    assert difference(np.array([*BASE, odd]), np.array([*BASE, 0.0])) == np.inf
    assert difference(np.array([*BASE, 0.0]), np.array([*BASE, odd])) == np.inf


def test_infinities_of_other_sign_and_nan_for_infinity_differ():
    assert difference(np.array([1.0, np.inf]), np.array([1.0, -np.inf])) == np.inf
    assert difference(np.array([1.0, np.inf]), np.array([1.0, np.nan])) == np.inf


def test_other_shapes_differ():
    assert difference(np.ones((2, 3)), np.ones((3, 2))) == np.inf


def test_arrays_that_are_read_only_are_compared_too():
    assert difference(np.eye(3).diagonal(), np.ones(3)) == 0


def test_a_coarse_model_may_differ_by_more():
    model = nn.Linear(2, 2)
    assert allowed_difference(Kind.REORDERED, rounding(model)) == ALLOWED[Kind.REORDERED] == 1e-5
    coarse = rounding(model.to(torch.bfloat16))
    assert allowed_difference(Kind.REFORMULATED, coarse) == 8 * torch.finfo(torch.bfloat16).eps


def test_each_kind_allows_its_own_difference_and_no_more():
    for kind, allowed in ALLOWED.items():
        close, far = (compare(np.array(BASE), np.array(BASE) + 4 * allowed * share, kind) for share in (0.9, 1.1))
        assert close.agrees
        assert not far.agrees
    assert set(ALLOWED) == set(Kind)


@pytest.mark.parametrize("error", [np.nan, np.inf])
def test_neither_nan_nor_infinity_agrees(error):
    assert not Comparison(error, allowed=1e-3).agrees
    assert not compare(np.array(BASE), np.array([*BASE[:2], error]), Kind.RECOMPUTED).agrees


def test_a_comparison_says_both_numbers():
    compared = compare(np.array(BASE), np.array([1.0, -4.0, 2.5]), Kind.REFORMULATED)
    assert str(compared) == "differ by 1.2e-01 of the largest, and 0.001 is allowed"


def test_a_fast_path_is_confirmed_or_given_up_with_a_reason(caplog):
    good, bad = FastPath("one way"), FastPath("another way")
    with caplog.at_level(logging.INFO, logger="coar"):
        assert good.settle("")
        assert not bad.settle("it fails")
    assert (good.confirmed, good.fallback) == (True, None)
    assert (bad.confirmed, bad.fallback) == (False, Fallback("another way", "it fails"))
    assert caplog.messages == ["another way is not used: it fails"]
