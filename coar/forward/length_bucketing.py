"""Batches of texts of similar length, without padding that no text of the batch needs.

A padding token takes as long as any other token. So texts are sorted by length and cut into batches, as far as shorter
batches save more than another pass costs. Each batch is as long as its longest text: its padding is removed at the
end, or in front if all texts end at the last position.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.components.table import Components
from coar.equivalence import FastPath, compare_passes
from coar.examples import UNREAD, rows_of
from coar.forward.batches import Batch, ExampleBlock
from coar.inputs import Inputs
from coar.outputs.base import Output, RelativeOutput, find_logits

IDS, MASK = "input_ids", "attention_mask"
# A pass costs as much as this many tokens more than it has: 40 to 150 measured on a CPU, the others are guesses.
OVERHEAD = {"cpu": 256, "cuda": 16_384}
OTHER_OVERHEAD = 4_096
FEW = 2  # examples of the comparison with padded texts

Cut = tuple[Tensor, int]  # positions of examples, and their largest length


class LengthBucketing:
    """Cuts texts into batches without needless padding, if the model gives the same outputs then.

    Args:
        model: The model.
        components: The components of a mask; none may be a position of a text.
        output: What is read off the model's result.
        front: Whether positions may move forward; they may not if constants belong to positions.

    Attributes:
        path: Whether the model was found to give the same outputs.
    """

    def __init__(self, model: nn.Module, components: Components, output: Output, *, front: bool = True) -> None:
        self._model, self._components, self._output, self._front = model, components, output, front
        self.path = FastPath("length bucketing")

    def bucketed(self, block: ExampleBlock, most: int, run: Callable[[Inputs], Any]) -> ExampleBlock:
        """Return a block whose batches have no needless padding, or the same block if that saves nothing.

        The first time, outputs of the examples with the most padding are compared with and without it.

        Args:
            block: A block without resample sources.
            most: Most examples of a batch.
            run: Runs the model on inputs.
        """
        whole = None if self.path.fallback else joined(block.batches)
        ends = ends_of(*whole) if whole else None
        if whole is None or ends is None:
            return block
        mask = whole[0][MASK]
        front = self._front and int(ends[0].min()) == mask.shape[-1]  # all texts end together
        lengths = ends[int(front)]
        cuts = cut(lengths, most, OVERHEAD.get(mask.device.type, OTHER_OVERHEAD) / mask[0, ..., 0].numel())
        if all(length == mask.shape[-1] for _, length in cuts):
            return block
        if not self.path.confirmed and not self.path.settle(self._why_not(whole, lengths, run, front=front)):
            return block
        batches = [shortened(rows_of(whole[0], rows), whole[1][rows], length, front=front) for rows, length in cuts]
        return replace(block, batches=batches, order=torch.cat([rows for rows, _ in cuts]))

    def _why_not(
        self, batch: tuple[dict[str, Tensor], Tensor], lengths: Tensor, run: Callable[[Inputs], Any], *, front: bool
    ) -> str:
        """Return in words how the examples with the most padding differ without it."""
        rows = lengths.argsort(stable=True)[:FEW]
        whole = rows_of(batch[0], rows), batch[1][rows]
        short = shortened(*whole, int(lengths[rows].max()), front=front)

        def read(batch: Batch) -> Tensor:
            result, targets = run(batch[0]), batch[1]
            if not isinstance(self._output, RelativeOutput):
                return self._output.read(result, targets)
            logits, there = find_logits(result), self._output.positions_read(targets)
            return logits if there is None else logits[there]

        passes = partial(read, whole), partial(read, short)
        return compare_passes(self._model, self._components, *passes, axis_only=True)


def joined(batches: list[Batch]) -> tuple[dict[str, Tensor], Tensor] | None:
    """Join several batches into one; None if inputs have no names."""
    parts = [inputs for inputs, _ in batches if isinstance(inputs, dict)]
    if not parts:
        return None
    inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return inputs, torch.cat([targets for _, targets in batches])


def ends_of(inputs: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return (examples,) lengths from the first position on, and (examples,) lengths from the last one backwards.

    A position counts if it is not padding, or has a target that is read. None if inputs do not mark padding.
    """
    if not {IDS, MASK} <= inputs.keys():
        return None
    mask = inputs[MASK]
    if mask.ndim < 2 or inputs[IDS].shape != mask.shape or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    there = mask.bool()
    if targets.shape[: mask.ndim] == mask.shape:
        there = there | (targets != UNREAD).view(*mask.shape, -1).any(-1)
    places = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    ends, starts = ((one * places).flatten(1).amax(1).clamp(min=1) for one in (there, there.flip(-1)))
    return ends, starts


def cut(lengths: Tensor, most: int, overhead: float) -> list[Cut]:
    """Return the cheapest cut of (examples,) lengths into batches, from the shortest to the longest.

    Args:
        lengths: The length of each example.
        most: Most examples of a batch.
        overhead: Cost of a batch on top of its examples times the longest length, in tokens.
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


def shortened(inputs: dict[str, Tensor], targets: Tensor, length: int, *, front: bool) -> tuple[Inputs, Tensor]:
    """Return the first or last positions of inputs, and of targets if these have one for every token."""
    whole = inputs[MASK].shape
    part = slice(-length, None) if front else slice(length)
    short = {name: value[..., part] if value.shape == whole else value for name, value in inputs.items()}
    each = targets.shape[: len(whole)] == whole  # targets may have more axes, such as several answers
    return short, targets.narrow(len(whole) - 1, whole[-1] - length if front else 0, length) if each else targets
