"""Outputs under masks, example by example, as one linear operator on weights."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate, groupby

import torch
from torch import Tensor

from coar.store.gradients import deal

TILE_NUMBERS = 2**20  # entries of masks of all rows that are made float32 together on a CPU, whose cache holds them
MORE_TILE_NUMBERS = 2**26  # the same on other devices, which need more work at a time
LEAST_TILE = 64  # components of a tile


@dataclass(frozen=True)
class RowBlock:
    """Rows of one fold, of mask groups that have equally many examples.

    Attributes:
        fold: The fold that the rounds are dealt to.
        rounds: Which of the rows each round has, by its number; rows of different rounds are independent.
        examples: The examples, one mask group after another.
        masks: (groups, rows, components) booleans of each tile, which are read faster than columns of one table.
        mean: (groups, components) means of the groups' masks in all rounds.
        outputs: (groups, members, rows) outputs less their mean in all rounds, in units of each example's spread.
    """

    fold: int
    rounds: dict[int, slice]
    examples: slice
    masks: tuple[Tensor, ...]
    mean: Tensor
    outputs: Tensor

    def design(self, tile: int, groups: slice = slice(None), space: Tensor | None = None) -> Tensor:
        """Return the (groups, rows, components) masks of a tile less their mean, as the outputs are less theirs.

        Args:
            tile: Number of the tile.
            groups: The mask groups.
            space: Where to make it, with room for as many components or more; by default in new memory.
        """
        numbers, some = self.masks[tile][groups].view(torch.uint8), self.components(tile)
        # Numbers become float32 five times as fast as booleans.
        made = numbers.float() if space is None else space[..., : numbers.shape[-1]].copy_(numbers)
        return made.sub_(self.mean[groups, None, some])

    def components(self, tile: int) -> slice:
        """Return the components of a tile."""
        start = tile * self.masks[0].shape[-1]
        return slice(start, start + self.masks[tile].shape[-1])

    def by_group(self, values: Tensor) -> Tensor:
        """Return (..., examples, columns) values of the block's examples as (..., groups, members, columns)."""
        groups, members, _ = self.outputs.shape
        return values.view(*values.shape[:-2], groups, members, values.shape[-1])


