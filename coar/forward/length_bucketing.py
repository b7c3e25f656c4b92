"""Batches of texts of about one length, without padding that no text of the batch needs.

Padding takes as long as text. So texts are sorted by length and cut into batches where shorter ones save more than a
further pass costs, and each batch is as long as its longest text: cut off at the end, or in front where all texts end
together.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.components.table import Components
from coar.equivalence import compare_passes
from coar.examples import UNREAD, rows_of
from coar.forward.batches import Batch, ExampleBlock
from coar.inputs import Inputs
from coar.outputs.base import Output

log = logging.getLogger(__name__)

IDS, MASK = "input_ids", "attention_mask"
# Tokens that take as long as a pass takes besides its tokens: 40 to 150 were measured on a CPU, the others are guesses.
OVERHEAD = {"cpu": 256, "cuda": 16_384, "mps": 4_096}
FEW = 2  # examples on which it is tried first

Cut = tuple[Tensor, int]  # positions of examples, and the length that they need


class LengthBucketing:
    """Cuts texts into batches without needless padding, if the model gives the same outputs then.

    Args:
        model: The model.
        components: The components of a mask; none may be a position of a text.
        output: What is read off the model's result.
        front: Whether positions may move forward, which they may not where constants belong to positions.
    """

    def __init__(self, model: nn.Module, components: Components, output: Output, *, front: bool = True) -> None:
        self._model, self._components, self._output, self._front = model, components, output, front
        self._possible: bool | None = None

    def bucketed(self, block: ExampleBlock, most: int, run: Callable[[Inputs], Any]) -> ExampleBlock:
        """Return a block whose batches have no needless padding, or the one given where that saves nothing.

        The first time, the examples with most padding are passed with it and without, and compared.

        Args:
            block: A block without resample sources.
            most: Examples that may pass together.
            run: Runs the model on inputs.
        """
        whole = None if self._possible is False else joined(block.batches)
        ends = ends_of(*whole) if whole else None
        if whole is None or ends is None:
            return block
        mask = whole[0][MASK]
        front = self._front and int(ends[0].min()) == mask.shape[-1]  # all texts end together
        lengths = ends[int(front)]
        cuts = cut(lengths, most, OVERHEAD[mask.device.type] / mask[0, ..., 0].numel())
        if all(length == mask.shape[-1] for _, length in cuts):
            return block
        if self._possible is None:
            self._possible = self._agrees(whole, lengths, run, front=front)
        if not self._possible:
            return block
        batches = [trimmed(rows_of(whole[0], rows), whole[1][rows], length, front=front) for rows, length in cuts]
        return replace(block, batches=batches, order=torch.cat([rows for rows, _ in cuts]))

    def _agrees(
        self, batch: tuple[dict[str, Tensor], Tensor], lengths: Tensor, run: Callable[[Inputs], Any], *, front: bool
    ) -> bool:
        """Say whether outputs of those with most padding are the same without it."""
        rows = lengths.argsort(stable=True)[:FEW]
        whole = rows_of(batch[0], rows), batch[1][rows]
        short = trimmed(*whole, int(lengths[rows].max()), front=front)

        def read(batch: Batch) -> Tensor:
            return self._output.read(run(batch[0]), batch[1])

        passes = partial(read, whole), partial(read, short)
        why_not = compare_passes(self._model, self._components, *passes, axis_only=True)
        if why_not:
            log.info("texts keep their padding, since without it %s", why_not)
        return not why_not


def joined(batches: list[Batch]) -> tuple[dict[str, Tensor], Tensor] | None:
    """Return one batch of those of several; None where inputs have no names."""
    parts = [inputs for inputs, _ in batches if isinstance(inputs, dict)]
    if not parts:
        return None
    inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return inputs, torch.cat([targets for _, targets in batches])


def ends_of(inputs: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return how long examples are, (examples,) each: from the first position on, and from the last one backwards.

    What is no padding, or has a target that is read, counts. None where inputs do not say what is padding.
    """
    if not {IDS, MASK} <= inputs.keys():
        return None
    mask = inputs[MASK]
    if mask.ndim < 2 or inputs[IDS].shape != mask.shape or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    there = mask.bool()
    if targets.shape == mask.shape:
        there = there | (targets != UNREAD)
    places = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    ends, starts = ((one * places).flatten(1).amax(1).clamp(min=1) for one in (there, there.flip(-1)))
    return ends, starts


def cut(lengths: Tensor, most: int, overhead: float) -> list[Cut]:
    """Return the cheapest cut of (examples,) lengths into batches, from the shortest to the longest.

    Args:
        lengths: How long each example is.
        most: Examples that may pass together.
        overhead: What a batch costs besides its examples times the longest, in the unit of lengths.
    """
    kinds, counts = (part.numpy() for part in torch.unique(lengths.cpu(), return_counts=True))
    ends = np.concatenate([[0], counts.cumsum()])
    cost, start = np.zeros(len(kinds) + 1), np.zeros(len(kinds) + 1, dtype=int)
    for end in range(1, len(kinds) + 1):
        rows = ends[end] - ends[:end]  # of the lengths from each on up to this one
        costs = cost[:end] + rows * kinds[end - 1] + -(-rows // most) * overhead
        cost[end], start[end] = costs.min(), costs.argmin()
    order, found, end = lengths.argsort(stable=True), [], len(kinds)
    while end:
        parts = torch.split(order[ends[start[end]] : ends[end]], most)
        found += [(part, int(lengths[part[-1]])) for part in reversed(parts)]
        end = start[end]
    return found[::-1]


def trimmed(inputs: dict[str, Tensor], targets: Tensor, length: int, *, front: bool) -> tuple[Inputs, Tensor]:
    """Return inputs, and targets where they have one for every token, of the first positions alone, or the last."""
    whole = inputs[MASK].shape
    part = slice(-length, None) if front else slice(length)
    short = {name: value[..., part] if value.shape == whole else value for name, value in inputs.items()}
    return short, targets[..., part] if targets.shape == whole else targets
