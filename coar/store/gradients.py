"""Mask gradients inside a run: outputs and their gradients by the gates, stored in rounds."""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from coar.errors import CorruptRunError, IncompleteRunError, MismatchError, SettingsError
from coar.store import arrays
from coar.store.layout import ROUND, laid_out, unit_specs
from coar.store.plan import Unit
from coar.store.run import Run

log = logging.getLogger(__name__)
MASK_GROUPS = 64  # different masks per mask gradient: example n takes the mask of group n modulo 64
CHUNK_BYTES = 32 * 2**20  # before compression
READ_NUMBERS = 16 * 2**20  # entries of several rounds that are read together, at most
ENTRY = "gradients"
MASKS = "stratified"  # how a round draws them
GRADIENTS = ("gradient_kept", "gradient_ablated")
OUTPUTS = "gradient_outputs"
ARRAYS = (*GRADIENTS, OUTPUTS)


class GradientUnit(NamedTuple):
    """The smallest piece of work on mask gradients: one round on one block of examples."""

    round: int
    example_block: int


AnyUnit = Unit | GradientUnit


class MaskGradients:
    """The mask gradients of a run.

    A round is up to 32 mask gradients whose means are stored together and never written again, so mask
    gradients can be added at any time. Arrays: `gradient_kept` and `gradient_ablated` (round, example, component), mean
    gradients of the output by each gate over the mask gradients that kept and that ablated the component, NaN where
    there was none; `gradient_outputs` (round, mask gradient, example).

    Attributes:
        run: The run.
        rounds: Number of mask gradients in each round.
        rounded: Whether mean gradients are stored with the precision of bfloat16.

    Args:
        run: The run.
        kept_counts: What `kept` returns for the first rounds, when known.
    """

    def __init__(self, run: Run, *, kept_counts: Sequence[np.ndarray] = ()) -> None:
        self.run = run
        self._kept: dict[int, np.ndarray] = dict(enumerate(kept_counts))
        kept = run.entry(ENTRY) or {"rounds": [], "mask_groups": MASK_GROUPS, "masks": MASKS}
        try:
            self.rounds = tuple(int(count) for count in kept["rounds"])
            self.mask_groups = int(kept["mask_groups"])
            self.rounded = kept.get("rounded", False) is True
            if self.mask_groups < 1 or any(not 1 <= count <= ROUND for count in self.rounds):
                raise ValueError(f"rounds of {self.rounds} mask gradients in {self.mask_groups} mask groups")
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptRunError(
                f"the description of the mask gradients of {run.path} is wrong ({error!r}); restore its zarr.json from "
                f"a copy"
            ) from error
        if kept.get("masks") != MASKS:
            raise MismatchError(
                f"the mask gradients of {run.path} have {kept.get('masks', 'independent')} masks, and this version "
                f"makes {MASKS} ones; collect them again, in a new run"
            )

    @property
    def count(self) -> int:
        """Number of mask gradients, collected or planned."""
        return sum(self.rounds)

    def extend(self, total: int, *, rounded: bool = False) -> None:
        """Plan at least `total` mask gradients; arrays grow before the plan, so an interruption leaves the old plan.

        Args:
            total: Number of mask gradients.
            rounded: Store mean gradients with the precision of bfloat16; a run that has mask gradients keeps its own.
        """
        if not self.rounds:
            self.rounded = rounded
        self.lay_out((*self.rounds, *next_rounds(self.count, check_count(total))))

    def lay_out(self, rounds: tuple[int, ...]) -> None:
        """Set the run's rounds; they begin with the rounds that the run has."""
        if rounds == self.rounds:
            return
        sizes = self.run.sizes
        block = max(1, min(sizes.blocks[1], CHUNK_BYTES // (4 * sizes.components)))
        forms = unit_specs(sizes)
        for name in ARRAYS:
            form = forms[name]
            shape, chunks = laid_out(form, sizes, growing=len(rounds), some=block)
            if arrays.there_is(self.run.group, name):
                self.run.array(name).resize(shape)
            else:
                arrays.create_beside_others(
                    self.run.group, name, shape=shape, chunks=chunks, dtype=form.dtype, dimensions=form.dimensions
                )
        entry = {"rounds": list(rounds), "mask_groups": self.mask_groups, "masks": MASKS}
        self.run.set_entry(ENTRY, entry | ({"rounded": True} if self.rounded else {}))
        self.rounds = rounds

    def group_of(self, examples: slice) -> np.ndarray:
        """Return the mask groups of a slice of examples."""
        return np.arange(self.run.n_examples)[examples] % self.mask_groups

    def masks(self, number: int, groups: Sequence[int] | None = None) -> np.ndarray:
        """Return the (mask gradients, mask groups, components) masks of one round, stratified within each group.

        Args:
            number: The round.
            groups: Numbers of the mask groups to return, ascending; by default all.
        """
        first, last = (sum(self.rounds[:end]) * self.mask_groups for end in (number, number + 1))
        at = {group: i for i, group in enumerate(range(self.mask_groups) if groups is None else groups)}
        d, counting = self.run.n_components, number not in self._kept
        masks = np.empty((self.rounds[number], len(at), d), dtype=bool)
        kept = np.zeros((self.mask_groups, d), dtype=np.uint8)
        for group in sorted({*at, *range(min(self.mask_groups, self.run.n_examples))}) if counting else at:
            own = self.run.sampler.stratified("gradient", range(first + group, last, self.mask_groups), d)
            kept[group] = own.sum(0, dtype=np.uint8)  # a round has at most 32
            if group in at:
                masks[:, at[group]] = own
        if counting:
            self._kept[number] = kept
        return masks

    def kept(self, number: int) -> np.ndarray:
        """Return (mask groups, components) uint8 numbers of a round's mask gradients that keep each component.

        A group without examples has zeros.
        """
        if number not in self._kept:
            self.masks(number, ())
        return self._kept[number]

    def kept_in(self, rounds: Sequence[int], groups: np.ndarray) -> np.ndarray:
        """Return (groups, components) float32 numbers of the mask gradients of rounds that keep each component."""
        start = np.zeros((len(groups), self.run.n_components), np.float32)
        return sum((self.kept(i)[groups] for i in rounds), start)

    def counts(self, rounds: Sequence[int], examples: slice) -> np.ndarray:
        """Return (2, examples, components) numbers of the mask gradients of rounds that keep, and that ablate."""
        groups, places = np.unique(self.group_of(examples), return_inverse=True)
        kept = self.kept_in(rounds, groups)
        total = sum(self.rounds[i] for i in rounds)
        return np.stack([kept, total - kept])[:, places]

    def chunks(self, name: str) -> set[arrays.Chunk]:
        """Return the keys of an array's chunks in all rounds."""
        return {_chunk(name, unit) for unit in self.units()}

    def examples_of(self, unit: GradientUnit) -> slice:
        """Return the examples that a unit covers."""
        block = self._array(OUTPUTS).chunks[2]
        return slice(unit.example_block * block, min((unit.example_block + 1) * block, self.run.n_examples))

    def units(self) -> list[GradientUnit]:
        """Return all units, the rounds of one block of examples after another."""
        if not self.rounds:
            return []
        block = self._array(OUTPUTS).chunks[2]
        return [GradientUnit(i, j) for j in range(-(-self.run.n_examples // block)) for i in range(len(self.rounds))]

    def missing_units(self) -> list[GradientUnit]:
        """Return the units that are not stored completely, in the order of `units`."""
        if not self.rounds:
            return []
        stored = {name: arrays.stored_chunks(self._array(name)) for name in ARRAYS}
        return [unit for unit in self.units() if not all(_chunk(name, unit) in stored[name] for name in ARRAYS)]

    def write_unit(self, unit: GradientUnit, kept: np.ndarray, ablated: np.ndarray, outputs: np.ndarray) -> None:
        """Store one unit: (examples, components) mean gradients, and (mask gradients, examples) outputs last."""
        examples, number = self.examples_of(unit), slice(unit.round, unit.round + 1)
        padded = np.full((ROUND, outputs.shape[1]), np.nan, dtype=np.float32)
        padded[: len(outputs)] = outputs
        for name, values in zip(GRADIENTS, (kept, ablated), strict=True):
            means = rounded_to_bfloat16(values) if self.rounded else values
            arrays.write(self._array(name), means[None], number, examples, slice(None))
        arrays.write(self._array(OUTPUTS), padded[None], number, slice(None), examples)

    def whole_rounds(self, gradients: int | None) -> int:
        """Return how many rounds the first `gradients` mask gradients fill, by default all.

        A round that `gradients` covers only in part is left out, with a warning.

        Raises:
            SettingsError: When the run has fewer mask gradients.
        """
        if gradients is None:
            return len(self.rounds)
        if not 0 <= gradients <= self.count:
            raise SettingsError(
                f"{gradients} mask gradients were requested and {self.run.path} has {self.count}; choose up to "
                f"{self.count}, or collect more"
            )
        totals = np.cumsum(self.rounds)
        rounds = int(np.searchsorted(totals, gradients, side="right"))
        used = int(totals[rounds - 1]) if rounds else 0
        if used != gradients:
            log.warning(
                "%d of the %d mask gradients are used: %s stores means of rounds, and the next round has %d",
                used,
                gradients,
                self.run.path,
                self.rounds[rounds],
            )
        return rounds

    def outputs(self, rounds: int, examples: slice) -> np.ndarray:
        """Return the (mask gradients, examples) outputs of the first rounds."""
        if not rounds:
            return np.zeros((0, len(self.group_of(examples))), np.float32)
        most = max(self.rounds[:rounds])
        parts = arrays.read(self._array(OUTPUTS), slice(0, rounds), slice(0, most), examples)
        values = np.concatenate([part[:count] for part, count in zip(parts, self.rounds, strict=False)])
        if not np.isfinite(values).all():
            raise IncompleteRunError(
                f"mask gradients of {self.run.path} have not been collected; run 'coar collect' again"
            )
        return values

    def means(self, rounds: Sequence[int], examples: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return (2, examples, components) mean gradients over some rounds, and the numbers of terms in each.

        Row 0 is over mask gradients that keep the component, row 1 over those that ablate it; a mean of none is 0.
        """
        counts = self.counts(rounds, examples)
        return self.sums([rounds], examples)[0] / np.maximum(counts, 1), counts

    def sums(self, folds: Sequence[Sequence[int]], examples: slice) -> np.ndarray:
        """Return (folds, 2, examples, components) sums of the gradients at both ends over the rounds of each fold.

        Adjacent rounds are read together, as many as `READ_NUMBERS` allows.
        """
        shape = (len(self.group_of(examples)), self.run.n_components)
        fold_of = {i: fold for fold, own in enumerate(folds) for i in own}
        stretches = _stretches(sorted(fold_of), max(READ_NUMBERS // max(math.prod(shape), 1), 1))
        sums = np.zeros((len(folds), 2, *shape), np.float32)
        for end, name in enumerate(GRADIENTS):
            array = self._array(name)
            for start, stop in stretches:
                for i, values in enumerate(arrays.read(array, slice(start, stop), examples, slice(None)), start):
                    count = self.counts([i], examples)[end]
                    found = np.where(count > 0, values, 0)
                    if np.isnan(found).any():
                        raise IncompleteRunError(
                            f"mask gradients of {self.run.path} have not been collected; run 'coar collect' again"
                        )
                    sums[fold_of[i], end] += found * count
        return sums

    def _array(self, name: str) -> Any:
        return self.run.array(name, rounds=len(self.rounds))


def next_rounds(count: int, total: int) -> tuple[int, ...]:
    """Return the sizes of the rounds that lead from `count` mask gradients to `total`.

    Sizes are 2, 2, 2, 2, 4, 4, 8, 8, 16, 16 and then 32 each. So the first 8, 16, 32, 64, 128, 256 and so on of any
    run's mask gradients fill four equal folds of whole rounds, whatever the number collected after them.
    """
    sizes = []
    while count < total:
        sizes.append(min(1 << max(count.bit_length() - 2, 1), ROUND, total - count))
        count += sizes[-1]
    return tuple(sizes)


def rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 values to the nearest bfloat16, to even; the 16 zero bits at the end of each compress to little."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    nearest = ((bits + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isfinite(values), nearest, values)


def deal(sizes: Sequence[int], folds: int) -> list[list[int]]:
    """Deal rounds of these sizes into folds, the largest first, each to the fold with the fewest mask gradients."""
    dealt: list[list[int]] = [[] for _ in range(folds)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        min(dealt, key=lambda fold: sum(sizes[j] for j in fold)).append(i)
    return [sorted(fold) for fold in dealt]


def check_count(total: int) -> int:
    """Return a number of mask gradients; raise `SettingsError` unless it is a whole number, 0 or more."""
    if isinstance(total, bool) or not isinstance(total, int) or total < 0:
        raise SettingsError(f"{total!r} mask gradients were requested; give a whole number, 0 or more")
    return total


def _stretches(numbers: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Return first and last number, plus 1, of stretches of at most so many adjacent ones among ascending numbers."""
    found: list[tuple[int, int]] = []
    for i in numbers:
        if found and found[-1][1] == i and i - found[-1][0] < most:
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return found


def _chunk(name: str, unit: GradientUnit) -> arrays.Chunk:
    """Return the key of a unit's chunk of an array."""
    return (unit.round, 0, unit.example_block) if name == OUTPUTS else (unit.round, unit.example_block, 0)
