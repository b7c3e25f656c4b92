"""Least squares and ridge, from one eigendecomposition that all examples share.

For centred masks Xc (masks, components) and centred outputs yc of one example, ridge minimises
||yc - Xc w||^2 + penalty ||w||^2. With the decomposition Xc = U sqrt(L) Q',

    w = Q sqrt(L) / (L + penalty) U'yc.

With more masks than components the decomposition is that of the Gram matrix Xc'Xc (components, components), otherwise
that of the kernel matrix Xc Xc' (masks, masks): `decompose_gram` with `solve_gram`, `decompose_kernel` with
`solve_kernel`. The penalty of each example minimises the score of generalised cross-validation (Golub, Heath and Wahba
1979, Technometrics 21)

    ||yc - Xc w(penalty)||^2 / (masks - 1 - sum_i L_i / (L_i + penalty))^2,

where 1 is for the intercept. Least squares is the penalty 0.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coar.errors import RegressionError
from coar.regression.sums import FitBlock, Gram, Moments
from coar.store.records import FitLearned
from coar.store.run import Run

PENALTIES = torch.logspace(-4, 4, 65, dtype=torch.float64)  # in units of the Gram matrix's mean eigenvalue
RANK = 1e-10  # share of the largest eigenvalue below which others count as zero


@dataclass(frozen=True)
class Spectrum:
    """The singular values and vectors of the centred masks: Xc = U sqrt(L) Q'.

    Attributes:
        eigenvalues: L, the (rank,) eigenvalues above zero.
        basis: Xc'U = Q sqrt(L), (components, rank).
        mean: (components,) share of masks that keep each component.
        count: Number of masks.
    """

    eigenvalues: Tensor
    basis: Tensor
    mean: Tensor
    count: int


@dataclass(frozen=True)
class LinearFit:
    """One linear model per example.

    Attributes:
        weight: (examples, components).
        intercept: (examples,), the prediction with all components ablated.
        standard_error: (examples, components), for independent errors of equal variance; for ridge they measure how
            much the weights vary from one draw of masks to another, not the bias by the penalty.
        penalty: (examples,) ridge penalty in units of the sum of squares, 0 for least squares.
    """

    weight: Tensor
    intercept: Tensor
    standard_error: Tensor
    penalty: Tensor


@dataclass(frozen=True)
class FromMoments:
    """Ridge or least squares for more masks than components.

    Attributes:
        spectrum: The masks' decomposition.
        total: (components,) number of masks that keep each component.
        method: As for `solve`.
    """

    spectrum: Spectrum
    total: Tensor
    method: str

    @classmethod
    def of(cls, gram: Gram, method: str) -> "FromMoments":
        """Decompose the Gram matrix; raises as `check_solvable` does."""
        spectrum = decompose_gram(gram)
        check_solvable(spectrum, method)
        return cls(spectrum, gram.total, method)

    def learned(self) -> FitLearned:
        """Return an empty record."""
        return FitLearned()

    def solve(self, block: FitBlock) -> LinearFit:
        """Fit a block of examples."""
        return solve_gram(self.spectrum, self.total, block.moments(), method=self.method)


@dataclass(frozen=True)
class FromOutputs:
    """Ridge for no more masks than components.

    Attributes:
        spectrum: The masks' decomposition.
        left: (masks, rank) U, whose transpose maps centred outputs to scores.
        method: As for `solve`.
    """

    spectrum: Spectrum
    left: Tensor
    method: str

    @classmethod
    def of(cls, run: Run, rows: np.ndarray, method: str) -> "FromOutputs":
        """Read the masks and decompose their kernel matrix; raises as `check_solvable` does."""
        spectrum, left = decompose_kernel(torch.from_numpy(run.masks_at(rows)).float())
        check_solvable(spectrum, method)
        return cls(spectrum, left, method)

    def learned(self) -> FitLearned:
        """Return an empty record."""
        return FitLearned()

    def solve(self, block: FitBlock) -> LinearFit:
        """Read the outputs of a block of examples and fit them."""
        outputs = torch.from_numpy(block.run.outputs_at(block.rows, block.examples))
        return solve_kernel(self.spectrum, self.left, outputs, method=self.method)


def decompose_gram(gram: Gram) -> Spectrum:
    """Decompose the (components, components) centred Gram matrix: for more masks than components."""
    values, vectors = torch.linalg.eigh(gram.centred())
    kept = values > max(RANK * float(values[-1]), RANK)
    return Spectrum(values[kept], vectors[:, kept] * values[kept].sqrt(), gram.total / gram.count, gram.count)


def scores_gram(spectrum: Spectrum, total: Tensor, moments: Moments) -> Tensor:
    """Return U'Yc (rank, examples) from X'Y and the (components,) column sums of X."""
    return (spectrum.basis.T @ moments.centred(total)) / spectrum.eigenvalues[:, None]


def solve_gram(spectrum: Spectrum, total: Tensor, moments: Moments, *, method: str) -> LinearFit:
    """Solve for the examples of some moments, after `decompose_gram`; raises as `solve` does.

    Args:
        spectrum: The masks' decomposition.
        total: (components,) column sums of the masks.
        moments: Sums over masks and outputs of the examples.
        method: As for `solve`.
    """
    scores = scores_gram(spectrum, total, moments)
    return solve(spectrum, scores, moments.mean(), moments.variation(), method=method)


def decompose_kernel(masks: Tensor) -> tuple[Spectrum, Tensor]:
    """Decompose the centred kernel matrix of (masks, components) masks: for no more masks than components.

    Returns:
        The spectrum, and U (masks, rank), whose transpose maps centred outputs to scores.
    """
    mean = masks.mean(0, dtype=torch.float64)
    row = masks.double() @ mean
    kernel = (masks @ masks.T).double() - row[:, None] - row[None, :] + mean @ mean
    values, vectors = torch.linalg.eigh(kernel)
    kept = values > max(RANK * float(values[-1]), RANK)
    left = vectors[:, kept]
    basis = masks.T.double() @ left - torch.outer(mean, left.sum(0))
    return Spectrum(values[kept], basis, mean, len(masks)), left


def solve_kernel(spectrum: Spectrum, left: Tensor, outputs: Tensor, *, method: str) -> LinearFit:
    """Solve for (masks, examples) outputs, after `decompose_kernel`, which gives `left`; raises as `solve` does."""
    centred = outputs.double()
    mean = centred.mean(0)
    centred -= mean
    return solve(spectrum, left.T @ centred, mean, (centred**2).sum(0), method=method)


def check_solvable(spectrum: Spectrum, method: str) -> None:
    """Raise `RegressionError` when the masks do not support a fit by a method, for any outputs."""
    rank, components = len(spectrum.eigenvalues), len(spectrum.mean)
    if not rank:
        raise RegressionError(
            f"the {spectrum.count} masks are all alike, so no effect can be fitted; collect more, or ablate more"
        )
    if method == "ols" and (rank < components or spectrum.count < components + 2):
        raise RegressionError(
            f"least squares needs at least {components + 2} masks for {components} components, and masks of full rank; "
            f"{spectrum.count} masks of rank {rank} were given: collect more, or use ridge"
        )


def solve(spectrum: Spectrum, scores: Tensor, mean: Tensor, variation: Tensor, *, method: str) -> LinearFit:
    """Solve for a block of examples.

    Args:
        spectrum: The masks' decomposition.
        scores: U'Yc (rank, examples).
        mean: (examples,) mean outputs.
        variation: (examples,) sums of squared deviations of the outputs.
        method: `ols`, or `ridge` with the penalty per example that minimises the generalised cross-validation score
            (Golub, Heath and Wahba 1979).

    Raises:
        RegressionError: When the masks do not determine the fit, see `check_solvable`.
    """
    check_solvable(spectrum, method)
    values = spectrum.eigenvalues
    grid = torch.zeros(1, dtype=torch.float64) if method == "ols" else PENALTIES * values.mean()
    left_over = grid / (values[:, None] + grid)  # (rank, penalties)
    freedom = spectrum.count - 1 - (1 - left_over).sum(0)  # (penalties,)
    residual = variation[:, None] - scores.T**2 @ (1 - left_over**2)  # (examples, penalties)
    residual = residual.clamp_min(0)
    best = (residual / freedom**2).argmin(1)  # (examples,)
    shrink = 1 / (values[:, None] + grid)  # (rank, penalties)
    weight = (spectrum.basis @ (scores * shrink[:, best])).T
    noise = residual.gather(1, best[:, None])[:, 0] / freedom[best]
    spread = spectrum.basis**2 @ shrink**2  # (components, penalties)
    standard_error = (spread[:, best] * noise).sqrt().T
    return LinearFit(weight, mean - weight @ spectrum.mean, standard_error, grid[best])
