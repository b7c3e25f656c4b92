"""Outputs under masks, example by example, as one linear operator on weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch
from torch import Tensor

from coar.store.gradients import deal

BLOCK_NUMBERS = 16 * 2**20  # entries of a block's design, at most, where a block has several mask groups or rounds
TILE_NUMBERS = 2**17  # entries of a design that are made together, which a processor's cache holds


@dataclass(frozen=True)
class RowBlock:
    """Rows of rounds of one fold, of mask groups that have equally many examples.

    Attributes:
        fold: The fold that the rounds are dealt to.
        rounds: Which of the rows each round has, by its number; rows of different rounds are independent.
        examples: The examples, one mask group after another.
        masks: (groups, rows, components) booleans.
        mean: (groups, components) means of the groups' masks in all rounds.
        outputs: (groups, members, rows) outputs less their mean in all rounds, in units of each example's spread.
        centred: (groups, rows, components) float32 masks less their mean; None where memory is short.
    """

    fold: int
    rounds: dict[int, slice]
    examples: slice
    masks: Tensor
    mean: Tensor
    outputs: Tensor
    centred: Tensor | None = None

    def design(self) -> Tensor:
        """Return the (groups, rows, components) masks less their mean, as the outputs are less theirs."""
        return self.masks.float() - self.mean[:, None] if self.centred is None else self.centred

    def predict(self, weights: Tensor) -> Tensor:
        """Map the block's (examples, components) weights to (groups, members, rows) predictions."""
        out, own = torch.zeros_like(self.outputs), self.by_group(weights)
        for some, tile in self._tiles():
            out.baddbmm_(own[..., some], tile.mT)
        return out

    def add_adjoint(self, values: Tensor, out: Tensor) -> None:
        """Add the transpose of `predict` of (groups, members, rows) values to (examples, components) ones."""
        own = self.by_group(out)
        for some, tile in self._tiles():
            own[..., some].baddbmm_(values, tile)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield components, and the design of these; each is valid until the next."""
        if self.centred is not None:
            yield slice(None), self.centred
            return
        groups, rows, components = self.masks.shape
        step = min(max(TILE_NUMBERS // (groups * rows), 1), components)
        space = torch.empty(groups, rows, step)
        for start in range(0, components, step):
            some = slice(start, min(start + step, components))
            tile = space[..., : some.stop - start].copy_(self.masks[..., some])
            yield some, tile.sub_(self.mean[:, None, some])

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
        cls,
        masks: Sequence[Tensor],
        outputs: Sequence[Tensor],
        groups: Tensor,
        *,
        folds: int,
        kept: float,
        designs: bool = True,
    ) -> "Rows":
        """Arrange the rows of all rounds, dealt into folds of about as many rows by `deal`.

        Args:
            masks: (rows, mask groups, components) booleans of each round.
            outputs: (rows, examples) outputs of each round, less their mean in all rounds, in units of their spread.
            groups: (examples,) mask group of each example; examples of one group are adjacent (see `group_order`).
            folds: Number of folds.
            kept: Share of the components that a mask keeps.
            designs: Keep designs in float32; otherwise every product makes them again, a part at a time.
        """
        sizes, components = [len(part) for part in masks], masks[0].shape[2]
        joined = _joined(sizes, folds, max(BLOCK_NUMBERS // components, 1))
        most = max(sum(sizes[i] for i in rounds) for _, rounds in joined)
        numbers, counts = torch.unique_consecutive(groups, return_counts=True)
        mean = torch.stack([part.sum(0) for part in masks]).sum(0) / sum(sizes)  # (mask groups, components)
        blocks, together = [], max(BLOCK_NUMBERS // (most * components), 1)
        for chosen, examples in _equal_groups(numbers, counts, together):
            for fold, rounds in joined:
                own = torch.cat([masks[i][:, chosen] for i in rounds]).transpose(0, 1).contiguous()
                values = torch.cat([outputs[i][:, examples] for i in rounds])
                y = values.T.reshape(len(chosen), -1, len(values)).contiguous()
                ends = list(accumulate(sizes[i] for i in rounds))
                places = {i: slice(end - sizes[i], end) for i, end in zip(rounds, ends, strict=True)}
                block = RowBlock(fold, places, examples, own, mean[chosen].float(), y)
                blocks.append(replace(block, centred=block.design()) if designs else block)
        return cls(tuple(blocks), (folds, len(groups), components), kept)

    def dealt(self, folds: int) -> "Rows":
        """Return the same rows in fewer folds, each made of whole ones: fold i goes to fold i modulo `folds`."""
        blocks = tuple(replace(block, fold=block.fold % folds) for block in self.blocks)
        return Rows(blocks, (folds, *self.shape[1:]), self.kept)

    def split(self, fold: int) -> tuple["Rows", "Rows"]:
        """Return the rows of the other folds, and those of one fold."""
        others = tuple(block for block in self.blocks if block.fold != fold)
        own = tuple(block for block in self.blocks if block.fold == fold)
        return replace(self, blocks=others), replace(self, blocks=own)

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

    def predictions(self, weights: Callable[[int], Tensor]) -> list[Tensor]:
        """Map each fold's (examples, components) weights to (groups, members, rows) predictions of each block."""
        found: dict[int, Tensor] = {}
        for fold in self.folds():
            own = weights(fold)
            for number, block in enumerate(self.blocks):
                if block.fold == fold:
                    found[number] = block.predict(own[block.examples])
        return [found[number] for number in range(len(self.blocks))]

    def predict(self, weight: Tensor) -> list[Tensor]:
        """Map (folds, examples, components) weights to (groups, members, rows) predictions of each block."""
        return self.predictions(lambda fold: weight[fold])

    def adjoint_of(self, fold: int, values: Sequence[Tensor]) -> Tensor:
        """Return the (examples, components) sums of one fold: the transpose of its predictions."""
        out = torch.zeros(self.shape[1:])
        for block, value in zip(self.blocks, values, strict=True):
            if block.fold == fold:
                block.add_adjoint(value, out[block.examples])
        return out

    def adjoint(self, values: Sequence[Tensor]) -> Tensor:
        """Apply the transpose of `predict`."""
        return torch.stack([self.adjoint_of(fold, values) for fold in range(self.shape[0])])

    def gram(self, fold: int, weight: Tensor) -> Tensor:
        """Apply `predict` and its transpose to the (examples, components) weights of one fold."""
        out = torch.zeros(self.shape[1:])
        for block in self.blocks:
            if block.fold == fold:
                block.add_adjoint(block.predict(weight[block.examples]), out[block.examples])
        return out

    def residual(self, weight: Tensor) -> list[Tensor]:
        """Return what (folds, examples, components) weights leave of the outputs."""
        return subtract(self.outputs(), self.predict(weight))


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


def _joined(sizes: Sequence[int], folds: int, rows: int) -> list[tuple[int, list[int]]]:
    """Deal rounds into folds, and cut each fold into parts of at most so many rows, or of one round."""
    found: list[tuple[int, list[int]]] = []
    for fold, own in enumerate(deal(sizes, folds)):
        total = rows
        for i in own:
            if total + sizes[i] > rows:
                found.append((fold, []))
                total = 0
            found[-1][1].append(i)
            total += sizes[i]
    return found


def _equal_groups(numbers: Tensor, counts: Tensor, together: int) -> Iterator[tuple[Tensor, slice]]:
    """Cut mask groups into stretches of equal size, at most so many in each, with the examples of each stretch."""
    start = at = 0
    for size, same in groupby(counts.tolist()):
        end = at + len(list(same))
        for chosen in torch.split(numbers[at:end], together):
            yield chosen, slice(start, start + len(chosen) * size)
            start += len(chosen) * size
        at = end
