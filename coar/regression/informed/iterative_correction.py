"""The correction of an informed fit by products with the masks, without their decomposition.

With D for the diagonal matrix of the prior's columns and r for what the prior leaves of an example's outputs, the
correction is D v with

    (D Xc'Xc D + penalty) v = D Xc'r,

which conjugate gradients solve. The penalty is chosen as `correction` says: one Lanczos process per example gives the
squared error at every penalty, and random signs the degrees of freedom, which all examples share.

What masks leave of the error of a component needs the diagonal of H = (G + penalty)^-1 G, G = D Xc'Xc D. For
independent columns it is near its deterministic equivalent (Rubio and Mestre 2011, Statistics & Probability Letters 81)

    H_jj = s_j m / (1 + s_j m),    s_j = G_jj,

where the number m makes the sum over components that of the estimated trace of H.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coar.regression.fit_plan import FitPlan
from coar.regression.informed.correction import LEAST_FREEDOM, loose_enough, penalty_scores
from coar.regression.informed.prior import Prior, PriorWeights
from coar.regression.iterative.operators import Scaled, operator_of
from coar.regression.iterative.solver import CHECK, STEPS, TOLERANCE, require_converged, warn_at_edge
from coar.regression.iterative.traces import Traces
from coar.regression.krylov import Lanczos, conjugate_gradients
from coar.regression.sums import FitBlock, Moments
from coar.store.run import Run

SETTLED = 1e-3  # share by which a sum of scores may still fall within a few steps where penalties are compared
DECADE = 8  # penalties of the grid
HALVINGS = 60  # of the interval in which the logarithm of m lies


@dataclass
class IterativeCorrection:
    """The correction by conjugate gradients; the masks are read again where it was sent.

    Attributes:
        plan: How to compute.
        column: (components,) float64 root mean squares of the prior's weights.
        penalty: The ridge penalty.
        known: (components,) float64 diagonal of H, estimated.
        kept: (components,) float64 share of masks that keep each component.
    """

    plan: FitPlan
    column: Tensor
    penalty: float
    known: Tensor
    kept: Tensor
    _design: Scaled | None = field(default=None, repr=False)

    @classmethod
    def of(cls, block: FitBlock, prior: Prior, found: PriorWeights, plan: FitPlan) -> "IterativeCorrection":
        """Read the masks and choose the penalty.

        Args:
            block: At least two training masks, and the examples that the penalty is chosen on.
            prior: What mask gradients give.
            found: What it gives for these examples.
            plan: How to compute.

        Raises:
            RegressionError: When the masks are all alike.
        """
        column = prior.column.double()
        design = _design_of(block.run, block.rows, column, plan)
        traces = Traces.of(design, "ridge", least=LEAST_FREEDOM * design.count)
        choice = _choice(design, traces, column, block, found, plan)
        traced = design.count - 1 - float(traces.freedom[choice])
        known = shrinkage(design.squares(), traced).cpu()
        kept = (design.total / design.count).cpu()
        return cls(plan, column, float(traces.grid[choice]), known, kept, design)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_design": None}

    def apply(self, block: FitBlock, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return corrected (examples, components) weights, and the masks' (examples,) mean outputs.

        Raises:
            RegressionError: When an example does not converge.
        """
        if self._design is None:
            self._design = _design_of(block.run, block.rows, self.column, self.plan)
        design = self._design
        right, moments = _left_by(design, self.column, block.examples, weights)
        more, left = conjugate_gradients(
            lambda values: design.times(values) + self.penalty * values,
            right,
            tolerance=TOLERANCE,
            steps=STEPS,
        )
        require_converged("informed", left, block)
        mean = moments.mean().cpu() - weights.double() @ (1 - self.kept)
        return weights + (more.cpu() * self.column.float()[:, None]).T, mean

    def unknown(self) -> Tensor:
        """Return the (components,) share of the prior's squared error that the masks leave."""
        return (1 - self.known).float()

    def mean_mask(self) -> Tensor:
        """Return the (components,) share of masks that keep each component."""
        return self.kept


