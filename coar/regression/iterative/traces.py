"""Traces of the masks' centred Gram matrix, and squared errors, at every penalty without its decomposition.

The traces are stochastic (Girard 1989): means over random signs, corrected by traces that are known exactly.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coar.errors import RegressionError
from coar.regression.iterative.operators import GramOperator
from coar.regression.krylov import Lanczos, Ritz
from coar.regression.ridge import PENALTIES
from coar.regression.sums import Moments

PROBE_STEPS, PROBE_CHECK = 96, 8  # of the Lanczos processes of random signs, and those between checks
LARGEST_STEPS = 64  # which give the largest eigenvalue to less than 1 %
ROUNDING = 1e-4  # share of a variance below which a difference of two is not trusted
RESOLVED = 0.02  # what a solution may leave of its right-hand side where a penalty is compared with others
PROBE_NUMBERS, LEAST_PROBES, MOST_PROBES = 2**18, 8, 128  # components x random signs, and columns of them
LOOSE_NUMBERS = 2**16  # where the scores of many examples are added up, which have these traces in common
ZERO = 1e-7  # share of the largest eigenvalue below which others count as zero


@dataclass(frozen=True)
class Traces:
    """Sums over the eigenvalues L of the centred Gram matrix, at each penalty.

    Attributes:
        grid: (penalties,) penalties.
        freedom: (penalties,) residual degrees of freedom: masks - 1 - the sum of L / (L + penalty); NaN for penalties
            so small that the processes have not reached the eigenvalues that matter, if they are considered.
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
    def of(cls, design: GramOperator, method: str, *, least: float = 0.0) -> "Traces":
        """Estimate the sums by Lanczos processes of random signs, in the smaller of the two spaces of Xc.

        Args:
            design: The masks.
            method: `ols` for the penalty 0, else a grid of penalties.
            least: Degrees of freedom that a penalty must leave to be considered.

        Raises:
            RegressionError: When masks are so close to the number of components that least squares is all noise.
        """
        number = int(_live(design).sum())
        rank = min(design.count - 1, number)
        mean = float(design.squares().sum()) / rank
        grid = (PENALTIES.new_zeros(1) if method == "ols" else PENALTIES * mean).to(design.device)
        process = _processes(design, LOOSE_NUMBERS if least else PROBE_NUMBERS, PROBE_STEPS)
        while True:
            process.step()
            if process.steps % PROBE_CHECK and not process.full:
                continue
            ritz = process.ritz()
            values = ritz.values[..., None]
            there = (values > ZERO * values.max()).double()
            shrink = there / (values + grid).clamp_min(1e-300)
            wanted = design.count - 1 - rank + ritz.sums(grid * shrink).mean(0) >= least
            if process.full or (ritz.left(grid)[:, wanted] <= RESOLVED).all():
                break
        known = ritz.sums(torch.cat([there, values], dim=2)), grid.new_tensor([rank, rank * mean])
        left_over, spread = (_controlled(ritz.sums(one), *known) for one in (grid * shrink, values * shrink**2))
        freedom = design.count - 1 - rank + left_over
        unresolved = (ritz.left(grid) > RESOLVED).any(0)
        if method == "ols" and unresolved.any():
            raise RegressionError(
                f"{design.count} masks are so few for least squares on {number} components that its errors are all "
                f"noise; collect {max(design.count, 3 * number // 2)} or more, or use ridge"
            )
        freedom[unresolved & (freedom >= least)] = torch.nan
        return cls(grid, freedom, spread, float(ritz.values.max()), rank)

    def errors(self, ritz: Ritz, moments: Moments) -> tuple[Tensor, Tensor]:
        """Return (examples, penalties) squared errors of examples' outputs, and which of them are resolved.

        Args:
            ritz: What the Lanczos processes give that start from the examples' centred moments.
            moments: Their moments.
        """
        grid, values = self.grid, ritz.values[..., None]
        shrink = 1 / (values + grid).clamp_min(1e-300)
        variation = moments.variation()[:, None]
        residual = variation - ritz.sums(shrink + grid * shrink**2)
        trusted = (ritz.left(grid) <= RESOLVED) & ~self.freedom.isnan()
        if moments.count - 1 == self.rank:  # weights can explain all, so the difference may be all rounding
            there = (values > ZERO * self.largest).double()
            direct = ritz.sums(there / values.clamp_min(1e-300) * (grid * shrink) ** 2)
            rounded = residual <= ROUNDING * variation
            residual = residual.where(~rounded, direct)
            trusted &= ~rounded | (ritz.left(torch.zeros_like(grid[:1])) <= RESOLVED)
        return residual.clamp_min(0), trusted


def largest_eigenvalue(design: GramOperator) -> float:
    """Return the largest eigenvalue of the centred Gram matrix, from below, from Lanczos processes of random signs."""
    process = _processes(design, 0, LARGEST_STEPS)
    while not process.full:
        process.step()
    return float(process.ritz().values.max())


def _live(design: GramOperator) -> Tensor:
    """Return (components,) whether masks differ in a component."""
    return (design.total > 0) & (design.total < design.count)


def _processes(design: GramOperator, numbers: int, steps: int) -> Lanczos:
    """Return Lanczos processes of random signs in the smaller of the two spaces of Xc."""
    live = _live(design)
    number = int(live.sum())
    if design.count > number:
        return Lanczos(design.times, _signs(len(live), numbers, design.device) * live[:, None], min(steps, number))
    start = _signs(design.count, numbers, design.device)
    return Lanczos(design.kernel_times, start - start.mean(0), min(steps, design.count - 1, number))


def _signs(size: int, numbers: int, device: torch.device) -> Tensor:
    """Return (size, columns) random signs, the same on all devices; for small sizes a basis, which is exact."""
    if size <= MOST_PROBES:
        return torch.eye(size, device=device) * math.sqrt(size)
    signs = torch.randint(0, 2, (size, _columns(size, numbers)), generator=torch.Generator().manual_seed(0))
    return (2.0 * signs - 1).to(device)


def _columns(size: int, numbers: int) -> int:
    return min(max(numbers // size, LEAST_PROBES), MOST_PROBES)


def probe_bytes(masks: int, components: int, numbers: int = PROBE_NUMBERS) -> int:
    """Return the bytes that estimating the traces takes, at most, besides the masks."""
    size = min(masks, components)
    beside = 2 * components if masks <= components else 0  # images of the signs, in the other space
    return 4 * _columns(size, numbers) * (size * (min(PROBE_STEPS, size) + 6) + beside)


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
