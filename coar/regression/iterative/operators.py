"""The centred Gram matrix of the masks as an operator, from packed masks or as a matrix in float32.

Products use the complement Z = 1 - X of the masks (masks, components), since nine entries in ten of X are ones: its
centred Gram matrix is the same, Zc = -Xc, and less is lost where column means are subtracted.

Vectors are the rows of a product's left factor, (columns, components) in memory: with few of them a CPU's matrix
products are then several times faster than with vectors in columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from coar.errors import RegressionError
from coar.regression.fit_plan import FitPlan
from coar.regression.sums import BATCH, Gram, Moments
from coar.store.run import Run, pack

READ_ROWS = 4096  # rows that are read together, at most


class Masks:
    """Packed masks of a fit, held in memory or read from the run for every product, in tiles of few rows.

    Args:
        run: A complete run.
        rows: Row numbers of the training masks, ascending.
        plan: Where to compute, how many rows to unpack together, and whether packed masks stay in memory.

    Attributes:
        total: (components,) float64 numbers of masks that ablate each component.
    """

    def __init__(self, run: Run, rows: np.ndarray, plan: FitPlan) -> None:
        self._run, self._rows, self._plan = run, rows, plan
        self._held: list[Tensor] = []
        d = run.n_components
        edge = run.blocks[0]
        step = max(min(READ_ROWS, max(plan.tile, edge)) // edge, 1) * edge
        starts = np.unique(rows // step)
        self._parts = [rows[rows // step == start] for start in starts]
        self._table = torch.from_numpy(
            1 - np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        )
        self._space: dict[torch.dtype, Tensor] = {}
        total = torch.zeros(d, dtype=torch.float64, device=plan.device)
        for number in range(len(self._parts)):
            packed = self._read(number, check=True)
            if plan.held:
                self._held.append(packed)
            for _, tile in self._unpacked(packed, torch.float32):
                total += tile.sum(0)  # whole numbers below 2**24 are exact in float32
        self.total = total

    def __len__(self) -> int:
        return len(self._rows)

    def tiles(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield (rows, components) complements of the masks; a tile is valid until the next one is made."""
        for number in range(len(self._parts)):
            yield from (tile for _, tile in self._unpacked(self._packed(number), dtype))

    def kernel_times(self, values: Tensor, squares: Tensor | None = None) -> Tensor:
        """Return the centred kernel matrix Xc S Xc' (masks, masks) times (masks, columns) values.

        Args:
            values: What is multiplied.
            squares: (components,) the diagonal of S; by default ones.
        """
        mean, vectors = (self.total / len(self)).to(values.dtype), values.T.contiguous()
        image = values.new_zeros(len(vectors), len(mean))
        start = 0
        for tile in self.tiles(values.dtype):
            image.addmm_(vectors[:, start : start + len(tile)], tile)
            start += len(tile)
        image.addr_(vectors.sum(1), mean, alpha=-1)
        if squares is not None:
            image *= squares.to(image.dtype)
        out = torch.cat([image @ tile.T for tile in self.tiles(values.dtype)], dim=1)
        return (out - out.mean(1, keepdim=True)).T.contiguous()

    def with_outputs(self, examples: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tiles as `tiles` does, in float32, each with the (rows, examples) outputs."""
        for number, rows in enumerate(self._parts):
            outputs = torch.from_numpy(self._run.outputs_at(rows, examples)).to(self._plan.device)
            for part, tile in self._unpacked(self._packed(number), torch.float32):
                yield tile, outputs[part]

    def _packed(self, number: int) -> Tensor:
        return self._held[number] if self._held else self._read(number, check=False)

    def _read(self, number: int, *, check: bool) -> Tensor:
        """Read packed masks; with `check`, compare them with the masks that their seed gives."""
        rows = self._parts[number]
        packed = pack(self._run.masks_at(rows)) if check else self._run.packed_at(rows)
        return torch.from_numpy(packed).to(self._plan.device)

    def _unpacked(self, packed: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        d, device, step = self._run.n_components, self._plan.device, self._plan.tile
        if dtype not in self._space:
            self._space[dtype] = torch.empty(step, d, dtype=dtype, device=device)
        for start in range(0, len(packed), step):
            part = slice(start, min(start + step, len(packed)))
            space = self._space[dtype][: part.stop - start]
            if device.type == "cpu":
                bits = np.unpackbits(~packed[part].numpy(), axis=1, count=d, bitorder="little")
                space.copy_(torch.from_numpy(bits))
            else:
                table = self._table.to(device)
                space.copy_(table[packed[part].int()].flatten(1)[:, :d])
            yield part, space


class GramOperator(ABC):
    """The centred masks of a fit: sums over them, and products with their Gram matrix.

    Args:
        masks: The masks.
        device: Where they are.

    Attributes:
        total: (components,) float64 numbers of masks that keep each component.
        count: Number of masks.
        device: Where products are computed.
        masks: The masks.
    """

    def __init__(self, masks: Masks, device: torch.device) -> None:
        self.masks, self.device, self.count = masks, device, len(masks)
        self.total = self.count - masks.total

    @abstractmethod
    def times(self, values: Tensor) -> Tensor:
        """Return the centred Gram matrix times (components, columns) values."""

    def kernel_times(self, values: Tensor) -> Tensor:
        """Return the centred kernel matrix times (masks, columns) values."""
        return self.masks.kernel_times(values)

    def squares(self) -> Tensor:
        """Return the (components,) diagonal of the centred Gram matrix."""
        return self.total * (1 - self.total / self.count)

    def moments(self, examples: slice, weights: Tensor | None = None) -> Moments:
        """Return the moments of a block of examples.

        Args:
            examples: The examples.
            weights: (examples, components) float32 weights, whose predictions are subtracted from the outputs, up to
                a constant per example; by default nothing is.
        """
        return _moments(self.masks, examples, self.total, weights)


class PackedGram(GramOperator):
    """Products with the masks and their transpose, tile by tile; takes what `GramOperator` does."""

    def times(self, values: Tensor) -> Tensor:
        """Return the centred Gram matrix times (components, columns) values."""
        mean, vectors = (self.masks.total / self.count).to(values.dtype), values.T.contiguous()
        out, sums = torch.zeros_like(vectors), torch.zeros_like(vectors[:, 0])
        offset = vectors @ mean
        for tile in self.masks.tiles(values.dtype):
            image = vectors @ tile.T - offset[:, None]  # (columns, rows)
            out.addmm_(image, tile)
            sums += image.sum(1)
        return out.addr_(sums, mean, alpha=-1).T.contiguous()

    def gram_of(self, components: Tensor) -> Gram:
        """Return the sums over the complements of the masks of some components, by their numbers."""
        product = torch.zeros(len(components), len(components), dtype=torch.float64, device=self.device)
        parts: list[Tensor] = []
        for tile in self.masks.tiles(torch.float32):
            parts.append(tile[:, components])
            if sum(map(len, parts)) >= BATCH:
                _add_square(product, parts)
        _add_square(product, parts)
        return Gram(product, self.masks.total[components], self.count)


class HeldGram(GramOperator):
    """Products with the centred Gram matrix, held in float32.

    Args:
        masks: The masks, which are read once.
        device: Where the matrix is.
    """

    def __init__(self, masks: Masks, device: torch.device) -> None:
        super().__init__(masks, device)
        d = len(self.total)
        gram = torch.zeros(d, d, device=device)
        for tile in masks.tiles(torch.float32):
            gram.addmm_(tile.T, tile)  # whole numbers below 2**24 are exact in float32
        single = masks.total.float()
        self._gram = gram.addr_(single, single / self.count, alpha=-1)

    def times(self, values: Tensor) -> Tensor:
        """Return the centred Gram matrix times (components, columns) values."""
        vectors = values.T.contiguous()
        if values.dtype == torch.float32:
            return (vectors @ self._gram).T.contiguous()
        step = max(2**22 // len(self._gram), 1)
        parts = [self._gram[start : start + step] for start in range(0, len(self._gram), step)]
        return torch.cat([vectors @ part.to(values.dtype).T for part in parts], dim=1).T.contiguous()


class Scaled(GramOperator):
    """Products with the Gram matrix of centred masks whose columns are multiplied by factors: F Xc'Xc F.

    `total` and `moments` are those of the masks themselves.

    Args:
        design: The masks.
        factors: (components,) the diagonal of F.
    """

    def __init__(self, design: GramOperator, factors: Tensor) -> None:
        super().__init__(design.masks, design.device)
        self._design, self._factors = design, factors
        self._narrow = factors.float()[:, None]

    def times(self, values: Tensor) -> Tensor:
        """Return the scaled Gram matrix times (components, columns) values."""
        return self._design.times(values * self._narrow).mul_(self._narrow)

    def kernel_times(self, values: Tensor) -> Tensor:
        """Return the kernel matrix of the scaled columns times (masks, columns) values."""
        return self.masks.kernel_times(values, self._factors.square())

    def squares(self) -> Tensor:
        """Return the (components,) diagonal of the scaled Gram matrix."""
        return self._design.squares() * self._factors.square()


def _add_square(product: Tensor, parts: list[Tensor]) -> None:
    """Add X'X of the rows in all parts, and remove these."""
    if parts:
        x = torch.cat(parts)
        product += x.T @ x  # whole numbers below 2**24 are exact in float32
        parts.clear()


def operator_of(run: Run, rows: np.ndarray, plan: FitPlan) -> PackedGram | HeldGram:
    """Read the masks of a fit.

    Raises:
        RegressionError: When all masks are alike.
    """
    masks = Masks(run, rows, plan)
    if not ((masks.total > 0) & (masks.total < len(rows))).any():
        raise RegressionError(
            f"the {len(rows)} masks are all alike, so no effect can be fitted; collect more, or ablate more"
        )
    return (HeldGram if plan.way == "gram" else PackedGram)(masks, plan.device)


def _moments(masks: Masks, examples: slice, total: Tensor, weights: Tensor | None) -> Moments:
    product = squares = sums = shift = torch.empty(0)
    for tile, outputs in masks.with_outputs(examples):
        left = outputs if weights is None else outputs + (weights @ tile.T).T  # y - Xw = y + Zw - the sum of w
        if not len(shift):
            shift = left.mean(0)
            sums = torch.zeros_like(shift, dtype=torch.float64)
            squares, product = sums.clone(), sums.new_zeros(len(shift), len(total))
        y = left - shift
        product += y.T @ tile
        sums += y.sum(0, dtype=torch.float64)
        squares += y.double().square().sum(0)
    product = (sums[:, None] - product).T.contiguous()
    return Moments(product, sums, squares, shift.double(), len(masks))  # X = 1 - Z
