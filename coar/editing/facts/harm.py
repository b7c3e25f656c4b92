"""A linear prediction of how strengths of ablation change the outputs of references, corrected by measurements."""

import torch
from torch import Tensor

PIVOTS = 40  # of the active set, at most
EMPHASIS = 3.0  # of the mean change over references, as against the changes of single ones


class HarmModel:
    """Predicts the change of each reference's output at strengths s as c + g . s.

    The gradients g are those of the last measurement that gave any, and c makes the prediction exact at the last
    measurement.

    Args:
        gradients: (references, components) gradients of the outputs by the strengths, at zero strength.
    """

    def __init__(self, gradients: Tensor) -> None:
        self._gradients = gradients.clone()
        self._offsets = gradients.new_zeros(len(gradients))

    def correct(self, strengths: Tensor, changes: Tensor, rows: Tensor, gradients: Tensor) -> None:
        """Take over what was measured at strengths: (references,) changes, and (rows, components) gradients of some."""
        self._gradients[rows] = gradients
        self._offsets = changes - self._gradients @ strengths

    def rows(self, strengths: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the linear model of the harm, as (rows, components) gradients and (rows,) values at the strengths.

        The sum of squares of the rows is the mean square of the weighted changes, and `EMPHASIS` squared times the
        square of their mean.

        Args:
            strengths: (components,) strengths.
            weights: (references,) factors by which changes count.
        """
        n = len(weights)
        weighted = self._gradients * weights[:, None]
        values = (self._offsets + self._gradients @ strengths) * weights
        gradients = torch.cat([weighted / n**0.5, EMPHASIS * weighted.mean(0, keepdim=True)])
        return gradients, torch.cat([values / n**0.5, EMPHASIS * values.mean()[None]])


def least_harm(strengths: Tensor, required: tuple[Tensor, Tensor], harm: tuple[Tensor, Tensor]) -> Tensor:
    """Return the strengths from 0 to 1 that reach what is required with the least harm, by linear models of both.

    The step d minimises |d|^2 + |A d + r|^2 such that C d = f and that no strength leaves its range. Which strengths
    are at an end of it is found by the primal-dual active set method (Hintermueller, Ito and Kunisch 2002).

    Args:
        strengths: (components,) present strengths.
        required: (targets, components) C and (targets,) f.
        harm: (rows, components) A and (rows,) r.
    """
    constraints, changes = (part.double() for part in required)
    gradients, values = (part.double() for part in harm)
    now = strengths.double()
    lower = upper = torch.zeros_like(now, dtype=torch.bool)
    for _ in range(PIVOTS):
        step = torch.where(lower, -now, torch.where(upper, 1 - now, 0.0))
        free = ~(lower | upper)
        rest = changes - constraints @ step, values + gradients @ step
        step[free], multipliers = _step(constraints[:, free], rest[0], gradients[:, free], rest[1])
        slope = step + gradients.T @ (gradients @ step + values) - constraints.T @ multipliers
        below = (free & (now + step < 0)) | (lower & (slope > 0))
        above = (free & (now + step > 1)) | (upper & (slope < 0))
        if torch.equal(below, lower) and torch.equal(above, upper):
            break
        lower, upper = below, above
    return (now + step).clamp(0, 1).to(strengths.dtype)


def _step(constraints: Tensor, changes: Tensor, gradients: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the step without limits, and its multipliers; I + A^T A is inverted by Woodbury's identity."""
    small = torch.eye(len(gradients), dtype=gradients.dtype, device=gradients.device) + gradients @ gradients.T
    solved = torch.linalg.solve(small, torch.cat([gradients @ constraints.T, values[:, None]], dim=1))
    towards, back = constraints.T - gradients.T @ solved[:, :-1], gradients.T @ solved[:, -1]
    multipliers = torch.linalg.lstsq(constraints @ towards, changes + constraints @ back).solution
    return towards @ multipliers - back, multipliers
