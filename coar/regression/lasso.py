"""The lasso for many examples at once, from the sums that ridge uses: sparse attributions.

For centred masks Xc and centred outputs yc of one example, the lasso (Tibshirani 1996) minimises

    ||yc - Xc w||^2 / (2 masks) + penalty sum_j |w_j|.

The path of penalties starts at the smallest one at which all weights are zero and goes down. Each problem is solved
until its duality gap, an upper bound on the distance of the objective from its minimum, is small. An example's penalty
minimises generalised cross-validation with the number of nonzero weights as degrees of freedom (Zou, Hastie and
Tibshirani 2007).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coar.errors import RegressionError
from coar.regression.sums import FitBlock, Gram, Moments
from coar.store.records import FitLearned

PATH = torch.logspace(0, -3, 30, dtype=torch.float64)  # penalties, as shares of the first, which zeroes all weights
PATIENCE = 5  # penalties without a better score after which an example's path ends
PATH_TOLERANCE = 1e-4  # duality gap as a share of the outputs' mean square; scikit-learn's default
TOLERANCE = 1e-7  # the same at the chosen penalty
STEPS = 20_000
REFINEMENTS, REFINED = 100, 1e-12  # steps of conjugate gradients, and the share of the squared error that ends them
CHECK = 5  # steps between computations of the duality gap
POWER_STEPS, MARGIN = 100, 1.02  # this many steps give the eigenvalues of masks to 1 %


class Covariance(ABC):
    """The covariance matrix of the masks, as a matrix or as an operator.

    Attributes:
        largest: Its largest eigenvalue, or up to 2 % more.
        total: (components,) number of masks that keep each component.
        count: Number of masks.
    """

    largest: float
    total: Tensor
    count: int

    @abstractmethod
    def image(self, values: Tensor) -> Tensor:
        """Return the matrix times (components, columns) values, in their type."""

    def minimise(
        self, target: Tensor, *, penalty: Tensor, start: Tensor, tolerance: float, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Minimise as the function of this name does."""
        return minimise(self, target, penalty=penalty, start=start, tolerance=tolerance, labels=labels)

    def refined(self, target: Tensor, *, weight: Tensor, product: Tensor, penalty: Tensor) -> Tensor:
        """Return the exact solution as the function of this name does."""
        return refined(self, target, weight=weight, product=product, penalty=penalty)


@dataclass
class Design(Covariance):
    """Sums over the masks that the lasso uses.

    Attributes:
        covariance: (components, components) float64, the centred Gram matrix divided by the number of masks.
        single: The same in float32.
        largest: Its largest eigenvalue, or up to 2 % more.
        total: (components,) number of masks that keep each component.
        count: Number of masks.
    """

    covariance: Tensor
    single: Tensor
    largest: float
    total: Tensor
    count: int

    def image(self, values: Tensor) -> Tensor:
        """Return the covariance matrix times (components, columns) values, in their type."""
        matrix = self.single if values.dtype == torch.float32 else self.covariance
        return (values.T.contiguous() @ matrix).T.contiguous()  # it is symmetric, and few columns are slow on a CPU

    @classmethod
    def of(cls, gram: Gram, *, largest: float | None = None) -> "Design":
        """Centre the Gram matrix and find its largest eigenvalue, unless an upper bound of it is given.

        Raises:
            RegressionError: When all masks are alike.
        """
        covariance = gram.product * gram.count
        covariance.addr_(gram.total, gram.total, alpha=-1)  # whole numbers up to here, so exact
        covariance.div_(gram.count**2)
        if not covariance.any():
            raise RegressionError(
                f"the {gram.count} masks are all alike, so no effect can be fitted; collect more, or ablate more"
            )
        single = covariance.float()
        return cls(covariance, single, largest or largest_eigenvalue(single), gram.total, gram.count)


@dataclass(frozen=True)
class SparseFit:
    """One sparse linear model per example.

    Attributes:
        weight: (examples, components), many of them zero.
        intercept: (examples,), the prediction with all components ablated.
        penalty: (examples,) factor of the sum of the weights' magnitudes, in addition to half the mean squared error:
            the `alpha` of scikit-learn's Lasso.
    """

    weight: Tensor
    intercept: Tensor
    penalty: Tensor

    @staticmethod
    def joined(parts: "Sequence[SparseFit]") -> "SparseFit":
        """Return the fit of the examples of several fits, on the CPU."""
        columns = zip(*((part.weight, part.intercept, part.penalty) for part in parts), strict=True)
        return SparseFit(*(torch.cat([part.cpu() for part in column]) for column in columns))


@dataclass(frozen=True)
class Sparse:
    """Lasso.

    The (components, components) Gram matrix is used for few masks too: all examples share it, and a product with it
    costs no more than two products with the masks, unless there are fewer masks than half the number of components.

    Attributes:
        design: Sums over the masks.
    """

    design: Design

    def learned(self) -> FitLearned:
        """Return an empty record."""
        return FitLearned()

    def solve(self, block: FitBlock) -> SparseFit:
        """Fit a block of examples."""
        return solve_sparse(self.design, block.moments(), first=block.examples.start)


