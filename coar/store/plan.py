"""The rows of a run, in order, and their division into units of work."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from coar.errors import SettingsError
from coar.sampling import Sampler, Split, check_fraction

ROW_SPLITS = ("train", "validation", "test")
T = TypeVar("T")


class Segment(NamedTuple):
    """Consecutive rows of the mask axis: masks `first` up to `first + count` of one split at one fraction."""

    split: Split
    ablated_fraction: float
    first: int
    count: int  # type: ignore[assignment]


class Unit(NamedTuple):
    """The smallest piece of work: one block of masks on one block of examples, one chunk of `outputs`."""

    mask_block: int
    example_block: int


@dataclass(frozen=True)
class Plan:
    """The rows of the mask axis, in the order of the requests; new rows are only appended.

    Attributes:
        segments: All rows, as consecutive segments.
        extents: Number of rows after each time the run was created or extended, in ascending order.
    """

    segments: tuple[Segment, ...] = ()
    extents: tuple[int, ...] = ()

    def __len__(self) -> int:
        return sum(segment.count for segment in self.segments)

    def count(self, split: Split, ablated_fraction: float) -> int:
        """Return how many masks of a split and fraction there are."""
        return sum(s.count for s in self.segments if (s.split, s.ablated_fraction) == (split, ablated_fraction))

    def extended(self, requested: dict[tuple[Split, float], int]) -> "Plan":
        """Return a plan with at least these numbers of masks per (split, fraction); nothing is removed."""
        more = []
        for (split, fraction), count in requested.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise SettingsError(f"{count!r} {split} masks were requested; give a whole number, 0 or more")
            have = self.count(split, check_fraction(fraction))
            if count > have:
                more.append(Segment(split, fraction, have, count - have))
        if not more:
            return self
        total = len(self) + sum(segment.count for segment in more)
        return Plan(self.segments + tuple(more), (*self.extents, total))

    def rows(self, split: Split, ablated_fraction: float) -> np.ndarray:
        """Return the row numbers of a split and fraction, in ascending order."""
        parts, start = [np.zeros(0, dtype=np.int64)], 0
        for segment in self.segments:
            if (segment.split, segment.ablated_fraction) == (split, ablated_fraction):
                parts.append(np.arange(start, start + segment.count))
            start += segment.count
        return np.concatenate(parts)

    def fractions(self, split: Split) -> list[float]:
        """Return the ablated fractions at which a split has masks, in the order of the rows."""
        return list(dict.fromkeys(segment.ablated_fraction for segment in self.segments if segment.split == split))

    def pieces(self, start: int, stop: int) -> Iterator[Segment]:
        """Yield rows `start` up to `stop` as segments."""
        at = 0
        for segment in self.segments:
            low, high = max(start, at), min(stop, at + segment.count)
            if low < high:
                yield segment._replace(first=segment.first + low - at, count=high - low)
            at += segment.count

    def masks(self, sampler: Sampler, components: int, start: int, stop: int) -> np.ndarray:
        """Return the (rows, components) boolean masks of rows `start` up to `stop`."""
        parts = [
            sampler.masks(
                piece.split,
                range(piece.first, piece.first + piece.count),
                components,
                ablated_fraction=piece.ablated_fraction,
            )
            for piece in self.pieces(start, stop)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, components), dtype=bool)

    def label(self, row: int) -> str:
        """Return a readable name of a row, such as `train mask 17`."""
        piece = next(self.pieces(row, row + 1))
        return f"{piece.split} mask {piece.first} at ablated fraction {piece.ablated_fraction:g}"

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain lists."""
        return {"segments": [list(segment) for segment in self.segments], "extents": list(self.extents)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Plan":
        """Rebuild a plan from `to_json`; raise `ValueError` or `TypeError` for anything else."""
        if not isinstance(data, dict) or data.keys() != {"segments", "extents"}:
            raise ValueError("a plan has exactly the keys segments and extents")
        plan = cls()
        for split, fraction, first, count in data["segments"]:
            if split not in ROW_SPLITS or int(count) < 1 or int(first) != plan.count(split, fraction):
                raise ValueError(f"segment {[split, fraction, first, count]} does not continue the segments before it")
            segment = Segment(split, check_fraction(float(fraction)), int(first), int(count))
            plan = cls((*plan.segments, segment))
        extents = tuple(int(extent) for extent in data["extents"])
        if (extents or (0,))[-1] != len(plan) or list(extents) != sorted(set(extents)):
            raise ValueError(f"extents {list(extents)} do not lead to {len(plan)} rows")
        return cls(plan.segments, extents)


def check_worker(worker: tuple[int, int]) -> tuple[int, int]:
    """Return a worker's number and the number of workers; raise `SettingsError` unless 1 <= number <= count."""
    number, count = worker
    if not 1 <= number <= count:
        raise SettingsError(f"worker {number}/{count} was given; workers are counted from 1/{count} to {count}/{count}")
    return worker


def dealt(units: list[T], worker: tuple[int, int]) -> list[T]:
    """Return the units of worker k of n, dealt one by one so that missing units are shared evenly too."""
    number, count = worker
    return units[number - 1 :: count]
