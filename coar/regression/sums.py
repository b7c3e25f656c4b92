"""What a solver is given: a block of examples, and sums over it in memory that does not grow with the masks."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from coar.store.layout import PANEL
from coar.store.records import FitLearned
from coar.store.run import Run

BATCH = 4096  # rows per float32 matrix product; the products are summed in float64
MOMENT_BYTES = 256 * 2**20  # of X'Y in memory at a time; more examples take another reading of the masks


@dataclass(frozen=True)
class Gram:
    """Sums over the masks alone, in float64; X is the (masks, components) 0/1 design.

    Attributes:
        product: X'X (components, components), exact.
        total: Column sums of X (components,), exact.
        count: Number of masks.
    """

    product: Tensor
    total: Tensor
    count: int

    @classmethod
    def of(cls, run: Run, rows: np.ndarray) -> "Gram":
        """Read the masks of ascending rows, and no outputs; without rows all sums are 0."""
        d = run.n_components
        square = torch.zeros(d + 1, d + 1, dtype=torch.float64)
        for part in np.array_split(rows, -(-len(rows) // BATCH)) if len(rows) else ():
            x = _design(run.masks_at(part))
            square += x.T @ x  # whole numbers below 2**24 are exact in float32
        return cls.cut(square, len(rows))

    @classmethod
    def cut(cls, square: Tensor, count: int) -> "Gram":
        """Return the sums from the product of a design with itself; the last column of the design is ones."""
        return cls(square[:-1, :-1].clone(), square[-1, :-1].clone(), count)

    def __add__(self, other: "Gram") -> "Gram":
        """Return the sums over both designs: whole numbers below 2**53, exact in any order of addition."""
        return Gram(self.product + other.product, self.total + other.total, self.count + other.count)

    def scaled(self, factors: Tensor) -> "Gram":
        """Return the sums of a design whose columns are multiplied by (components,) factors."""
        return Gram(self.product * torch.outer(factors, factors), self.total * factors, self.count)

    def centred(self) -> Tensor:
        """Return the (components, components) Gram matrix of the centred design."""
        return self.product - torch.outer(self.total, self.total) / self.count


@dataclass(frozen=True)
class Moments:
    """Sums over the outputs Y (masks, examples) of a block of examples, less a constant per example, in float64.

    Attributes:
        product: X'Y (components, examples).
        total: Column sums of Y (examples,).
        square: Column sums of Y * Y (examples,).
        shift: The constants subtracted from the outputs, which keeps the products small.
        count: Number of masks.
    """

    product: Tensor
    total: Tensor
    square: Tensor
    shift: Tensor
    count: int

    def __getitem__(self, part: slice) -> "Moments":
        """Return the moments of a slice of the examples."""
        return Moments(self.product[:, part], self.total[part], self.square[part], self.shift[part], self.count)

    @staticmethod
    def joined(parts: "Sequence[Moments]") -> "Moments":
        """Return the moments of several blocks of examples, in their order."""
        product, total, square, shift = zip(*((p.product, p.total, p.square, p.shift) for p in parts), strict=True)
        return Moments(torch.cat(product, 1), torch.cat(total), torch.cat(square), torch.cat(shift), parts[0].count)

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
    """Yield (rows, components + 1) masks with a last column of ones, and (rows, examples) outputs, in float32.

    A thread reads one batch ahead.

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
        masks, outputs = run.masks_at(wanted), torch.from_numpy(run.outputs_at(wanted, examples))
        return _design(masks), outputs

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(load, starts[0])
        for following in [*starts[1:], None]:
            batch = ahead.result()
            if following is not None:
                ahead = reader.submit(load, following)
            yield batch


def panels(examples: slice, step: int) -> list[slice]:
    """Cut a slice of examples into blocks of `step`, and each of these into panels.

    All processes sum panel by panel, so that sums have the same bits however the work is shared.
    """
    edges = range(examples.start, examples.stop, step)
    blocks = [range(edge, min(edge + step, examples.stop)) for edge in edges]
    return [slice(at, min(at + PANEL, block.stop)) for block in blocks for at in block[::PANEL]]


