"""Ridge, least squares and the lasso by products with the masks' Gram matrix, without its decomposition.

For ridge, generalised cross-validation takes the squared error of each example at every penalty from its Lanczos
process, and the degrees of freedom from stochastic traces (Girard 1989), which all examples share.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coar.errors import RegressionError
from coar.regression.fit_plan import FitPlan
from coar.regression.iterative.operators import GramOperator, HeldGram, PackedGram, operator_of
from coar.regression.krylov import Lanczos, Ritz, conjugate_gradients, refined
from coar.regression.lasso import MARGIN, SparseFit, solve_sparse
from coar.regression.ridge import PENALTIES, LinearFit
from coar.regression.sums import FitBlock, Moments
from coar.store.records import FitLearned
from coar.store.run import Run

PROBE_STEPS, PROBE_CHECK = 96, 32  # of the Lanczos processes of random signs, and those between checks
ROUNDING = 1e-4  # share of a variance below which a difference of two is not trusted
RESOLVED = 0.02  # what a solution may leave of its right-hand side where a penalty is compared with others
PROBE_NUMBERS, LEAST_PROBES, MOST_PROBES = 2**18, 8, 128  # components x random signs, and columns of them
ZERO = 1e-7  # share of the largest eigenvalue below which others count as zero
CHECK = 4  # steps between checks
TOLERANCE, EXACT = 1e-5, 1e-8  # length of what a solution leaves of the right-hand side, as a share
STEPS, ACCEPTED = 1000, 1e-4  # of conjugate gradients after a full basis, and the share that they may leave


@dataclass(frozen=True)
class Traces:
    """Sums over the eigenvalues L of the centred Gram matrix, at each penalty.

    Attributes:
        grid: (penalties,) penalties.
        freedom: (penalties,) residual degrees of freedom: masks - 1 - the sum of L / (L + penalty); NaN for penalties
            so small that the processes have not reached the eigenvalues that matter.
        spread: (penalties,) sums of L / (L + penalty)^2.
        largest: The largest eigenvalue, from below.
        rank: Number of eigenvalues above zero.
    """

    grid: Tensor
    freedom: Tensor
    spread: Tensor
    largest: float
    rank: int

    @classmethod
    def of(cls, design: GramOperator, method: str) -> "Traces":
        """Estimate the sums by Lanczos processes of random signs, in the smaller of the two spaces of Xc.

        Raises:
            RegressionError: When masks are so close to the number of components that least squares is all noise.
        """
        live = (design.total > 0) & (design.total < design.count)
        number = int(live.sum())
        rank = min(design.count - 1, number)
        mean = float((design.total * (1 - design.total / design.count)).sum()) / rank
        grid = (PENALTIES.new_zeros(1) if method == "ols" else PENALTIES * mean).to(design.device)
        if design.count > number:
            process = Lanczos(design.times, _signs(len(live), design.device) * live[:, None], min(PROBE_STEPS, number))
        else:
            start = _signs(design.count, design.device)
            process = Lanczos(design.masks.kernel_times, start - start.mean(0), min(PROBE_STEPS, rank))
        while not process.full:
            process.step()
            if process.steps % PROBE_CHECK == 0 and (process.ritz().left(grid) <= RESOLVED).all():
                break
        ritz = process.ritz()
        values = ritz.values[..., None]
        there = (values > ZERO * values.max()).double()
        shrink = there / (values + grid).clamp_min(1e-300)
        known = ritz.sums(torch.cat([there, values], dim=2)), grid.new_tensor([rank, rank * mean])
        left_over, spread = (_controlled(ritz.sums(one), *known) for one in (grid * shrink, values * shrink**2))
        freedom = design.count - 1 - rank + left_over
        unresolved = (ritz.left(grid) > RESOLVED).any(0)
        if method == "ols" and unresolved.any():
            raise RegressionError(
                f"{design.count} masks are so few for least squares on {number} components that its errors are all "
                f"noise; collect {max(design.count, 3 * number // 2)} or more, or use ridge"
            )
        freedom[unresolved] = torch.nan
        return cls(grid, freedom, spread, float(ritz.values.max()), rank)


def _signs(size: int, device: torch.device) -> Tensor:
    """Return (size, columns) random signs, the same on all devices; for small sizes a basis, which is exact."""
    if size <= MOST_PROBES:
        return torch.eye(size, device=device) * math.sqrt(size)
    columns = min(max(PROBE_NUMBERS // size, LEAST_PROBES), MOST_PROBES)
    signs = torch.randint(0, 2, (size, columns), generator=torch.Generator().manual_seed(0))
    return (2.0 * signs - 1).to(device)


def _controlled(sums: Tensor, beside: Tensor, known: Tensor) -> Tensor:
    """Return the mean of (columns, penalties) sums, corrected by what sums of known means deviate from these.

    Args:
        sums: Unbiased estimates, one in each row.
        beside: (columns, controls) estimates from the same random signs.
        known: (controls,) their exact means.
    """
    scale = known.clamp_min(1e-300)
    centred = (beside - beside.mean(0)) / scale
    slope = torch.linalg.pinv(centred, rtol=1e-6) @ (sums - sums.mean(0))
    corrected: Tensor = sums.mean(0) + ((known - beside.mean(0)) / scale) @ slope
    return corrected


@dataclass
class Iterative:
    """Ridge or least squares by Lanczos processes; the masks are read again where the solver was sent.

    Attributes:
        plan: How to compute.
        method: `ridge` or `ols`.
        traces: Sums over eigenvalues, which all examples share.
    """

    plan: FitPlan
    method: str
    traces: Traces
    _design: PackedGram | HeldGram | None = field(default=None, repr=False)

    @classmethod
    def of(cls, run: Run, rows: np.ndarray, method: str, plan: FitPlan) -> "Iterative":
        """Read the masks and estimate traces.

        Raises:
            RegressionError: When the masks are all alike, or do not support least squares.
        """
        design = operator_of(run, rows, plan)
        live = int(((design.total > 0) & (design.total < design.count)).sum())
        if method == "ols" and (live < run.n_components or len(rows) < run.n_components + 2):
            raise RegressionError(
                f"least squares needs at least {run.n_components + 2} masks for {run.n_components} components, and "
                f"masks of full rank; {len(rows)} masks that vary {live} components were given: collect more, or use "
                f"ridge"
            )
        return cls(plan, method, Traces.of(design, method), design)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_design": None}

    def learned(self) -> FitLearned:
        """Return an empty record."""
        return FitLearned()

    def solve(self, block: FitBlock) -> LinearFit:
        """Fit a block of examples; raise `RegressionError` when one does not converge."""
        self._design = design = self._design or operator_of(block.run, block.rows, self.plan)
        moments = design.moments(block.examples)
        right = moments.centred(design.total)
        choice, residual, weight, left = self._by_lanczos(design, right, moments)
        penalty = self.traces.grid[choice]
        if self.method == "ols":  # without a penalty, small eigenvalues magnify what is left
            weight, left = refined(design.times, right, penalty, start=weight.double(), tolerance=EXACT, steps=STEPS)
        elif (left > TOLERANCE).any():
            weight, left = conjugate_gradients(
                design.times, right.float(), penalty, start=weight, tolerance=TOLERANCE, steps=STEPS
            )
        self._check(left, block)
        return self._fit(design, moments, residual, choice, weight.float())

    def _by_lanczos(
        self, design: GramOperator, right: Tensor, moments: Moments
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return each example's choice, its squared error, the weights, and what these leave of the moments."""
        process, choice = Lanczos(design.times, right.float(), min(self.plan.basis, len(right))), torch.empty(0)
        while True:
            process.step()
            if process.steps % CHECK and not process.full:
                continue
            ritz, before = process.ritz(), choice
            residual, choice = self._choose(ritz, moments)
            short, left = ritz.solution(self.traces.grid[choice])
            if process.full or (choice.equal(before) and bool((left <= TOLERANCE).all())):
                return choice, residual.gather(1, choice[:, None])[:, 0], process.combine(short), left

    def _choose(self, ritz: Ritz, moments: Moments) -> tuple[Tensor, Tensor]:
        """Return (examples, penalties) squared errors, and the (examples,) penalties of the lowest scores."""
        grid, values = self.traces.grid, ritz.values[..., None]
        shrink = 1 / (values + grid).clamp_min(1e-300)
        variation = moments.variation()[:, None]
        residual = variation - ritz.sums(shrink + grid * shrink**2)
        trusted = (ritz.left(grid) <= RESOLVED) & ~self.traces.freedom.isnan()
        if moments.count - 1 == self.traces.rank:  # weights can explain all, so the difference may be all rounding
            there = (values > ZERO * self.traces.largest).double()
            direct = ritz.sums(there / values.clamp_min(1e-300) * (grid * shrink) ** 2)
            rounded = residual <= ROUNDING * variation
            residual = residual.where(~rounded, direct)
            trusted &= ~rounded | (ritz.left(torch.zeros_like(grid[:1])) <= RESOLVED)
        residual = residual.clamp_min(0)
        score = residual / self.traces.freedom**2
        return residual, score.where(trusted, torch.inf).argmin(1)

    def _check(self, left: Tensor, block: FitBlock) -> None:
        worst = int(left.argmax())
        if not float(left[worst]) <= ACCEPTED:
            raise RegressionError(
                f"{self.method} did not converge for example {block.examples.start + worst} on {len(block.rows)} masks "
                f"({float(left[worst]):.1e} of its moments are left); collect more masks, or use ridge"
            )

    def _fit(
        self, design: GramOperator, moments: Moments, residual: Tensor, choice: Tensor, weight: Tensor
    ) -> LinearFit:
        share = design.total / design.count
        live = (share > 0) & (share < 1)
        noise = residual / self.traces.freedom[choice]
        error = (noise * self.traces.spread[choice] / live.sum()).sqrt()
        weight = weight.T
        intercept = moments.mean() - weight.double() @ share
        penalty = self.traces.grid[choice]
        spread = torch.where(live, error[:, None], 0)
        return LinearFit(weight.cpu(), intercept.cpu(), spread.float().cpu(), penalty.cpu())


