"""Trials: what sets of components do to choosing examples, told by passes through the gated model."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from coar.attributions import Attributions
from coar.examples import Examples
from coar.outputs import CorrectClassMargin
from coar.worker import Block, Precision, Worker, choose_device, device_copy

PROBE_COST = 3  # a probe's forward and backward pass, in forward passes


class Trials:
    """Runs the gated model on examples that stay on the device, and counts.

    Args:
        attributions: They know the components and what replaces them.
        model: The model they were collected from.
        examples: The examples to choose on.
        device: Where to compute.
        precision: `float32`, or `bf16` for automatic mixed precision.
        batch_size: Most examples per forward pass; by default what suits the device.

    Attributes:
        passes: Passes of one example so far; a probe counts as three.
    """

    def __init__(
        self,
        attributions: Attributions,
        model: nn.Module,
        examples: Examples,
        *,
        device: str = "auto",
        precision: Precision = "float32",
        batch_size: int | None = None,
    ) -> None:
        constants = torch.tensor(attributions.facts["replacements"], dtype=torch.float32)
        copy = device_copy(model, choose_device(device))
        largest, smooth = CorrectClassMargin(against="largest"), CorrectClassMargin()
        self._largest, self._smooth = (
            Worker(
                copy,
                attributions.components,
                constants,
                output,
                batch_norms=attributions.facts["batch_norms"],
                precision=precision,
                batch_size=batch_size,
            )
            for output in (largest, smooth)
        )
        inputs, targets = examples.block(0, len(examples))
        self._examples = Examples(inputs=inputs, targets=targets)
        self._blocks: dict[bytes, Block] = {}
        self.components = len(attributions.components)
        self.passes = 0

    def __len__(self) -> int:
        return len(self._examples)

    def margins(self, keeps: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Return (masks, examples) margins against the largest other logit under (masks, components) masks."""
        block = self._block(np.arange(len(self)) if rows is None else rows)
        self.passes += block.size * len(keeps)
        return self._largest.outputs(block, keeps)

    def slopes(self, gates: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (examples,) smooth margins and their (examples, components) gradients by gates set between 0 and 1.

        The margin against the log-sum-exp of the other logits is taken, which has a gradient everywhere.
        """
        part = self._examples.subset(rows)
        block = self._smooth.load(part, 0, len(part))
        self.passes += PROBE_COST * block.size
        mask = gates.astype(np.float32)[None, None]
        kept, ablated, outputs = self._smooth.probe(block, mask, np.zeros(block.size, dtype=np.int64))
        return outputs[0], np.where(gates > 0, kept, ablated)

    def mask(self, ablated: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the (components,) mask that ablates these components."""
        keep = np.ones(self.components, dtype=bool)
        keep[np.asarray(ablated, dtype=np.int64)] = False
        return keep

    def _block(self, rows: np.ndarray) -> Block:
        """Return these examples on the device, moved there once."""
        key = rows.tobytes()
        if key not in self._blocks:
            part = self._examples.subset(rows)
            self._blocks[key] = self._largest.load(part, 0, len(part))
        return self._blocks[key]
