"""A prediction of the harm that strengths of ablation do to references, and the step of least harm."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PIVOTS = 40  # of the active set, at most
EMPHASIS = 3.0  # of the mean change over references, as against the changes of single ones


class Harm(NamedTuple):
    """The harm |A d + r|^2 + sum of q (s + d)^2 of a step d from strengths s.

    Attributes:
        gradients: (rows, components) A.
        values: (rows,) r.
        spread: (components,) q.
    """

    gradients: Tensor
    values: Tensor
    spread: Tensor


class HarmModel:
    """Predicts the change of each reference's output at strengths s as c + g . s, and the harm by their squares.

    The gradients g are those of the last measurement that gave any, and c makes the prediction exact at the last
    measurement.

    There are many more components than references, so strengths can be found that change none of these references by
    prediction, and yet change all others. The mean square of g . s over all others is s' M s with a second moment M of
    which that of the references is a poor estimate. It is shrunk towards its diagonal, by the share that minimises the
    expected squared error (Ledoit and Wolf 2003, Schaefer and Strimmer 2005).

    Args:
        gradients: (references, components) gradients of the outputs by the strengths, at zero strength.
        weights: (references,) factors by which changes count.
    """

    def __init__(self, gradients: Tensor, weights: Tensor) -> None:
        self._gradients, self._weights = gradients.clone(), weights
        self._offsets = gradients.new_zeros(len(gradients))
        self._shrinkage = shrinkage(gradients * weights[:, None])

    def correct(self, strengths: Tensor, changes: Tensor, rows: Tensor, gradients: Tensor) -> None:
        """Take over what was measured at strengths: (references,) changes, and (rows, components) gradients of some."""
        self._gradients[rows] = gradients
        self._offsets = changes - self._gradients @ strengths
        self._shrinkage = shrinkage(self._gradients * self._weights[:, None])

    def weigh(self, factor: float) -> None:
        """Let all changes count more by a factor."""
        self._weights = self._weights * factor

    def at(self, strengths: Tensor) -> Harm:
        """Return the harm of a step from (components,) strengths.

        It is the mean square of the weighted changes, of which a share is that of independent components, and
        `EMPHASIS` squared times the square of their mean.
        """
        share, n = self._shrinkage, len(self._weights)
        weighted = self._gradients * self._weights[:, None]
        values = (self._offsets + self._gradients @ strengths) * self._weights
        scale = ((1 - share) / n) ** 0.5
        return Harm(
            torch.cat([scale * weighted, EMPHASIS * weighted.mean(0, keepdim=True)]),
            torch.cat([scale * values, EMPHASIS * values.mean()[None]]),
            share * weighted.square().mean(0),
        )


def shrinkage(rows: Tensor) -> float:
    """Return the share between 0 and 1 of its diagonal that is mixed into the second moment of rows.

    With M the mean of x x' over the n rows x, the share is the sum of Var(M_ij) over i != j, divided by that of M_ij^2;
    Var(M_ij) = (mean of x_i^2 x_j^2 - M_ij^2) / (n - 1).

    Args:
        rows: (n, components) rows, at least 2.
    """
    x, n = rows.double(), len(rows)
    gram, diagonal = x @ x.T, x.square().mean(0)
    squares = gram.square().sum() / n**2 - diagonal.square().sum()
    products = (gram.diagonal().square().sum() - x.pow(4).sum()) / n
    if not squares > 0:
        return 1.0
    return float(((products - squares) / (n - 1) / squares).clamp(0, 1))


def least_harm(strengths: Tensor, required: tuple[Tensor, Tensor], harms: Sequence[Harm]) -> Tensor:
    """Return the strengths from 0 to 1 that reach what is required with the least harm, by linear models of both.

    The step d minimises |d|^2 and the harms, such that C d = f and that no strength leaves its range. Which strengths
    are at an end of it is found by the primal-dual active set method (Hintermueller, Ito and Kunisch 2002).

    Args:
        strengths: (components,) present strengths s.
        required: (targets, components) C and (targets,) f.
        harms: What adds up to the harm.
    """
    constraints, changes = (part.double() for part in required)
    gradients = torch.cat([harm.gradients for harm in harms]).double()
    values = torch.cat([harm.values for harm in harms]).double()
    now, spread = strengths.double(), torch.stack([harm.spread for harm in harms]).sum(0).double()
    scale = (1 + spread).rsqrt()  # |d|^2 + sum of q (s + d)^2 is |u|^2 and a constant for d = scale u + start
    start = -spread * now / (1 + spread)
    changes, values = changes - constraints @ start, values + gradients @ start
    constraints, gradients = constraints * scale, gradients * scale
    least, most = (-now - start) / scale, (1 - now - start) / scale
    lower = upper = torch.zeros_like(now, dtype=torch.bool)
    for _ in range(PIVOTS):
        step = torch.where(lower, least, torch.where(upper, most, 0.0))
        free = ~(lower | upper)
        rest = changes - constraints @ step, values + gradients @ step
        step[free], multipliers = _step(constraints[:, free], rest[0], gradients[:, free], rest[1])
        slope = step + gradients.T @ (gradients @ step + values) - constraints.T @ multipliers
        below = (free & (step < least)) | (lower & (slope > 0))
        above = (free & (step > most)) | (upper & (slope < 0))
        if torch.equal(below, lower) and torch.equal(above, upper):
            break
        lower, upper = below, above
    return (now + start + scale * step).clamp(0, 1).to(strengths.dtype)


def _step(constraints: Tensor, changes: Tensor, gradients: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the step without limits, and its multipliers; I + A^T A is inverted by Woodbury's identity."""
    small = torch.eye(len(gradients), dtype=gradients.dtype, device=gradients.device) + gradients @ gradients.T
    solved = torch.linalg.solve(small, torch.cat([gradients @ constraints.T, values[:, None]], dim=1))
    towards, back = constraints.T - gradients.T @ solved[:, :-1], gradients.T @ solved[:, -1]
    multipliers = torch.linalg.lstsq(constraints @ towards, changes + constraints @ back).solution
    return towards @ multipliers - back, multipliers
