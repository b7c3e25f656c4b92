"""How far two results are apart, and what NaN, infinities and other shapes count as."""

import numpy as np
import pytest
import torch
from torch import nn

from coar.equivalence import REFORMULATED, REORDERED, allowed_difference, difference, rounding

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
    assert allowed_difference(REORDERED, rounding(model)) == REORDERED
    coarse = rounding(model.to(torch.bfloat16))
    assert allowed_difference(REFORMULATED, coarse) == 8 * torch.finfo(torch.bfloat16).eps
