"""Solvers: what a method prepares once for all examples, and how it then solves a block of them."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from coar.regression.informed.fit import Informed
from coar.regression.lasso import Design, SparseFit, check_memory, solve_sparse
from coar.regression.ridge import (
    LinearFit,
    Spectrum,
    check_solvable,
    decompose_gram,
    decompose_kernel,
    solve_gram,
    solve_kernel,
)
from coar.regression.sums import FitBlock, Gram
from coar.store.run import Run

METHODS = {  # and the arrays that their fits have
    "ridge": ("weight", "intercept", "standard_error", "penalty"),
    "ols": ("weight", "intercept", "standard_error", "penalty"),
    "lasso": ("weight", "intercept", "penalty"),
    "informed": ("weight", "intercept", "standard_error"),
}


class Solver(Protocol):
    """What all examples share, and how a block of them is solved with it."""

    def learned(self) -> dict[str, Any]:
        """Return what was learned for all examples, in plain numbers."""
        ...

    def solve(self, block: FitBlock) -> LinearFit | SparseFit:
        """Fit a block of examples."""
        ...


@dataclass(frozen=True)
class FromMoments:
    """Ridge or least squares for more masks than components."""

    spectrum: Spectrum
    total: Tensor  # (components,) number of masks that keep each
    method: str

    def learned(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def solve(self, block: FitBlock) -> LinearFit:
        """Fit a block of examples."""
        return solve_gram(self.spectrum, self.total, block.moments(), method=self.method)


@dataclass(frozen=True)
class FromOutputs:
    """Ridge for no more masks than components."""

    spectrum: Spectrum
    left: Tensor  # (masks, rank)
    method: str

    def learned(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def solve(self, block: FitBlock) -> LinearFit:
        """Read the outputs of a block of examples and fit them."""
        outputs = torch.from_numpy(block.run.outputs_at(block.rows, block.examples))
        return solve_kernel(self.spectrum, self.left, outputs, method=self.method)


@dataclass(frozen=True)
class Sparse:
    """Lasso.

    The (components, components) Gram matrix is used for few masks too: it serves all examples, and a product with it
    costs no more than two with the masks unless these are fewer than half as many as components.
    """

    design: Design

    def learned(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def solve(self, block: FitBlock) -> SparseFit:
        """Fit a block of examples."""
        return solve_sparse(self.design, block.moments(), first=block.examples.start)


def takes_moments(method: str, masks: int, components: int) -> bool:
    """Say whether a method fits so many masks from sums: their Gram matrix, and the examples' moments."""
    return method == "lasso" or masks > components


def solver_of(run: Run, rows: np.ndarray, rounds: int, *, method: str, gram: Gram | None = None) -> Solver:
    """Make what all examples of a fit share.

    Args:
        run: A complete run.
        rows: Row numbers of the training masks to use; may be empty for `informed`.
        rounds: How many rounds of mask gradients to use.
        method: One of `METHODS`.
        gram: The sums over these masks; by default they are made here where the method takes them.

    Raises:
        RegressionError: When the masks or the mask gradients do not support the fit, or this machine has no room for
            it.
    """
    if method == "informed":
        return Informed.of(run, rows, rounds, gram=gram)
    if method == "lasso":
        check_memory(run.n_components)
        return Sparse(Design.of(gram or Gram.of(run, rows)))
    if takes_moments(method, len(rows), run.n_components):
        gram = gram or Gram.of(run, rows)
        spectrum = decompose_gram(gram)
        check_solvable(spectrum, method)
        return FromMoments(spectrum, gram.total, method)
    spectrum, left = decompose_kernel(torch.from_numpy(run.masks_at(rows)).float())
    check_solvable(spectrum, method)
    return FromOutputs(spectrum, left, method)