def accumulate(
    run: Run, rows: np.ndarray, examples: slice, *, gram: Gram | None = None, step: int | None = None
) -> tuple[Gram, Moments]:
    """Read rows once and return the masks' Gram matrix (unless it is given) and the examples' moments.

    A column of ones is added to the masks, so that the same products give the column sums.

    Args:
        run: The run to read.
        rows: Row numbers, ascending.
        examples: Which examples.
        gram: The masks' sums, if they are known.
        step: Number of examples that are solved together; no panel extends over the end of such a block.
    """
    d, n = run.n_components, len(range(run.n_examples)[examples])
    square = torch.zeros(d + 1, d + 1, dtype=torch.float64)
    product = torch.zeros(d + 1, n, dtype=torch.float64)
    squares, shift = torch.zeros(n, dtype=torch.float64), torch.zeros(n)
    for number, (x, outputs) in enumerate(batches(run, rows, examples)):
        if gram is None:
            square += x.T @ x  # whole numbers below 2**24 are exact in float32
        for panel in panels(slice(0, n), step or n):
            y = outputs[:, panel].contiguous()
            if number == 0:
                shift[panel] = y.mean(0)
            y -= shift[panel]
            product[:, panel] += x.T @ y
            squares[panel] += x[:, -1] @ y.square_()
    if gram is None:
        gram = Gram.cut(square, len(rows))
    return gram, Moments(product[:d], product[d], squares, shift.double(), len(rows))


class Sums(Protocol):
    """A source of the sums of a fit."""

    def gram(self) -> Gram:
        """Return the sums over masks."""
        ...

    def moments(self, examples: slice) -> Moments:
        """Return the moments of a block of examples that are solved together."""
        ...


class Streamed:
    """Sums made in this process; each reading of the masks serves as many blocks of examples as memory allows.

    Args:
        run: The run to read.
        rows: Row numbers, ascending.
        step: Number of examples in a block, which are solved together.
    """

    def __init__(self, run: Run, rows: np.ndarray, step: int) -> None:
        self._run, self._rows, self._step = run, rows, step
        self._many = examples_per_reading(run.n_components, step)
        self._gram: Gram | None = None
        self._moments: Moments | None = None
        self._held = slice(0, 0)

    def gram(self) -> Gram:
        """Return the sums over masks, which are made together with the moments of the first examples."""
        return self._gram or self._read(0)[0]

    def moments(self, examples: slice) -> Moments:
        """Return the moments of a block of examples."""
        held = self._moments if self._held.start <= examples.start and examples.stop <= self._held.stop else None
        held = held or self._read(examples.start)[1]
        return held[slice(examples.start - self._held.start, examples.stop - self._held.start)]

    def _read(self, start: int) -> tuple[Gram, Moments]:
        self._moments = None  # frees the memory for the next ones
        self._held = slice(start, min(start + self._many, self._run.n_examples))
        sums = accumulate(self._run, self._rows, self._held, gram=self._gram, step=self._step)
        self._gram, self._moments = sums
        return sums


def examples_per_reading(components: int, step: int) -> int:
    """Return how many examples one reading of the masks serves: whole blocks of `step`, within `MOMENT_BYTES`."""
    return max(MOMENT_BYTES // (8 * components) // step, 1) * step


def moments_of(run: Run, rows: np.ndarray, examples: slice) -> Moments:
    """Read rows once and return the moments of examples, without the sums over masks."""
    known = Gram(torch.empty(0), torch.empty(0), len(rows))
    return accumulate(run, rows, examples, gram=known)[1]


@dataclass(frozen=True)
class FitBlock:
    """A block of examples to fit.

    Attributes:
        run: A complete run.
        rows: Row numbers of the training masks to use.
        examples: The examples.
        sums: Their moments, if they are made already.
    """

    run: Run
    rows: np.ndarray
    examples: slice
    sums: Moments | None = None

    def moments(self) -> Moments:
        """Return the moments; read them from the run if they were not given."""
        return self.sums or moments_of(self.run, self.rows, self.examples)


class Solution(Protocol):
    """The linear models of a block of examples."""

    @property
    def weight(self) -> Tensor:
        """(examples, components) weights."""
        ...

    @property
    def intercept(self) -> Tensor:
        """(examples,) predictions with all components ablated."""
        ...


class Solver(Protocol):
    """What all examples of a fit share, and the solution of a block of examples from it."""

    def learned(self) -> FitLearned:
        """Return what was learned for all examples."""
        ...

    def solve(self, block: FitBlock) -> Solution:
        """Fit a block of examples."""
        ...


def takes_moments(method: str, masks: int, components: int) -> bool:
    """Return whether a method fits this number of masks from their Gram matrix and the examples' moments."""
    return method == "lasso" or masks > components


def dealt_rows(run: Run, rows: np.ndarray, share: tuple[int, int]) -> np.ndarray:
    """Return the rows whose masks worker k of n, counted from 0, adds up: every n-th block of masks."""
    at, count = share
    mine: np.ndarray = rows[rows // run.blocks[0] % count == at]
    return mine


def _design(masks: np.ndarray) -> Tensor:
    """Return (rows, components) masks as float32, followed by a column of ones."""
    design = torch.ones(len(masks), masks.shape[1] + 1)
    design[:, :-1] = torch.from_numpy(masks)
    return design