@dataclass(frozen=True)
class Rows:
    """Rows of a set of examples, as one linear operator on their (folds, examples, components) weights.

    Attributes:
        blocks: The rows by fold, and by mask groups that have equally many examples.
        shape: Folds, examples, components.
        kept: Share of the components that a mask keeps.
    """

    blocks: tuple[RowBlock, ...]
    shape: tuple[int, int, int]
    kept: float

    @classmethod
    def of(
        cls, masks: Sequence[Tensor], outputs: Sequence[Tensor], groups: Tensor, *, folds: int, kept: float
    ) -> "Rows":
        """Arrange the rows of all rounds, dealt into folds of about as many rows by `deal`.

        Args:
            masks: (rows, mask groups, components) booleans of each round.
            outputs: (rows, examples) outputs of each round, less their mean in all rounds, in units of their spread;
                rows are computed with where they are.
            groups: (examples,) mask group of each example; examples of one group are adjacent (see `group_order`).
            folds: Number of folds.
            kept: Share of the components that a mask keeps.
        """
        device, sizes = outputs[0].device, [len(part) for part in masks]
        numbers, counts = torch.unique_consecutive(groups, return_counts=True)
        mean = reduce(torch.add, (part.sum(0) for part in masks)) / sum(sizes)  # (mask groups, components)
        rows = sum(sizes) * len(numbers)
        step = max((TILE_NUMBERS if device.type == "cpu" else MORE_TILE_NUMBERS) // rows, LEAST_TILE)
        blocks = []
        for chosen, examples in _equal_groups(numbers, counts):
            for fold, rounds in enumerate(deal(sizes, folds)):
                ends = list(accumulate(sizes[i] for i in rounds))
                places = {i: slice(end - sizes[i], end) for i, end in zip(rounds, ends, strict=True)}
                own = torch.cat([masks[i][:, chosen] for i in rounds]).transpose(0, 1)
                tiles = tuple(tile.contiguous().to(device) for tile in torch.split(own, step, dim=2))
                values = torch.cat([outputs[i][:, examples] for i in rounds])
                y = values.T.reshape(len(chosen), -1, len(values)).contiguous()
                blocks.append(RowBlock(fold, places, examples, tiles, mean[chosen].float().to(device), y))
        return cls(tuple(blocks), (folds, len(groups), mean.shape[1]), kept)

    def dealt(self, folds: int) -> "Rows":
        """Return the same rows in fewer folds, each made of whole ones: fold i goes to fold i modulo `folds`."""
        blocks = tuple(replace(block, fold=block.fold % folds) for block in self.blocks)
        return Rows(blocks, (folds, *self.shape[1:]), self.kept)

    def without(self, fold: int | None) -> "Rows":
        """Return the rows of the other folds."""
        return replace(self, blocks=tuple(block for block in self.blocks if block.fold != fold))

    def folds(self) -> list[int]:
        """Return the numbers of the folds that have rows here."""
        return sorted({block.fold for block in self.blocks})

    def rounds(self) -> list[int]:
        """Return the numbers of the rounds that have rows here."""
        return sorted({number for block in self.blocks for number in block.rounds})

    def count(self) -> float:
        """Return the mean number of rows of an example."""
        return sum(block.outputs.numel() for block in self.blocks) / self.shape[1]

    def variance(self) -> float:
        """Return the variance of a mask's entry."""
        return self.kept * (1 - self.kept)

    def outputs(self) -> list[Tensor]:
        """Return the outputs of each block."""
        return [block.outputs for block in self.blocks]

    def parts(self, values: Tensor) -> list[Tensor]:
        """Return one value for each output, in the order of blocks, as (groups, members, rows) of each block."""
        parts = torch.split(values, [block.outputs.numel() for block in self.blocks])
        return [part.view_as(block.outputs) for part, block in zip(parts, self.blocks, strict=True)]

    def tiles(self, folds: Collection[int]) -> "Iterator[Tile]":
        """Yield the masks of some folds tile by tile; a tile is valid until the next one is made."""
        chosen = [i for i, block in enumerate(self.blocks) if block.fold in folds]
        space = {i: torch.empty_like(self.blocks[i].masks[0], dtype=torch.float32) for i in chosen}
        for number in range(len(self.blocks[0].masks) if chosen else 0):
            made = {i: self.blocks[i].design(number, space=space[i]) for i in chosen}
            yield Tile(self, self.blocks[0].components(number), made)

    def predict(self, weights: Callable[[int], Tensor]) -> list[Tensor]:
        """Map each fold's (examples, components) weights to (groups, members, rows) predictions of each block."""
        out = [torch.zeros_like(block.outputs) for block in self.blocks]
        for fold in self.folds():
            own = weights(fold)
            for tile in self.tiles([fold]):
                tile.predict(fold, own[:, tile.some], out)
        return out

    def residual(self, weights: Callable[[int], Tensor]) -> list[Tensor]:
        """Return what each fold's (examples, components) weights leave of the outputs."""
        return subtract(self.outputs(), self.predict(weights))


@dataclass(frozen=True)
class Tile:
    """The masks less their mean of some components, which all products with these components go through.

    Attributes:
        rows: The rows.
        some: The components.
        designs: (groups, rows, components) of the blocks of some folds, by their number.
    """

    rows: Rows
    some: slice
    designs: dict[int, Tensor]

    def predict(self, fold: int, weights: Tensor, out: Sequence[Tensor]) -> None:
        """Add what (examples, components) weights of a fold predict to (groups, members, rows) sums of each block."""
        for number, design in self.designs.items():
            block = self.rows.blocks[number]
            if block.fold == fold:
                out[number].baddbmm_(block.by_group(weights[block.examples]), design.mT)

    def adjoint(self, fold: int, values: Sequence[Tensor]) -> Tensor:
        """Return (examples, components) sums of a fold's values: the transpose of its predictions."""
        found = values[0].new_zeros(self.rows.shape[1], self.some.stop - self.some.start)
        for number, design in self.designs.items():
            block = self.rows.blocks[number]
            if block.fold == fold:
                block.by_group(found[block.examples]).baddbmm_(values[number], design)
        return found


def subtract(values: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Return the differences, block by block."""
    return [value - other for value, other in zip(values, others, strict=True)]


def sum_of_squares(values: Sequence[Tensor]) -> float:
    """Return the sum of the squares of all entries of all blocks."""
    return sum(float(value.square().sum()) for value in values)


def group_order(groups: Tensor) -> Tensor:
    """Return the order in which (examples,) mask groups are adjacent, and those of equal size follow each other."""
    sizes = torch.bincount(groups)[groups]
    return torch.argsort(sizes * (int(groups.max()) + 1) + groups, stable=True)


def _equal_groups(numbers: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Cut mask groups into stretches of equal size, with the examples of each stretch."""
    start = at = 0
    for size, same in groupby(counts.tolist()):
        many = len(list(same))
        yield numbers[at : at + many], slice(start, start + many * size)
        at, start = at + many, start + many * size
