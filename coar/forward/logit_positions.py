"""Logits of language models only at the positions that an output reads, to save products with the vocabulary.

Causal language models of transformers take `logits_to_keep`, the (examples, positions) that get logits.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from coar.components.table import Components
from coar.equivalence import FastPath, compare_passes
from coar.examples import UNREAD
from coar.forward.batches import Batch
from coar.inputs import Inputs
from coar.outputs.base import Output, find_logits

ARGUMENT = "logits_to_keep"
WORTHWHILE = 0.75  # share of a text's positions above which all get logits, since the rest would save little
FEW = 2  # examples of the comparison with logits at all positions


class LogitPositions:
    """Requests logits only at the positions that are read, if the model gives the same logits there.

    Args:
        model: The model.
        components: The components of a mask; their modules must receive as many values as without.
        output: What is read off the model's result.

    Attributes:
        path: Whether the model was found to give the same logits.
    """

    def __init__(self, model: nn.Module, components: Components, output: Output) -> None:
        self._model, self._components, self._output = model, components, output
        self._takes = takes(model, ARGUMENT)
        self.path = FastPath("computing logits only where they are read")

    def selected(self, batch: Batch, run: Callable[[Inputs], Any]) -> Batch:
        """Return inputs and targets that request logits at the positions that are read, or the batch unchanged.

        The first time, logits at these positions are compared with logits at all positions, on two examples.

        Args:
            batch: Inputs and (examples, length, ...) targets, on the model's device.
            run: Runs the model on inputs.
        """
        inputs, targets = batch
        if not self._takes or self.path.fallback or not isinstance(inputs, dict) or ARGUMENT in inputs:
            return batch
        read = self._output.positions_read(targets)
        if read is None or int(read.sum(1).max()) > WORTHWHILE * read.shape[1]:
            return batch
        less = select_positions(inputs, targets, read)
        if not self.path.confirmed:
            self.path.settle(self._why_not({name: value[:FEW] for name, value in less[0].items()}, run))
        return less if self.path.confirmed else batch

    def _why_not(self, few: dict[str, Tensor], run: Callable[[Inputs], Any]) -> str:
        """Return in words how logits at the positions of a few inputs differ from logits at all positions."""
        whole = {name: value for name, value in few.items() if name != ARGUMENT}

        def plain() -> Tensor:
            logits = find_logits(run(whole))
            return logits.take_along_dim(few[ARGUMENT].to(logits.device)[..., None], dim=1)

        return compare_passes(self._model, self._components, plain, lambda: find_logits(run(few)))


def takes(model: nn.Module, argument: str) -> bool:
    """Return whether the forward pass of a model has a named argument; scripted models name none."""
    try:
        return argument in inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return False


def select_positions(inputs: dict[str, Tensor], targets: Tensor, read: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs that request logits where they are read, and the targets there.

    If an example has fewer such positions than another, its row is filled with positions that are not read.

    Args:
        inputs: Tensors by name.
        targets: (examples, length, ...).
        read: (examples, length) booleans.
    """
    most = int(read.sum(1).max())
    positions = (~read).int().argsort(dim=1, stable=True)[:, :most]
    further = (1,) * (targets.ndim - 2)  # axes after the positions, such as several answers
    there, places = (part.view(*positions.shape, *further) for part in (read.gather(1, positions), positions))
    return inputs | {ARGUMENT: positions}, targets.take_along_dim(places, 1).where(there, UNREAD)
