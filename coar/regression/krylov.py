"""Lanczos processes of many right-hand sides at once, and what they give for every ridge penalty.

For each column b, the Lanczos process (Lanczos 1950) makes an orthonormal basis V of b, Gb, GGb and so on, in which
the matrix G is a small tridiagonal matrix T. With T = S theta S', for any penalty (Golub and Meurant 2010)

    b' f(G) b = |b|^2 sum_i S_0i^2 f(theta_i)    and    (G + penalty)^-1 b = |b| V S (theta + penalty)^-1 S_0,

so one process serves all penalties. Traces of f(G) are means of such sums over random signs b (Hutchinson 1990).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

REFINED = 1e-4  # share of a right-hand side that a correction in float32 leaves
TINY = 1e-5  # share of the largest step below which a process ends: the basis is complete


class LanczosBasis:
    """Bases of Lanczos processes of several columns, each extended by its last vector's product with its matrix.

    Args:
        start: (components, columns) float32 right-hand sides.
        most: Vectors of a basis, at most.

    Attributes:
        norm: (columns,) float64 lengths of the right-hand sides.
        steps: Vectors of a basis so far.
    """

    def __init__(self, start: Tensor, most: int) -> None:
        self.norm = start.double().norm(dim=0)
        self._basis = start.new_empty(most + 1, *start.shape)
        self._basis[0] = start / self.norm.clamp_min(1e-300).to(start.dtype)
        self.steps = 0
        self._most = most
        self._diagonal: list[Tensor] = []
        self._beside: list[Tensor] = []

    @property
    def full(self) -> bool:
        """Whether the bases have as many vectors as they may."""
        return self.steps >= self._most

    @property
    def last(self) -> Tensor:
        """(components, columns) last vector of every basis, whose product with the matrix extends it."""
        return self._basis[self.steps]

    def extend(self, ahead: Tensor) -> None:
        """Add a vector to every basis, from the product of the matrix with the last ones, which is overwritten."""
        at, basis = self.steps, self._basis
        along = (ahead.double() * basis[at]).sum(0)
        for _ in range(2):
            for i in range(at + 1):
                ahead -= (ahead * basis[i]).sum(0) * basis[i]
        size = ahead.double().norm(dim=0)
        self._diagonal.append(along)
        scale = torch.stack(self._diagonal).abs().amax(0)
        ended = size <= TINY * scale
        size = torch.where(ended, 0, size)
        self._beside.append(size)
        basis[at + 1] = torch.where(ended, 0, ahead / size.clamp_min(1e-300).to(ahead.dtype))
        self.steps += 1

    def ritz(self) -> "Ritz":
        """Return the eigenvalues and eigenvectors of the small matrices."""
        size = self.steps
        table = self.norm.new_zeros(len(self.norm), size, size)
        at = torch.arange(size, device=table.device)
        table[:, at, at] = torch.stack(self._diagonal, dim=1)
        if size > 1:
            beside = torch.stack(self._beside[:-1], dim=1)
            table[:, at[1:], at[:-1]] = beside
            table[:, at[:-1], at[1:]] = beside
        values, vectors = torch.linalg.eigh(table)
        return Ritz(values.clamp_min(0), vectors, self.norm, self._beside[-1])

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return (components, columns) sums of basis vectors times (columns, vectors) coefficients."""
        out = torch.zeros_like(self._basis[0])
        for i, factors in enumerate(coefficients.T):
            out.addcmul_(self._basis[i], factors.to(out.dtype))
        return out


class Lanczos(LanczosBasis):
    """Lanczos processes of one matrix.

    Args:
        times: The product of the matrix with (components, columns) values.
        start: (components, columns) float32 right-hand sides.
        most: Vectors of a basis, at most.
    """

    def __init__(self, times: Callable[[Tensor], Tensor], start: Tensor, most: int) -> None:
        super().__init__(start, most)
        self._times = times

    def step(self) -> None:
        """Add a vector to every basis."""
        self.extend(self._times(self.last))


