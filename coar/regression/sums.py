"""One streaming pass over a run: the sums that a linear fit needs, in memory that does not grow with the masks."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coar.store import Run

BATCH = 4096  # rows per matrix product: float32 products over so few rows, summed up in float64


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

    def scaled(self, factors: Tensor) -> "Gram":
        """Return the sums of a design whose columns are multiplied by (components,) factors."""
        return Gram(self.product * torch.outer(factors, factors), self.total * factors, self.count)

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
    """Yield (rows, components + 1) masks, the last column ones, and (rows, examples) outputs; float32, one batch ahead.

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
        masks, outputs = torch.from_numpy(run.masks_at(wanted)), torch.from_numpy(run.outputs_at(wanted, examples))
        design = torch.ones(len(masks), masks.shape[1] + 1)
        design[:, :-1] = masks
        return design, outputs

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(load, starts[0])
        for following in [*starts[1:], None]:
            batch = ahead.result()
            if following is not None:
                ahead = reader.submit(load, following)
            yield batch


def accumulate(run: Run, rows: np.ndarray, examples: slice, *, gram: Gram | None = None) -> tuple[Gram, Moments]:
    """Read rows once and return the masks' Gram matrix (unless it is given) and the examples' moments.

    A column of ones stands beside the masks, so that the same products give the column sums.
    """
    d, n = run.n_components, len(range(run.n_examples)[examples])
    square = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    product = torch.zeros(d + 1, n, dtype=torch.float64)
    squares = torch.zeros(1, n, dtype=torch.float64)
    part, shift = torch.empty(d + 1, n), torch.zeros(n)
    for number, (x, y) in enumerate(batches(run, rows, examples)):
        if number == 0:
            shift = y.mean(0)
        y.sub_(shift)
        ones = x[:, -1:].T  # (1, rows)
        if gram is None:
            square += x.T @ x  # whole numbers below 2**24: exact in float32
        product += torch.mm(x.T, y, out=part)
        squares += ones @ y.square_()
    if gram is None:
        gram = Gram(square[:d, :d].clone(), square[d, :d].clone(), len(rows))
    return gram, Moments(product[:d], product[d], squares[0], shift.double(), len(rows))
