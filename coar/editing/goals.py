"""What an edit is for: which examples must change, in which direction, and which must stay as they are."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import field_validator

from coar.errors import CoarError, GoalError
from coar.expressions import select
from coar.settings import Settings

Selection = str | tuple[int, ...]


class EditGoal(Settings):
    """Targets, references and a direction.

    Attributes:
        targets: The examples to change: positions, or a condition over metadata columns such as `label == 3`.
        references: The examples to leave alone, likewise.
        direction: Whether the targets' output shall `decrease` or `increase`.
    """

    mistake: ClassVar[type[CoarError]] = GoalError

    targets: Selection
    references: Selection
    direction: Literal["decrease", "increase"]

    @field_validator("targets", "references", mode="before")
    @classmethod
    def _as_positions(cls, value: Any) -> Any:
        """Turn truth values or positions, in any kind of sequence, into a tuple of positions."""
        if isinstance(value, str):
            return value
        rows = np.asarray(value)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "biu"):
            raise ValueError("give a condition, positions, or one truth value per example")
        return tuple(int(row) for row in (np.flatnonzero(rows) if rows.dtype == bool else rows))

    def resolve(self, metadata: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of targets and references, ascending.

        Args:
            metadata: (examples,) columns.

        Raises:
            GoalError: When either is empty, the two overlap, or a column or position is not there.
        """
        targets = _positions("targets", self.targets, metadata)
        references = _positions("references", self.references, metadata)
        both = np.intersect1d(targets, references)
        if len(both):
            raise GoalError(
                f"{len(both)} examples are targets and references at once, first {both[0]}; take them out of one"
            )
        return targets, references


def _positions(role: str, selection: Selection, metadata: Mapping[str, np.ndarray]) -> np.ndarray:
    n = len(next(iter(metadata.values())))
    if isinstance(selection, str):
        found = np.flatnonzero(select(selection, metadata))
    else:
        outside = [row for row in selection if not 0 <= row < n]
        if outside:
            raise GoalError(f"{role} names example {outside[0]}, but there are {n}, counted from 0; correct it")
        found = np.unique(np.asarray(selection, dtype=np.int64))
    if not len(found):
        raise GoalError(f"{role}={selection!r} selects none of the {n} examples; widen it")
    return found
