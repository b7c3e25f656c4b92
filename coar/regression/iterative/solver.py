"""Ridge and least squares by products with the masks' Gram matrix, without its decomposition.

For ridge, generalised cross-validation takes the squared error of each example at every penalty from its Lanczos
process, and the degrees of freedom from traces (see `traces`), which all examples share.
"""

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coar.errors import RegressionError
from coar.forward.memory_limit import readable
from coar.regression.fit_plan import FitPlan
from coar.regression.iterative.operators import GramOperator, HeldGram, PackedGram, operator_of
from coar.regression.iterative.traces import Traces
from coar.regression.krylov import Lanczos, Ritz, conjugate_gradients, refined
from coar.regression.ridge import LinearFit
from coar.regression.sums import FitBlock, Moments
from coar.store.records import FitLearned
from coar.store.run import Run

log = logging.getLogger(__name__)

CHECK = 4  # steps between checks
TOLERANCE, EXACT = 1e-5, 1e-8  # length of what a solution leaves of the right-hand side, as a share
STEPS, ACCEPTED = 1000, 1e-4  # of conjugate gradients after a full basis, and the share that they may leave


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
        choice, residual, weight, left = self._by_lanczos(design, right, moments, block)
        penalty = self.traces.grid[choice].float()
        if self.method == "ols":  # without a penalty, small eigenvalues magnify what is left
            weight, left = refined(design.times, right, start=weight.double(), tolerance=EXACT, steps=STEPS)
        elif (left > TOLERANCE).any():
            weight, left = conjugate_gradients(
                lambda values: design.times(values) + penalty * values,
                right.float(),
                start=weight,
                tolerance=TOLERANCE,
                steps=STEPS,
            )
        require_converged(self.method, left, block)
        return self._fit(design, moments, residual, choice, weight.float())

    def _by_lanczos(
        self, design: GramOperator, right: Tensor, moments: Moments, block: FitBlock
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return each example's choice, its squared error, the weights, and what these leave of the moments."""
        process, choice = Lanczos(design.times, right.float(), min(self.plan.basis, len(right))), right.new_empty(0)
        while True:
            process.step()
            if process.steps % CHECK and not process.full:
                continue
            ritz, before = process.ritz(), choice
            residual, choice, edge = self._choose(ritz, moments)
            short, left = ritz.solution(self.traces.grid[choice])
            if process.full or (choice.equal(before) and bool((left <= TOLERANCE).all())):
                if edge.any():
                    which = f"{int(edge.sum())} of the examples from {block.examples.start} on"
                    warn_at_edge(self.method, which, self.plan)
                return choice, residual.gather(1, choice[:, None])[:, 0], process.combine(short), left

    def _choose(self, ritz: Ritz, moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
        """Return (examples, penalties) squared errors, and (examples,) penalties of the lowest scores, and their edges.

        A penalty is at the edge if the next lower one is not resolved, so that it might be better.
        """
        residual, trusted = self.traces.errors(ritz, moments)
        score = residual / self.traces.freedom**2
        choice = score.where(trusted, torch.inf).argmin(1)
        below = trusted.gather(1, (choice - 1).clamp_min(0)[:, None])[:, 0]
        return residual, choice, (choice > 0) & ~below

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


def warn_at_edge(method: str, which: str, plan: FitPlan) -> None:
    """Log that a penalty is the least of those that could be compared."""
    log.warning(
        "%s: the penalty of %s is the least that conjugate gradients resolve, and a lower one might predict better; "
        "collect more masks, or decompose them, which takes a memory limit above %s",
        method,
        which,
        readable(plan.limit),
    )


def require_converged(method: str, left: Tensor, block: FitBlock) -> None:
    """Raise `RegressionError` when solutions leave too much of their (examples,) right-hand sides, as shares."""
    worst = int(left.argmax())
    if not float(left[worst]) <= ACCEPTED:
        number = range(block.run.n_examples)[block.examples][worst]
        raise RegressionError(
            f"{method} did not converge for example {number} on {len(block.rows)} masks "
            f"({float(left[worst]):.1e} of its moments are left); collect more masks, or use ridge"
        )