def shrinkage(squares: Tensor, traced: float) -> Tensor:
    """Return the (components,) deterministic equivalent of the diagonal of H, see above.

    Args:
        squares: s, the (components,) float64 diagonal of G.
        traced: The trace of H; at least 0, and less than the number of squares above 0.
    """
    unit = float(squares[squares > 0].mean())
    low, high = -40.0, 40.0  # of log m, in units of the mean square
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = _shrunk(squares, math.exp(middle) / unit)
        low, high = (middle, high) if float(found.sum()) < traced else (low, middle)
    return _shrunk(squares, math.exp(low) / unit)


def _shrunk(squares: Tensor, factor: float) -> Tensor:
    return squares * factor / (1 + squares * factor)


def _design_of(run: Run, rows: np.ndarray, column: Tensor, plan: FitPlan) -> Scaled:
    return Scaled(operator_of(run, rows, plan), column.to(plan.device))


def _left_by(design: Scaled, column: Tensor, examples: slice, weights: Tensor) -> tuple[Tensor, Moments]:
    """Return D Xc'r (components, examples) in float32, and the moments of r, up to a constant for each example.

    Args:
        design: The masks.
        column: (components,) the diagonal of D.
        examples: The examples.
        weights: Their (examples, components) weights, which leave r.
    """
    moments = design.moments(examples, weights.to(design.device))
    right = moments.centred(design.total).mul_(column.to(design.device)[:, None])
    return right.float(), moments


def _choice(design: Scaled, traces: Traces, column: Tensor, block: FitBlock, found: PriorWeights, plan: FitPlan) -> int:
    """Return the number of the penalty with the least sum of scores, among those whose scores have settled."""
    scores, trusted = torch.zeros_like(traces.grid), loose_enough(traces.freedom, design.count)
    numbers = range(block.run.n_examples)[block.examples]
    for start in range(0, len(numbers), plan.choosing):
        part = slice(start, start + plan.choosing)
        some = numbers[part]
        right, moments = _left_by(design, column, slice(some.start, some.stop, some.step), found.weights[part])
        process = Lanczos(design.times, right, min(plan.basis, len(right)))
        own, settled = _settled(process, traces, moments, found.spread[part].to(design.device), trusted)
        scores += own
        trusted &= settled
    choice = int(scores.where(trusted, torch.inf).argmin())
    considered = not traces.freedom[choice - 1] < LEAST_FREEDOM * design.count  # NaN where traces are not resolved
    if choice and considered and not trusted[choice - 1]:
        warn_at_edge("informed", "the correction by masks", plan)
    return choice


def _settled(
    process: Lanczos, traces: Traces, moments: Moments, spread: Tensor, loose: Tensor
) -> tuple[Tensor, Tensor]:
    """Run processes until the scores of the best penalty, and of those a decade below it, fall no more.

    Squared errors of a Lanczos process fall towards the true ones (Golub and Meurant 2010).

    Args:
        process: Lanczos processes of examples.
        traces: Traces at each penalty.
        moments: Moments of the examples.
        spread: (examples,) standard deviations of their outputs.
        loose: (penalties,) which may be chosen.

    Returns:
        (penalties,) sums of scores, and which of them have settled.
    """
    scores = torch.full_like(traces.grid, torch.inf)
    while True:
        process.step()
        if process.steps % CHECK and not process.full:
            continue
        residual, resolved = traces.errors(process.ritz(), moments)
        before, scores = scores, penalty_scores(residual, traces.freedom, spread)
        settled = before - scores <= SETTLED * scores
        if process.steps == len(moments.product):
            settled[:] = True
        best = int(scores.where(loose, torch.inf).argmin())
        if process.full or settled[max(best - DECADE, 0) :][loose[max(best - DECADE, 0) :]].all():
            return scores, settled & resolved.all(0)