@dataclass(frozen=True)
class CovarianceOperator:
    """The masks' covariance matrix as the lasso uses it.

    Attributes:
        design: The masks.
        largest: An upper bound of its largest eigenvalue.
    """

    design: GramOperator
    largest: float

    @property
    def total(self) -> Tensor:
        """(components,) numbers of masks that keep each component."""
        return self.design.total

    @property
    def count(self) -> int:
        """Number of masks."""
        return self.design.count

    def image(self, values: Tensor) -> Tensor:
        """Return the covariance matrix times (components, columns) values."""
        return self.design.times(values) / self.count


@dataclass
class IterativeSparse:
    """The lasso by products with the masks; the masks are read again where the solver was sent.

    Attributes:
        plan: How to compute.
        largest: An upper bound of the largest eigenvalue of the masks' covariance.
    """

    plan: FitPlan
    largest: float
    _design: PackedGram | HeldGram | None = field(default=None, repr=False)

    @classmethod
    def of(cls, run: Run, rows: np.ndarray, plan: FitPlan) -> "IterativeSparse":
        """Read the masks and bound their largest eigenvalue; raises as `operator_of` does."""
        design = operator_of(run, rows, plan)
        return cls(plan, Traces.of(design, "lasso").largest * MARGIN / design.count, design)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_design": None}

    def learned(self) -> FitLearned:
        """Return an empty record."""
        return FitLearned()

    def solve(self, block: FitBlock) -> SparseFit:
        """Fit a block of examples; raise `RegressionError` when one does not converge."""
        self._design = design = self._design or operator_of(block.run, block.rows, self.plan)
        covariance = CovarianceOperator(design, self.largest)
        with design.device:
            found = solve_sparse(covariance, design.moments(block.examples), first=block.examples.start)
        return SparseFit(found.weight.cpu(), found.intercept.cpu(), found.penalty.cpu())
