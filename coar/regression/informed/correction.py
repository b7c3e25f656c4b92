"""The correction of an informed fit: ridge on what the prior leaves of outputs, with one penalty for all examples.

Ridge is in units of the prior's columns: components whose weights are typically large may change more. A penalty per
example is too free when masks are far fewer than components: generalised cross-validation then takes
some examples' noise for signal. One penalty is chosen by the sum of its scores over the examples learned from.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coar.regression.informed.prior import Prior, PriorWeights
from coar.regression.ridge import PENALTIES, Spectrum, check_solvable, decompose_gram, decompose_kernel
from coar.regression.sums import FitBlock, Gram, batches

LEAST_FREEDOM = 0.5  # share of masks that are residual degrees of freedom; with less, noise is compared with noise


class Correction(Protocol):
    """How masks correct the prior's weights."""

    @property
    def penalty(self) -> float:
        """The ridge penalty, in units of the sum of squares of masks times columns."""
        ...

    def apply(self, block: FitBlock, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return corrected (examples, components) weights, and the masks' (examples,) mean outputs."""
        ...

    def unknown(self) -> Tensor:
        """Return the (components,) share of the prior's squared error that the masks leave."""
        ...

    def mean_mask(self) -> Tensor:
        """Return the (components,) share of masks that keep each component."""
        ...


@dataclass(frozen=True)
class DecomposedCorrection:
    """The correction from a decomposition of the masks.

    Attributes:
        column: (components,) float64 root mean squares of the prior's weights.
        spectrum: The decomposition of the masks, each component's entries times its column.
        left: (masks, rank) U of the kernel matrix; empty where the Gram matrix is decomposed.
        gram: The sums over masks; None where the kernel matrix is decomposed.
        penalty: The ridge penalty.
    """

    column: Tensor
    spectrum: Spectrum
    left: Tensor
    gram: Gram | None
    penalty: float

    @classmethod
    def of(
        cls, block: FitBlock, prior: Prior, found: PriorWeights, *, gram: Gram | None = None
    ) -> "DecomposedCorrection":
        """Decompose the masks and choose the penalty.

        Args:
            block: At least two training masks, and the examples that the penalty is chosen on.
            prior: What mask gradients give.
            found: What it gives for these examples.
            gram: The sums over these masks, where there are more of them than components and the sums are known.

        Raises:
            RegressionError: When the masks are all alike.
        """
        run, rows, column = block.run, block.rows, prior.column.double()
        if len(rows) <= run.n_components:
            x, gram = torch.from_numpy(run.masks_at(rows)), None
            spectrum, left = decompose_kernel(
                x.double() * column
            )  # scaled masks are no whole numbers, exact in float32
        else:
            gram = gram or Gram.of(run, rows)
            spectrum, left = decompose_gram(gram.scaled(column)), torch.empty(0)
        check_solvable(spectrum, "ridge")
        scores, variation, _ = cls(column, spectrum, left, gram, 0.0).scores(block, found.weights)
        return cls(column, spectrum, left, gram, _penalty(spectrum, scores, variation, found.spread))

    def scores(self, block: FitBlock, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return U'R (rank, examples), sums of squares and (examples,) mean outputs; R is what the weights leave."""
        w = weights.double().T  # (components, examples)
        if self.gram is None:
            parts = list(batches(block.run, block.rows, block.examples))
            y = torch.cat([part for _, part in parts]).double()
            residual = y - torch.cat([x[:, :-1] for x, _ in parts]).double() @ w
            residual -= residual.mean(0)
            return self.left.T @ residual, (residual**2).sum(0), y.mean(0)
        moments = block.moments()
        product, centred = moments.centred(self.gram.total), self.gram.centred()
        image = centred @ w
        variation = moments.variation() - 2 * (w * product).sum(0) + (w * image).sum(0)
        scores = self.spectrum.basis.T @ ((product - image) * self.column[:, None])
        return scores / self.spectrum.eigenvalues[:, None], variation.clamp_min(0), moments.mean()

    def apply(self, block: FitBlock, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return corrected (examples, components) weights, and the masks' (examples,) mean outputs."""
        scores, _, mean = self.scores(block, weights)
        shrink = 1 / (self.spectrum.eigenvalues + self.penalty)
        more = (self.spectrum.basis @ (scores * shrink[:, None])).T * self.column
        return weights + more.float(), mean

    def unknown(self) -> Tensor:
        """Return the (components,) share of the prior's squared error that the masks leave."""
        known = self.spectrum.basis**2 @ (1 / (self.spectrum.eigenvalues + self.penalty))
        return (1 - known).clamp(0, 1).float()

    def mean_mask(self) -> Tensor:
        """Return the (components,) share of masks that keep each component."""
        return self.spectrum.mean / self.column


def _penalty(spectrum: Spectrum, scores: Tensor, variation: Tensor, spread: Tensor) -> float:
    """Return the penalty that minimises the sum of generalised cross-validation scores over examples.

    Args:
        spectrum: The masks' decomposition.
        scores: U'R (rank, examples).
        variation: (examples,) sums of squared residuals.
        spread: (examples,) standard deviations of the outputs, the unit of each example's score.
    """
    grid = PENALTIES * spectrum.eigenvalues.mean()
    left_over = grid / (spectrum.eigenvalues[:, None] + grid)
    freedom = spectrum.count - 1 - (1 - left_over).sum(0)
    loose = loose_enough(freedom, spectrum.count)
    grid, left_over, freedom = grid[loose], left_over[:, loose], freedom[loose]
    residual = (variation[:, None] - scores.T**2 @ (1 - left_over**2)).clamp_min(0)
    return float(grid[penalty_scores(residual, freedom, spread).argmin()])


def loose_enough(freedom: Tensor, count: int) -> Tensor:
    """Return which penalties may be chosen: those far from interpolation, and always the largest.

    Args:
        freedom: (penalties,) residual degrees of freedom, of penalties in ascending order.
        count: Number of masks.
    """
    loose = freedom >= LEAST_FREEDOM * count
    loose[-1] = True  # with two masks no other one is
    return loose


def penalty_scores(residual: Tensor, freedom: Tensor, spread: Tensor) -> Tensor:
    """Return the (penalties,) sums over examples of generalised cross-validation scores.

    Args:
        residual: (examples, penalties) sums of squared residuals.
        freedom: (penalties,) residual degrees of freedom.
        spread: (examples,) standard deviations of the outputs, the unit of each example's score.
    """
    return (residual / freedom**2 / spread.double()[:, None] ** 2).sum(0)
