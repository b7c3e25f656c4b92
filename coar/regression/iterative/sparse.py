"""The lasso by products with the masks, without the matrix of all their covariances.

Few weights of an example are not zero. On a CPU the problems of an example with packed masks are therefore solved over
a working set of components, from the matrix of their covariances. Components outside whose covariance with the residual
exceeds the penalty join the set, until the duality gap over all components is within the tolerance (as in celer:
Massias, Gramfort and Salmon 2018). So a problem takes a few products with all masks, however many steps it takes.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coar.regression.fit_plan import FitPlan
from coar.regression.iterative.operators import GramOperator, HeldGram, PackedGram, operator_of
from coar.regression.iterative.traces import largest_eigenvalue
from coar.regression.lasso import MARGIN, Covariance, Design, SparseFit, duality_gap, minimise, solve_sparse
from coar.regression.sums import FitBlock
from coar.store.records import FitLearned
from coar.store.run import Run

NEAR = 0.7  # share of the penalty from which on a covariance with the residual lets a component in, if there is room
SHARE = 0.95  # of the duality gap that components in the set may take
ROUNDS = 20  # of one problem, at most


class CovarianceOperator(Covariance):
    """The masks' covariance matrix as the lasso uses it.

    Args:
        design: The masks.
        largest: An upper bound of its largest eigenvalue.
    """

    def __init__(self, design: GramOperator, largest: float) -> None:
        self.largest, self.total, self.count = largest, design.total, design.count
        self._design = design

    def image(self, values: Tensor) -> Tensor:
        """Return the covariance matrix times (components, columns) values."""
        return self._design.times(values) / self.count


class WorkingSet(CovarianceOperator):
    """The same for one example, whose problems are solved over the components that can have weights.

    Args:
        design: The masks.
        largest: An upper bound of the covariance's largest eigenvalue.
        most: Components in the set, at most; a problem that needs more is solved over all.
    """

    def __init__(self, design: PackedGram, largest: float, most: int) -> None:
        super().__init__(design, largest)
        self._packed, self._most = design, most
        self._some: Tensor | None = None
        self._small: Design | None = None

    def minimise(
        self, target: Tensor, *, penalty: Tensor, start: Tensor, tolerance: float, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Minimise as the function of this name does, for the (components, 1) covariances of one example."""
        weight, product = start, self.image(start) if start.any() else torch.zeros_like(start)
        for _ in range(ROUNDS):
            if (duality_gap(target, weight, product, penalty) <= tolerance).all():
                return weight, product
            small = self._chosen(weight[:, 0] != 0, (target - product)[:, 0].abs() / penalty)
            if small is None:
                break
            part, before = target[self._some], weight[self._some]
            found, _ = minimise(small, part, penalty=penalty, start=before, tolerance=SHARE * tolerance, labels=labels)
            weight = torch.zeros_like(target)
            weight[self._some] = found
            product = self.image(weight)
        return minimise(self, target, penalty=penalty, start=weight, tolerance=tolerance, labels=labels)

    def refined(self, target: Tensor, *, weight: Tensor, product: Tensor, penalty: Tensor) -> Tensor:
        """Return the exact solution as the function of this name does, from the covariances of the set."""
        if self._small is None or (weight != 0).sum() > (weight[self._some] != 0).sum():
            return super().refined(target, weight=weight, product=product, penalty=penalty)
        some, exact = self._some, torch.zeros_like(weight)
        exact[some] = self._small.refined(target[some], weight=weight[some], product=product[some], penalty=penalty)
        return exact

    def _chosen(self, there: Tensor, slope: Tensor) -> Design | None:
        """Choose the set; return its covariances, or None where it would be empty or has no room for others.

        Args:
            there: (components,) which components have weights.
            slope: (components,) sizes of their covariances with the residual, as shares of the penalty.
        """
        needed = there | (slope >= 1)
        if self._some is not None and needed.sum() == needed[self._some].sum():
            return self._small
        if not needed.any() or there.sum() >= self._most:
            return None
        order = torch.where(there, torch.inf, slope)
        many = min(int((order >= NEAR).sum()), self._most)
        self._some = order.topk(many).indices.sort().values
        self._small = Design.of(self._packed.gram_of(self._some), largest=self.largest)  # for steps of the same length
        return self._small


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
        return cls(plan, largest_eigenvalue(design) * MARGIN / design.count, design)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_design": None}

    def learned(self) -> FitLearned:
        """Return an empty record."""
        return FitLearned()

    def solve(self, block: FitBlock) -> SparseFit:
        """Fit a block of examples; raise `RegressionError` when one does not converge."""
        self._design = design = self._design or operator_of(block.run, block.rows, self.plan)
        with design.device:
            moments, first = design.moments(block.examples), block.examples.start
            if isinstance(design, HeldGram) or not self.plan.working:
                parts = [solve_sparse(CovarianceOperator(design, self.largest), moments, first=first)]
            else:
                parts = [
                    solve_sparse(
                        WorkingSet(design, self.largest, self.plan.working), moments[slice(i, i + 1)], first=first + i
                    )
                    for i in range(len(moments.square))
                ]
            return SparseFit.joined(parts)
