"""Conjugate gradients for many columns at once, compared with dense solutions in float64."""

import pytest
import torch

from coar.regression.krylov import conjugate_gradients, refined

COLUMNS = 3


def system(size, shift, dtype=torch.float64):
    """A positive definite matrix whose least eigenvalue is `shift` or more, and right-hand sides of three sizes."""
    rng = torch.Generator().manual_seed(size)
    factor = torch.randn(size, size + 3, dtype=torch.float64, generator=rng)
    matrix = factor @ factor.T / size + shift * torch.eye(size, dtype=torch.float64)
    right = torch.randn(size, COLUMNS, dtype=torch.float64, generator=rng) * torch.tensor([1e-3, 1.0, 1e3]).double()
    return matrix.to(dtype), right.to(dtype)


def deviation(found, matrix, right):
    expected = torch.linalg.solve(matrix.double(), right.double())
    return float(((found - expected).norm(dim=0) / expected.norm(dim=0)).max())


@pytest.mark.parametrize("size", [1, 7, 60])
@pytest.mark.parametrize("shift", [1.0, 1e-3])
@pytest.mark.parametrize("conditioned", [False, True])
def test_every_column_is_solved_whatever_its_size(size, shift, conditioned):
    matrix, right = system(size, shift)
    inverse = (1 / matrix.diagonal())[:, None].expand_as(right) if conditioned else None
    found, left = conjugate_gradients(lambda x: matrix @ x, right, tolerance=1e-7, steps=300, inverse=inverse)
    assert deviation(found, matrix, right) < 1e-3
    assert (left <= 1e-7).all()


def test_a_start_near_the_solution_saves_steps_and_a_solved_column_stays():
    matrix, right = system(60, 0.1)
    exact = torch.linalg.solve(matrix, right)
    start = exact.clone()
    start[:, 2] = 0
    found, left = conjugate_gradients(lambda x: matrix @ x, right, tolerance=1e-9, steps=1, start=start)
    assert torch.equal(found[:, :2], exact[:, :2])
    assert (left[:2] < 1e-9).all()
    assert left[2] > 1e-3  # one step is not enough, and is said not to be


def test_any_preconditioner_gives_the_solution():
    scale, right = torch.rand(15, 2) + 0.5, torch.randn(15, 2)
    for inverse in (1 / scale, torch.ones(15, 2), torch.rand(15, 2) + 0.1):
        found, _ = conjugate_gradients(lambda x: scale * x, right, tolerance=1e-4, steps=100, inverse=inverse)
        torch.testing.assert_close(found, right / scale, rtol=1e-2, atol=5e-3)


def test_nothing_on_the_right_is_solved_by_nothing():
    found, left = conjugate_gradients(lambda x: 2 * x, torch.zeros(4, 2), tolerance=1e-3, steps=10)
    assert not found.any()
    assert not left.any()


def counted(matrix):
    """The product with a matrix in the type of its argument, and the types that it was called with."""
    calls = []

    def times(values):
        calls.append(values.dtype)
        return matrix.to(values.dtype) @ values

    return times, calls


def test_refinement_reaches_float64_with_most_products_in_float32():
    matrix, right = system(200, 0.01)
    times, calls = counted(matrix)
    found, left = refined(times, right, start=torch.zeros_like(right), tolerance=1e-12, steps=500)
    assert deviation(found, matrix, right) < 1e-9
    assert (left <= 1e-12).all()
    assert calls.count(torch.float64) < 8
    assert calls.count(torch.float32) > 20


def test_refinement_goes_on_in_float64_where_float32_is_too_coarse():
    matrix, right = system(60, 0.01)
    matrix = matrix / float(torch.linalg.eigvalsh(matrix)[-1])
    calls = []

    def times(values):
        calls.append(values.dtype)
        return values.clone() if values.dtype == torch.float32 else matrix @ values  # all is lost in float32

    found, left = refined(times, right, start=torch.zeros_like(right), tolerance=1e-9, steps=3000)
    assert (left <= 1e-9).all()
    assert deviation(found, matrix, right) < 1e-6
    assert calls.count(torch.float64) > 20 > calls.count(torch.float32)
