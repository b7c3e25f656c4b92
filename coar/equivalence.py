"""Agreement of two ways of computing the same numbers: one tolerance policy for all fast paths.

The difference of two results is the largest absolute difference relative to the largest absolute expected value. A
`Kind` names why two ways may differ, and allows a difference; in any case a few roundings of the precision that they
compute in are allowed. NaN agrees with NaN at the same place and with nothing else. A fast path that does not agree is
given up for the slow one, and a `Fallback` says which and why.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees

from coar.components.table import Components

log = logging.getLogger(__name__)

ROUNDINGS = 8  # roundings of the precision by which two ways may always differ
SMALLEST = 1e-6  # scale below which differences count as absolute


class Kind(StrEnum):
    """Why two ways of computing the same numbers may differ."""

    REORDERED = "reordered"  # the same arithmetic in another order or in other batches
    REFORMULATED = "reformulated"  # another formula: a gate in the weights instead of a hook, a folded batch norm
    RECOMPUTED = "recomputed"  # the same masks and examples by another execution plan, or on another machine


ALLOWED = {Kind.REORDERED: 1e-5, Kind.REFORMULATED: 1e-3, Kind.RECOMPUTED: 1e-3}


@dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison.

    Attributes:
        error: The difference, see `difference`.
        allowed: The largest allowed difference.
    """

    error: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is allowed; NaN never is."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"differ by {self.error:.1e} of the largest, and {self.allowed:.1g} is allowed"


def compare(
    expected: Tensor | np.ndarray, found: Tensor | np.ndarray, kind: Kind, *, precision: float = 0.0
) -> Comparison:
    """Compare two results.

    Args:
        expected: What the slower or older way gives.
        found: What the other way gives.
        kind: Why they may differ.
        precision: Relative rounding error of the precision of the computation, see `rounding`; 0 for float32.
    """
    return Comparison(difference(expected, found), allowed_difference(kind, precision))


def allowed_difference(kind: Kind, precision: float) -> float:
    """Return the largest allowed difference for a kind and a relative rounding error."""
    return max(ALLOWED[kind], ROUNDINGS * precision)


def rounding(model: nn.Module) -> float:
    """Return the relative rounding error of a model's coarsest floating-point parameter, 0 if there is none."""
    kinds = {torch.finfo(parameter.dtype) for parameter in model.parameters() if parameter.is_floating_point()}
    return max((kind.eps for kind in kinds if kind.bits >= 16), default=0.0)  # no computation is in 8 bits


def difference(expected: Tensor | np.ndarray, found: Tensor | np.ndarray) -> float:
    """Return max |found - expected| / max |expected|; infinite where shapes, NaNs or infinities differ."""
    parts = (torch.tensor(part) if isinstance(part, np.ndarray) else part.detach() for part in (expected, found))
    a, b = (part.double().cpu() for part in parts)
    if a.shape != b.shape:
        return float("inf")
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(0), b[~finite].nan_to_num(0)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    return float((b - a)[finite].abs().max() / a[finite].abs().max().clamp_min(SMALLEST))


def compare_passes(
    model: nn.Module,
    components: Components,
    plain: Callable[[], Tensor],
    fast: Callable[[], Tensor],
    *,
    axis_only: bool = False,
) -> str:
    """Return in words how a fast pass differs from the plain one, or "" where they agree.

    Args:
        model: The model.
        components: The components; their modules must receive and return tensors of the same sizes in both passes.
        plain: Runs the plain pass and returns numbers.
        fast: Runs the fast pass and returns the same numbers, up to rounding.
        axis_only: Compare sizes along the components' axis alone.
    """
    try:
        (expected, seen), (found, seen_fast) = (_recorded(model, components, run, axis_only) for run in (plain, fast))
    except Exception as failure:  # whatever a model may raise: the plain pass stays
        return f"the model fails: {failure}"
    if seen != seen_fast:
        return "components receive or return tensors of other sizes"
    compared = compare(expected, found, Kind.REORDERED, precision=rounding(model))
    return "" if compared.agrees else f"outputs {compared}"


def _recorded(
    model: nn.Module, components: Components, run: Callable[[], Tensor], axis_only: bool
) -> tuple[Tensor, list[list[torch.Size | int]]]:
    """Return what a pass returns, and the sizes of the tensors of the components' modules, call by call."""
    seen: list[list[torch.Size | int]] = []

    def record(axis: int, _module: nn.Module, *passed: Any) -> None:
        tensors = [leaf for leaf in trees.tree_leaves(passed) if isinstance(leaf, Tensor)]
        if axis_only:
            seen.append([leaf.shape[axis] for leaf in tensors if -leaf.ndim <= axis < leaf.ndim])
        else:
            seen.append([leaf.shape for leaf in tensors])

    with ExitStack() as stack:
        for site, side, axis in components.sites():
            if side != "parameter":
                module = model.get_submodule(site)
                stack.callback(module.register_forward_hook(partial(record, axis), with_kwargs=True).remove)
        with torch.no_grad():
            return run(), seen


@dataclass(frozen=True)
class Fallback:
    """A fast path that is given up for the slow one.

    Attributes:
        path: The fast path, a noun phrase.
        reason: Why it is not used.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} is not used: {self.reason}"


def fall_back(path: str, reason: str, *, level: int = logging.INFO) -> Fallback:
    """Return and log a fallback."""
    found = Fallback(path, reason)
    log.log(level, "%s", found)
    return found


class FastPath:
    """A fast path of one runner: unchecked at first, then confirmed or given up for good.

    Args:
        name: What it is, a noun phrase.

    Attributes:
        name: The same.
        confirmed: Whether it was found to agree with the slow path.
        fallback: Why it is given up; None as long as it is not.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.confirmed = False
        self.fallback: Fallback | None = None

    def settle(self, reason: str) -> bool:
        """Confirm the path where there is no reason against it, else give it up; return whether it may be used."""
        self.confirmed = not reason
        if reason:
            self.fallback = fall_back(self.name, reason)
        return self.confirmed
