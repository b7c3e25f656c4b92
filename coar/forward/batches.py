"""Blocks of examples on a device, cut into batches."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from coar.inputs import Inputs

Batch = tuple[Inputs, Tensor]  # inputs and targets of one forward pass


@dataclass(frozen=True)
class ExampleBlock:
    """A block of examples on the device, cut into batches.

    Attributes:
        batches: Inputs and targets, batch by batch.
        size: Number of examples.
        sources: Batch by batch, the inputs whose activations replace those of the examples; empty for constants.
        order: (examples,) the number of the example at each place of the batches; None if they are in order.
    """

    batches: list[Batch]
    size: int
    sources: list[Inputs]
    order: Tensor | None = None

    def in_order(self, values: Tensor, axis: int = -1) -> Tensor:
        """Return values of the batches, one per example along an axis, in the order of the examples."""
        return values if self.order is None else values.index_select(axis, self.order.argsort())

    def in_batches(self, values: Tensor) -> Tensor:
        """Return (examples, ...) values in the order of the batches."""
        return values if self.order is None else values[self.order]

    def pieces(self) -> Iterator[tuple["ExampleBlock", slice]]:
        """Yield blocks whose sources' activations are in memory together, and their examples: one batch, or all."""
        if not self.sources:
            yield self, slice(0, self.size)
            return
        at = 0
        for batch, sources in zip(self.batches, self.sources, strict=True):
            size = len(batch[1])
            yield ExampleBlock([batch], size, [sources]), slice(at, at + size)
            at += size
