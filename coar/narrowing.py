"""Logits of language models only where an output reads them: the rest of a text needs no product with the vocabulary.

Causal language models of transformers take `logits_to_keep`, the positions that get logits, as (examples, positions).
"""

import inspect
import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees

from coar.batches import Batch
from coar.components import Components
from coar.devices import rounding
from coar.examples import UNREAD, Inputs
from coar.outputs import Output
from coar.outputs.base import find_logits

log = logging.getLogger(__name__)

ARGUMENT = "logits_to_keep"
WORTHWHILE = 0.75  # share of a text's positions, above which leaving out the others would save next to nothing
FEW = 2  # examples on which it is tried first
TOLERANCE, ROUNDINGS = 1e-5, 8  # of the largest number, or roundings of the model's precision, if that is more


class Narrowing:
    """Asks a model for logits only where they are read, if it gives the same ones there.

    Args:
        model: The model.
        components: The components that masks speak of; their modules must be given as much as otherwise.
        output: What is read off the model's result.
    """

    def __init__(self, model: nn.Module, components: Components, output: Output) -> None:
        self._model, self._components, self._output = model, components, output
        self._possible: bool | None = None if takes(model, ARGUMENT) else False

    def narrowed(self, batch: Batch, run: Callable[[Inputs], Any]) -> Batch:
        """Return inputs and targets of the positions that are read, or those given.

        The first time, what is narrowed is compared on two examples with what is not.

        Args:
            batch: Inputs and (examples, length) targets, on the model's device.
            run: Runs the model on inputs.
        """
        inputs, targets = batch
        if self._possible is False or not isinstance(inputs, dict) or ARGUMENT in inputs:
            return batch
        read = self._output.positions_read(targets)
        if read is None or int(read.sum(1).max()) > WORTHWHILE * read.shape[1]:
            return batch
        less = narrow(inputs, targets, read)
        if self._possible is None:
            self._possible = self._agrees({name: value[:FEW] for name, value in less[0].items()}, run)
        return less if self._possible else batch

    def _agrees(self, few: dict[str, Tensor], run: Callable[[Inputs], Any]) -> bool:
        """Say whether the model gives the same logits at the positions of a few inputs as without being asked."""
        whole = {name: value for name, value in few.items() if name != ARGUMENT}
        try:
            (plain, seen), (found, seen_less) = (
                seen_by(self._model, self._components, partial(run, part)) for part in (whole, few)
            )
            plain, found = find_logits(plain), find_logits(found)
            plain = plain.take_along_dim(few[ARGUMENT].to(plain.device)[..., None], dim=1)
        except Exception as error:  # whatever a model may raise: all logits do as well
            log.info("logits are computed at all positions, since the model fails otherwise: %s", error)
            return False
        if seen != seen_less:
            log.info("logits are computed at all positions, since components see these positions")
        elif not alike(self._model, plain, found):
            log.info("logits are computed at all positions, since those of some positions alone are others")
        else:
            return True
        return False


def takes(model: nn.Module, argument: str) -> bool:
    """Say whether a model names an argument of its forward pass; scripted ones name none."""
    try:
        return argument in inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return False


def narrow(inputs: dict[str, Tensor], targets: Tensor, read: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs that ask for logits where they are read, and the targets there.

    Where an example has fewer such positions than another, further ones fill up its row, whose targets are not read.

    Args:
        inputs: Tensors by name.
        targets: (examples, length).
        read: (examples, length) truth values.
    """
    most = int(read.sum(1).max())
    positions = (~read).int().argsort(dim=1, stable=True)[:, :most]
    there = read.gather(1, positions)
    return inputs | {ARGUMENT: positions}, targets.gather(1, positions).where(there, UNREAD)


def seen_by(
    model: nn.Module, components: Components, run: Callable[[], Any], *, along: bool = False
) -> tuple[Any, list[list[torch.Size | int]]]:
    """Return what a pass returns, and the shapes of all that gated modules are given and return in it, call by call.

    Args:
        model: The model.
        components: The components.
        run: Makes the pass.
        along: Tell sizes along the components' axis alone.
    """
    seen: list[list[torch.Size | int]] = []

    def see(axis: int, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        tensors = [one for one in trees.tree_leaves((args, kwargs, returned)) if isinstance(one, Tensor)]
        if along:
            seen.append([one.shape[axis] for one in tensors if -one.ndim <= axis < one.ndim])
        else:
            seen.append([one.shape for one in tensors])

    with ExitStack() as stack:
        for site, side, axis in components.sites():
            if side != "parameter":
                hook = partial(lambda axis, _module, *passed: see(axis, *passed), axis)
                module = model.get_submodule(site)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        with torch.no_grad():
            return run(), seen


def alike(model: nn.Module, expected: Tensor, found: Tensor) -> bool:
    """Say whether two ways of computing the same on a model gave the same, but for its rounding."""
    if found.shape != expected.shape:
        return False
    tolerance = max(TOLERANCE, ROUNDINGS * rounding(model)) * float(expected.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(found, expected.to(found), rtol=0, atol=tolerance, equal_nan=True)