def largest_eigenvalue(matrix: Tensor) -> float:
    """Return the largest eigenvalue of a positive semidefinite matrix by the power method, times a margin.

    If the result were still too small, steps would be too long, and the duality gap would not close.
    """
    vector = torch.rand(len(matrix), dtype=matrix.dtype, generator=torch.Generator().manual_seed(0), device="cpu")
    vector = vector.to(matrix.device)
    for _ in range(POWER_STEPS):
        vector = vector / vector.norm()
        vector = matrix @ vector
    return float(vector.norm()) * MARGIN


def solve_sparse(design: Covariance, moments: Moments, *, first: int) -> SparseFit:
    """Solve for the examples of some moments, of which the first has this number; raises as `solve` does."""
    product = moments.centred(design.total)
    return solve(design, product, mean=moments.mean(), variation=moments.variation(), first=first)


def solve(design: Covariance, product: Tensor, *, mean: Tensor, variation: Tensor, first: int = 0) -> SparseFit:
    """Solve for a block of examples, each with the penalty of the lowest generalised cross-validation score.

    The path of penalties is followed in float32 to `PATH_TOLERANCE`. At the chosen penalty the weights are taken to
    `TOLERANCE` in float64, and from there to the exact solution.

    Args:
        design: Sums over the masks.
        product: (components, examples) float64 products of centred masks and centred outputs.
        mean: (examples,) mean outputs.
        variation: (examples,) sums of squared deviations of the outputs.
        first: The block's first example, for messages.

    Raises:
        RegressionError: When an example does not converge.
    """
    spread = (variation / design.count).sqrt()  # (examples,)
    spread[spread <= torch.finfo(torch.float32).eps * mean.abs()] = 0  # constant, but for the rounding of float32
    target = (product / design.count / spread).where(spread > 0, 0)  # as if every output had a mean square of 1
    labels = torch.arange(first, first + len(mean))
    penalty, weight = follow(design, target, labels=labels)
    weight, product = design.minimise(target, penalty=penalty, start=weight, tolerance=TOLERANCE, labels=labels)
    weight = (design.refined(target, weight=weight, product=product, penalty=penalty) * spread).T
    return SparseFit(weight, mean - weight @ (design.total / design.count), penalty * spread)


