"""One streaming pass over a run: the sums that a linear fit needs, in memory that does not grow with the masks."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coar.store import Run

BATCH = 2048  # rows per matrix product: float32 products over so few rows, summed up in float64


@dataclass(frozen=True)
class Gram:
    """What the masks alone say, in float64; X is the (masks, components) 0/1 design.

    Attributes:
        product: X'X (components, components), exact.
        total: Column sums of X (components,), exact.
        count: Number of masks.
    """

    product: Tensor
    total: Tensor
    count: int

    def centred(self) -> Tensor:
        """Return the (components, components) Gram matrix of the centred design."""
        return self.product - torch.outer(self.total, self.total) / self.count


@dataclass(frozen=True)
class Moments:
    """What a block of examples says, in float64, about outputs Y (masks, examples) less a constant per example.

    Attributes:
        product: X'Y (components, examples).
        total: Column sums of Y (examples,).
        square: Column sums of Y * Y (examples,).
        shift: The constants taken off the outputs, which keep the products small.
        count: Number of masks.
    """

    product: Tensor
    total: Tensor
    square: Tensor
    shift: Tensor
    count: int

    def mean(self) -> Tensor:
        """Return the (examples,) mean outputs."""
        return self.shift + self.total / self.count

    def variation(self) -> Tensor:
        """Return the (examples,) sums of squared deviations from the mean."""
        return (self.square - self.total**2 / self.count).clamp_min(0)

    def centred(self, gram_total: Tensor) -> Tensor:
        """Return the (components, examples) products of centred masks and centred outputs."""
        return self.product - torch.outer(gram_total, self.total) / self.count


def batches(run: Run, rows: np.ndarray, examples: slice) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (rows, components) masks and (rows, examples) outputs in float32, reading ahead by one batch.

    Args:
        run: The run to read.
        rows: Row numbers, ascending.
        examples: Which examples.
    """
    edge = run.blocks[0]
    step = max(BATCH // edge, 1) * edge
    starts = [start for start in range(0, len(run.plan), step) if ((rows >= start) & (rows < start + step)).any()]

    def load(start: int) -> tuple[Tensor, Tensor]:
        wanted = rows[(rows >= start) & (rows < start + step)]
        masks, outputs = run.masks_at(wanted), run.outputs_at(wanted, examples)
        return torch.from_numpy(masks).float(), torch.from_numpy(outputs)

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(load, starts[0])
        for following in [*starts[1:], None]:
            batch = ahead.result()
            if following is not None:
                ahead = reader.submit(load, following)
            yield batch


def accumulate(run: Run, rows: np.ndarray, examples: slice, *, gram: Gram | None = None) -> tuple[Gram, Moments]:
    """Read rows once and return the masks' Gram matrix (unless it is given) and the examples' moments."""
    d, n = len(run.components), examples.stop - examples.start
    square = torch.zeros(d, d, dtype=torch.float64) if gram is None else gram.product
    ones = torch.zeros(d, dtype=torch.float64)
    product = torch.zeros(d, n, dtype=torch.float64)
    total, squares = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    shift: Tensor | None = None
    for x, y in batches(run, rows, examples):
        shift = y.mean(0) if shift is None else shift
        moved = y - shift
        if gram is None:
            square += x.T @ x  # whole numbers below 2**24: exact in float32
        ones += x.sum(0, dtype=torch.float64)
        product += x.T @ moved
        total += moved.sum(0, dtype=torch.float64)
        squares += (moved.double() ** 2).sum(0)
    offset = torch.zeros(n) if shift is None else shift
    return Gram(square, ones, len(rows)), Moments(product, total, squares, offset.double(), len(rows))
