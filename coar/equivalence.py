"""Whether two ways of computing the same numbers agree: one tolerance policy for all fast paths.

The difference of two results is the largest absolute difference relative to the largest absolute expected value. Two
ways may differ by `REORDERED` where they do the same arithmetic in another order, by `REFORMULATED` where they use
another formula for the same function, and in either case by a few roundings of the precision that they compute in.
NaN agrees with NaN at the same place and with nothing else.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees

from coar.components.table import Components

REORDERED = 1e-5  # the same arithmetic in another order or in other batches
REFORMULATED = 1e-3  # another formula: a gate in the weights instead of a hook, a folded batch norm
ROUNDINGS = 8  # roundings of the precision by which two ways may always differ
SMALLEST = 1e-6  # scale below which differences count as absolute


def allowed_difference(kind: float, precision: float) -> float:
    """Return the largest allowed difference.

    Args:
        kind: `REORDERED` or `REFORMULATED`.
        precision: Relative rounding error of the precision of the computation, see `rounding`.
    """
    return max(kind, ROUNDINGS * precision)


def rounding(model: nn.Module) -> float:
    """Return the relative rounding error of a model's coarsest floating-point parameter, 0 if there is none."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max((torch.finfo(kind).eps for kind in kinds), default=0.0)


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
    """Return how a fast pass differs from the plain one in words, and nothing where they agree.

    Args:
        model: The model.
        components: The components; their modules must receive and return tensors of the same sizes in both passes.
        plain: Runs the plain pass and returns numbers.
        fast: Runs the fast pass and returns the same numbers, up to rounding.
        axis_only: Compare sizes along the components' axis alone.
    """
    try:
        (expected, seen), (found, seen_fast) = (_recorded(model, components, run, axis_only) for run in (plain, fast))
    except Exception as failure:  # whatever a model may raise: the plain way does as well
        return f"the model fails: {failure}"
    if seen != seen_fast:
        return "components receive or return tensors of other sizes"
    error = difference(expected, found)
    if not error <= allowed_difference(REORDERED, rounding(model)):
        return f"outputs differ by {error:.1e} of the largest"
    return ""


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
