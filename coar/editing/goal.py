"""The goal of an edit: which examples must change, in which direction, and which must stay as they are."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import field_validator, model_validator

from coar.editing.expressions import matching_rows
from coar.errors import CoarError, GoalError
from coar.settings import Settings

ExampleSelector = str | tuple[int, ...]
Columns = Mapping[str, np.ndarray]


class EditGoal(Settings):
    """Targets, references and a direction.

    Attributes:
        targets: The examples to change: positions, or a condition over metadata columns such as `label == 3`.
        references: The examples to leave alone, likewise.
        direction: Whether the targets' output must `decrease` or `increase`.
        groups: Metadata column of the groups of references over which harm is bounded; by default `label` where there
            is such a column, or else all references are one group.
        pairs: Metadata column that matches each target with one reference, such as the same picture without a trigger.
            Where strengths are trained per component, targets to increase are drawn to the margin of their partner.
        clusters: Metadata column of what several examples have in common, such as the picture that they are versions
            of. Standard errors over examples are then cluster-robust: the losses of a cluster are added up before they
            are squared. By default every example counts as independent.
    """

    mistake: ClassVar[type[CoarError]] = GoalError

    targets: ExampleSelector
    references: ExampleSelector
    direction: Literal["decrease", "increase"]
    groups: str | None = None
    pairs: str | None = None
    clusters: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_a_direction(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("direction") is None:
            raise ValueError(
                "no direction is given; add direction='decrease' to lower the targets' output, which makes a model "
                "fail on them, or direction='increase' to raise it"
            )
        return given

    @field_validator("targets", "references", mode="before")
    @classmethod
    def _as_positions(cls, value: Any) -> Any:
        """Turn booleans or positions, in any kind of sequence, into a tuple of positions."""
        if isinstance(value, str):
            return value
        rows = np.asarray(value)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "biu"):
            raise ValueError("give a condition, positions, or one boolean per example")
        return tuple(int(row) for row in (np.flatnonzero(rows) if rows.dtype == bool else rows))

    @property
    def general(self) -> bool:
        """Whether the goal consists of conditions, which apply to any examples with the same columns."""
        return isinstance(self.targets, str) and isinstance(self.references, str)

    def resolve(self, metadata: Columns) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of targets and references, ascending, or in the order of their pairs.

        References that are in no pair come last.

        Args:
            metadata: (examples,) columns.

        Raises:
            GoalError: When either is empty, the two overlap, a column or position is not there, or targets do not
                match one reference each.
        """
        targets = _positions("targets", self.targets, metadata)
        references = _positions("references", self.references, metadata)
        both = np.intersect1d(targets, references)
        if len(both):
            raise GoalError(
                f"{len(both)} examples are targets and references at once, first {both[0]}; take them out of one"
            )
        if self.pairs is None:
            return targets, references
        column = _column("pairs", self.pairs, metadata)
        return _paired(self.pairs, column, targets, references)

    def groups_of(self, metadata: Columns, rows: np.ndarray) -> np.ndarray:
        """Return the group of each of these examples; all the same where there are no groups.

        Raises:
            GoalError: When there is no such column.
        """
        if self.groups is not None:
            found: np.ndarray = _column("groups", self.groups, metadata)[rows]
            return found
        return np.asarray(metadata["label"])[rows] if "label" in metadata else np.zeros(len(rows), dtype=np.int64)

    def clusters_of(self, metadata: Columns) -> np.ndarray:
        """Return the number of each example's cluster, counted from 0; one each where there are no clusters.

        Raises:
            GoalError: When there is no such column.
        """
        if self.clusters is None:
            return np.arange(len(next(iter(metadata.values()))))
        return np.unique(_column("clusters", self.clusters, metadata), return_inverse=True)[1]


def _positions(role: str, selection: ExampleSelector, metadata: Columns) -> np.ndarray:
    n = len(next(iter(metadata.values())))
    if isinstance(selection, str):
        found = np.flatnonzero(matching_rows(selection, metadata))
    else:
        outside = [row for row in selection if not 0 <= row < n]
        if outside:
            raise GoalError(f"{role} names example {outside[0]}, but there are {n}, counted from 0; correct it")
        found = np.unique(np.asarray(selection, dtype=np.int64))
    if not len(found):
        raise GoalError(f"{role}={selection!r} selects none of the {n} examples; widen it")
    return found


def _column(role: str, name: str, metadata: Columns) -> np.ndarray:
    if name not in metadata:
        raise GoalError(f"{role} names column {name!r}; there are {', '.join(sorted(metadata))}: choose one of them")
    return np.asarray(metadata[name])


def _paired(
    name: str, column: np.ndarray, targets: np.ndarray, references: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return targets and references in the order of their common values, and then references without a target."""
    sides = {"target": column[targets], "reference": column[references]}
    for role, values in sides.items():
        found, counts = np.unique(values, return_counts=True)
        if counts.max() > 1:
            twice = found[counts > 1][0].item()
            raise GoalError(
                f"{name} == {twice!r} belongs to {counts.max()} {role}s; pairs need one target and one reference each"
            )
    alone = np.setdiff1d(*sides.values())
    if len(alone):
        raise GoalError(
            f"{len(alone)} values of {name!r}, first {alone[0].item()!r}, belong to a target but to no reference; "
            f"select both of every pair"
        )
    order = np.argsort(sides["reference"])
    matched = np.isin(sides["reference"][order], sides["target"])
    return targets[np.argsort(sides["target"])], references[np.concatenate([order[matched], order[~matched]])]
