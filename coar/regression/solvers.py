"""The solver of each method: what it prepares once for all examples, and how it solves a block of them."""

from dataclasses import dataclass
from typing import Protocol

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
from coar.store.records import FitLearned
from coar.store.run import Run

METHODS = {  # the arrays of a fit by its method
    "ridge": ("weight", "intercept", "standard_error", "penalty"),
    "ols": ("weight", "intercept", "standard_error", "penalty"),
    "lasso": ("weight", "intercept", "penalty"),
    "informed": ("weight", "intercept", "standard_error"),
}


class Solver(Protocol):
    """What all examples of a fit share, and the solution of a block of examples from it."""

    def learned(self) -> FitLearned:
        """Return what was learned for all examples."""
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

    def learned(self) -> FitLearned:
        """Return an empty record."""
        return FitLearned()

    def solve(self, block: FitBlock) -> LinearFit:
        """Fit a block of examples."""
        return solve_gram(self.spectrum, self.total, block.moments(), method=self.method)


@dataclass(frozen=True)
class FromOutputs:
    """Ridge for no more masks than components."""

    spectrum: Spectrum
    left: Tensor  # (masks, rank)
    method: str

    def learned(self) -> FitLearned:
        """Return an empty record."""
        return FitLearned()

    def solve(self, block: FitBlock) -> LinearFit:
        """Read the outputs of a block of examples and fit them."""
        outputs = torch.from_numpy(block.run.outputs_at(block.rows, block.examples))
        return solve_kernel(self.spectrum, self.left, outputs, method=self.method)


@dataclass(frozen=True)
class Sparse:
    """Lasso.

    The (components, components) Gram matrix is used for few masks too: all examples share it, and a product with it
    costs no more than two products with the masks, unless there are fewer masks than half the number of components.
    """

    design: Design

    def learned(self) -> FitLearned:
        """Return an empty record."""
        return FitLearned()

    def solve(self, block: FitBlock) -> SparseFit:
        """Fit a block of examples."""
        return solve_sparse(self.design, block.moments(), first=block.examples.start)


def takes_moments(method: str, masks: int, components: int) -> bool:
    """Return whether a method fits this number of masks from their Gram matrix and the examples' moments."""
    return method == "lasso" or masks > components


def solver_of(run: Run, rows: np.ndarray, rounds: int, *, method: str, gram: Gram | None = None) -> Solver:
    """Prepare what all examples of a fit share.

    Args:
        run: A complete run.
        rows: Row numbers of the training masks to use; may be empty for `informed`.
        rounds: How many rounds of mask gradients to use.
        method: One of `METHODS`.
        gram: The sums over these masks; by default they are made here if the method uses them.

    Raises:
        RegressionError: When the masks or the mask gradients do not support the fit, or it does not fit into memory.
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
