"""Whether a quick way of passing examples through a model may stand for the plain one."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees

from coar.components import Components
from coar.devices import rounding

TOLERANCE, ROUNDINGS = 1e-5, 8  # of the largest number, or roundings of the model's precision, if that is more


def difference(
    model: nn.Module,
    components: Components,
    plain: Callable[[], Tensor],
    quick: Callable[[], Tensor],
    *,
    along: bool = False,
) -> str:
    """Return in what a quick way of passing differs from the plain one, or nothing where it may stand for it.

    Args:
        model: The model.
        components: The components; their modules must be given and return as much in both passes.
        plain: Passes, and returns numbers.
        quick: Passes in the other way, and returns numbers that shall be the same but for the model's rounding.
        along: Compare sizes along the components' axis alone.
    """
    try:
        (expected, seen), (found, seen_quick) = (_noting(model, components, one, along) for one in (plain, quick))
    except Exception as error:  # whatever a model may raise: the plain way does as well
        return f"the model fails: {error}"
    if seen != seen_quick:
        return "components are given or return other sizes"
    tolerance = max(TOLERANCE, ROUNDINGS * rounding(model)) * float(expected.nan_to_num(0, 0, 0).abs().max())
    if found.shape == expected.shape and torch.allclose(
        found, expected.to(found), rtol=0, atol=tolerance, equal_nan=True
    ):
        return ""
    return "the model gives other numbers"


def _noting(
    model: nn.Module, components: Components, run: Callable[[], Tensor], along: bool
) -> tuple[Tensor, list[list[torch.Size | int]]]:
    """Return what a pass returns, and the shapes of all that gated modules are given and return in it, call by call."""
    seen: list[list[torch.Size | int]] = []

    def see(axis: int, _module: nn.Module, *passed: Any) -> None:
        tensors = [one for one in trees.tree_leaves(passed) if isinstance(one, Tensor)]
        if along:
            seen.append([one.shape[axis] for one in tensors if -one.ndim <= axis < one.ndim])
        else:
            seen.append([one.shape for one in tensors])

    with ExitStack() as stack:
        for site, side, axis in components.sites():
            if side != "parameter":
                module = model.get_submodule(site)
                stack.callback(module.register_forward_hook(partial(see, axis), with_kwargs=True).remove)
        with torch.no_grad():
            return run(), seen