@dataclass(frozen=True)
class Ritz:
    """The matrix as the right-hand sides see it.

    Attributes:
        values: (columns, vectors) eigenvalues theta of the small matrices.
        vectors: (columns, vectors, vectors) their eigenvectors S, one in each column.
        norm: (columns,) lengths of the right-hand sides.
        beyond: (columns,) lengths of the next step, 0 where a basis is complete.
    """

    values: Tensor
    vectors: Tensor
    norm: Tensor
    beyond: Tensor

    @property
    def shares(self) -> Tensor:
        """(columns, vectors) shares of a right-hand side's square along the eigenvectors; they add up to 1."""
        return self.vectors[:, 0].square()

    def sums(self, function: Tensor) -> Tensor:
        """Return (columns, penalties) sums b' f(G) b from (columns, vectors, penalties) values of f(theta)."""
        return self.norm.square()[:, None] * torch.einsum("cv,cvp->cp", self.shares, function)

    def left(self, grid: Tensor) -> Tensor:
        """Return (columns, penalties) lengths of what solutions at (penalties,) penalties leave of b, as shares."""
        ends = self.vectors[:, 0] * self.vectors[:, -1]
        inverse = 1 / (self.values[..., None] + grid).clamp_min(1e-300)
        return self.beyond[:, None] * torch.einsum("cv,cvp->cp", ends, inverse).abs()

    def solution(self, penalty: Tensor) -> tuple[Tensor, Tensor]:
        """Return (columns, vectors) coefficients of (G + penalty)^-1 b, and what they leave of b, relative to it.

        Args:
            penalty: (columns,) penalties.
        """
        first = self.vectors[:, 0]
        seen = first.abs() > 1e-9
        inverse = torch.where(seen, first / (self.values + penalty[:, None]).clamp_min(1e-300), 0)
        short = torch.einsum("cvw,cw->cv", self.vectors, inverse)
        return short * self.norm[:, None], self.beyond * short[:, -1].abs()


def conjugate_gradients(
    times: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    tolerance: float,
    steps: int,
    start: Tensor | None = None,
    inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve A x = b for every column by conjugate gradients (Hestenes and Stiefel 1952).

    Args:
        times: The product with a positive definite matrix A.
        right: (components, columns) right-hand sides b.
        tolerance: Length of the residual, as a share of that of b, at which a column is solved.
        steps: Most steps.
        start: (components, columns) values to start from, which are changed in place; by default zeros.
        inverse: (components, columns) diagonal of a preconditioner P, near that of the inverse of A; the length of a
            vector v is then the root of v' P v.

    Returns:
        The solutions, and the (columns,) lengths of what they leave of b, as shares.
    """

    def steep(residual: Tensor) -> Tensor:
        return residual if inverse is None else inverse * residual

    size = (right.double() * steep(right)).sum(0).sqrt().clamp_min(1e-300)
    x = torch.zeros_like(right) if start is None else start
    left = right.clone() if start is None else right - times(start)
    along = steep(left).clone()
    square = (left.double() * along).sum(0)
    for _ in range(steps):
        solved = square.sqrt() <= tolerance * size
        if solved.all():
            break
        image = times(along)
        pace = square / (along.double() * image).sum(0).clamp_min(1e-300)
        pace = torch.where(solved, 0, pace).to(right.dtype)  # solved columns stay
        x.addcmul_(along, pace)
        left.addcmul_(image, -pace)
        down = steep(left)
        now = (left.double() * down).sum(0)
        along = down + (now / square.clamp_min(1e-300)).to(right.dtype) * along
        square = now
    return x, square.sqrt() / size


def refined(
    times: Callable[[Tensor], Tensor], right: Tensor, *, start: Tensor, tolerance: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Solve as `conjugate_gradients` does, in float64 with most products in float32.

    What a solution leaves is computed in float64, and the correction for it in float32, in turn (iterative refinement,
    Wilkinson 1963). Products in float32 take a third of the time.

    Args:
        times: The product with A, in the type of its argument.
        right: (components, columns) float64 right-hand sides b.
        start: (components, columns) float64 values to start from.
        tolerance: As for `conjugate_gradients`.
        steps: Most steps of one correction.

    Returns:
        As `conjugate_gradients`.
    """
    size = right.norm(dim=0).clamp_min(1e-300)
    left = right - times(start)
    share = left.norm(dim=0) / size
    while (worst := float(share.max())) > tolerance:
        unit, enough = left.norm(dim=0).clamp_min(1e-300), max(tolerance / worst / 2, REFINED)
        correction, _ = conjugate_gradients(times, (left / unit).float(), tolerance=enough, steps=steps)
        nearer = start + correction * unit
        rest = right - times(nearer)
        now = rest.norm(dim=0) / size
        if not float(now.max()) < worst / 2:  # float32 is too coarse for this matrix
            return conjugate_gradients(times, right, tolerance=tolerance, steps=steps, start=start)
        start, left, share = nearer, rest, now
    return start, share
