"""Logits of language models only where an output reads them: the rest of a text needs no product with the vocabulary.

Causal language models of transformers take `logits_to_keep`, the positions that get logits, as (examples, positions).
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from coar.components.table import Components
from coar.equivalence import compare_passes
from coar.examples import UNREAD
from coar.forward.batches import Batch
from coar.inputs import Inputs
from coar.outputs.base import Output, find_logits

log = logging.getLogger(__name__)

ARGUMENT = "logits_to_keep"
WORTHWHILE = 0.75  # share of a text's positions, above which leaving out the others would save next to nothing
FEW = 2  # examples on which it is tried first


class LogitPositions:
    """Asks a model for logits only where they are read, if it gives the same ones there.

    Args:
        model: The model.
        components: The components of a mask; their modules must receive as many values as without.
        output: What is read off the model's result.
    """

    def __init__(self, model: nn.Module, components: Components, output: Output) -> None:
        self._model, self._components, self._output = model, components, output
        self._possible: bool | None = None if takes(model, ARGUMENT) else False

    def selected(self, batch: Batch, run: Callable[[Inputs], Any]) -> Batch:
        """Return inputs and targets of the positions that are read, or those given.

        The first time, logits at these positions are compared with logits at all positions, on two examples.

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
        less = select_positions(inputs, targets, read)
        if self._possible is None:
            self._possible = self._agrees({name: value[:FEW] for name, value in less[0].items()}, run)
        return less if self._possible else batch

    def _agrees(self, few: dict[str, Tensor], run: Callable[[Inputs], Any]) -> bool:
        """Say whether the model gives the same logits at the positions of a few inputs as without being asked."""
        whole = {name: value for name, value in few.items() if name != ARGUMENT}

        def plain() -> Tensor:
            logits = find_logits(run(whole))
            return logits.take_along_dim(few[ARGUMENT].to(logits.device)[..., None], dim=1)

        why_not = compare_passes(self._model, self._components, plain, lambda: find_logits(run(few)))
        if why_not:
            log.info("logits are computed at all positions, since otherwise %s", why_not)
        return not why_not


def takes(model: nn.Module, argument: str) -> bool:
    """Say whether a model names an argument of its forward pass; scripted ones name none."""
    try:
        return argument in inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return False


def select_positions(inputs: dict[str, Tensor], targets: Tensor, read: Tensor) -> tuple[dict[str, Tensor], Tensor]:
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