def follow(design: Covariance, target: Tensor, *, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Follow every example's path from the least penalty that leaves no weight down, each solved from the one before.

    An example's path ends when its score has not improved for `PATIENCE` penalties. At smaller penalties the number of
    weights approaches that of masks, where the score means little and the problem converges slowly.

    Args:
        design: Sums over the masks.
        target: (components, examples) float64 covariances of masks and outputs of mean square 1.
        labels: (examples,) numbers of the examples, for messages.

    Returns:
        (examples,) penalties of the lowest score and (components, examples) weights there, in float64.
    """
    highest = target.abs().amax(0)  # (examples,)
    highest[highest == 0] = 1  # all weights are zero at any penalty
    single, going = target.float(), torch.arange(len(labels))
    weight, chosen = torch.zeros_like(single), torch.zeros_like(target)
    penalty, best = highest.clone(), torch.full_like(highest, torch.inf)
    behind = torch.zeros(len(labels), dtype=torch.int64)  # penalties since the best score
    for share in PATH:
        at = share * highest[going]
        goal = single[:, going]
        weight, product = design.minimise(
            goal, penalty=at, start=weight, tolerance=PATH_TOLERANCE, labels=labels[going]
        )
        score = cross_validation_score(residual(goal, weight, product), (weight != 0).sum(0), design.count)
        better = score < best[going]
        hit = going[better]
        best[hit], penalty[hit], chosen[:, hit] = score[better], at[better], weight[:, better].double()
        behind = torch.where(better, 0, behind + 1)
        kept = behind < PATIENCE
        going, weight, behind = going[kept], weight[:, kept], behind[kept]
        if not len(going):
            break
    return penalty, chosen


def cross_validation_score(left_over: Tensor, nonzero: Tensor, count: int) -> Tensor:
    """Return the generalised cross-validation score (Golub, Heath and Wahba 1979); infinite without degrees of freedom.

    The degrees of freedom are the number of nonzero weights (Zou, Hastie and Tibshirani 2007), plus one for the
    intercept. The squared error is known only to `PATH_TOLERANCE`. Errors below that count as equal, so the fit with
    the fewest weights has the lowest score.

    Args:
        left_over: (examples,) mean squared errors as shares of the outputs' mean square.
        nonzero: (examples,) numbers of weights that are not zero.
        count: Number of masks.
    """
    freedom = 1 - (nonzero + 1) / count
    return (left_over.clamp_min(PATH_TOLERANCE) / freedom**2).where(freedom > 0, torch.inf)


def residual(target: Tensor, weight: Tensor, product: Tensor) -> Tensor:
    """Return (examples,) mean squared errors, in float64: 1 - 2 w'c + w'Gw where `product` is Gw."""
    return 1 + (weight * (product - 2 * target)).sum(0, dtype=torch.float64)


def duality_gap(target: Tensor, weight: Tensor, product: Tensor, penalty: Tensor) -> Tensor:
    """Return (examples,) upper bounds on the distance of objectives from their minimum, in float64.

    The dual point is the residual, scaled until no component's covariance with it exceeds the penalty (Kim, Koh,
    Lustig, Boyd and Gorinevsky 2007).
    """
    square = residual(target, weight, product)
    along = 1 - (weight * target).sum(0, dtype=torch.float64)  # outputs times residuals
    steepest = (target - product).abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.minimum(penalty / steepest, along / square.clamp_min(torch.finfo(torch.float32).tiny))
    magnitude = weight.abs().sum(0, dtype=torch.float64)
    return square / 2 + penalty * magnitude - scale * along + scale**2 * square / 2


def minimise(
    design: Covariance, target: Tensor, *, penalty: Tensor, start: Tensor, tolerance: float, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Minimise w'Gw / 2 - w'c + penalty |w| for every example by FISTA (Beck and Teboulle 2009).

    Momentum restarts where it points uphill (O'Donoghue and Candes 2015), for each example. Gw is updated with the
    momentum, so that a step takes one matrix product and the duality gap none. An example is finished when its gap is
    within the tolerance.

    Args:
        design: Sums over the masks; G is the covariance matrix.
        target: c, (components, examples) covariances of masks and outputs of mean square 1.
        penalty: (examples,) float64.
        start: (components, examples) weights to start from.
        tolerance: The largest duality gap.
        labels: (examples,) numbers of the examples, for messages.

    Returns:
        (components, examples) weights w, and Gw.

    Raises:
        RegressionError: When an example's gap is not within the tolerance after `STEPS` steps.
    """
    weight, product, step = torch.empty_like(start), torch.empty_like(start), 1 / design.largest
    going, threshold = torch.arange(len(labels)), penalty.to(target.dtype) * step
    now, ahead = start, start  # the weights, and the weights extrapolated by momentum
    gram_now = gram_ahead = design.image(start)
    pace = torch.ones_like(threshold)
    for number in range(STEPS):
        if number % CHECK == 1:
            far = ~(duality_gap(target, now, gram_now, penalty) <= tolerance)  # a NaN counts as far
            done = going[~far]
            weight[:, done], product[:, done] = now[:, ~far], gram_now[:, ~far]
            if not far.any():
                return weight, product
            if len(done):
                going, penalty, threshold, pace = (values[far] for values in (going, penalty, threshold, pace))
                target, now, ahead, gram_now, gram_ahead = (
                    values[:, far] for values in (target, now, ahead, gram_now, gram_ahead)
                )
        raw = ahead + step * (target - gram_ahead)
        new = raw - raw.clamp(-threshold, threshold)
        gram_new, moved = design.image(new), new - now
        uphill = ((ahead - new) * moved).sum(0) > 0
        faster = torch.where(uphill, 1, (1 + (1 + 4 * pace**2).sqrt()) / 2)
        momentum = torch.where(uphill, 0, (pace - 1) / faster)
        ahead, gram_ahead = new + momentum * moved, gram_new + momentum * (gram_new - gram_now)
        now, gram_now, pace = new, gram_new, faster
    raise RegressionError(
        f"lasso did not converge for example {int(labels[going[0]])} within {STEPS} steps on {design.count} masks; "
        f"collect more masks, or use ridge"
    )


def refined(design: Covariance, target: Tensor, *, weight: Tensor, product: Tensor, penalty: Tensor) -> Tensor:
    """Return the solution of every example for the weights that are not zero and their signs, by conjugate gradients.

    Conjugate gradients solve the linear systems of all examples at once, to rounding error in few steps. If a weight
    should be zero or has the wrong sign, the result has the larger duality gap, and the weights are left unchanged.

    Args:
        design: Sums over the masks.
        target: (components, examples) float64 covariances of masks and outputs of mean square 1.
        weight: (components, examples) weights that are nearly the solution.
        product: The covariance of the masks times `weight`.
        penalty: (examples,) penalties.
    """
    tiny = torch.finfo(torch.float64).tiny
    there, exact = weight != 0, weight.clone()
    left = (target - penalty * weight.sign() - product).where(there, 0)
    along, square = left, (left**2).sum(0)
    enough = REFINED * square
    for _ in range(REFINEMENTS):
        if (square <= enough).all():
            break
        image = (design.image(along)).where(there, 0)
        pace = square / (along * image).sum(0).clamp_min(tiny)
        exact, left = exact + pace * along, left - pace * image
        now = (left**2).sum(0)
        along, square = left + now / square.clamp_min(tiny) * along, now
    before = duality_gap(target, weight, product, penalty)
    after = duality_gap(target, exact, design.image(exact), penalty)
    return exact.where(after < before, weight)
