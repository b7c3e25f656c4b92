"""Fitted attributions inside a run: one group each under `attributions/`, written in blocks of examples."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import zarr

from coar._version import __version__
from coar.errors import CorruptRunError, IncompleteRunError, RunError, SettingsError
from coar.renamed import refuse_value
from coar.store import arrays
from coar.store.records import FitRecord, FitRequest
from coar.store.run import Run

GROUP = "attributions"
ATTRIBUTE = "coar"
CHUNK_BYTES = 8 * 2**20
FIELDS = ("weight", "intercept", "standard_error", "penalty")
PER_COMPONENT = ("weight", "standard_error")


def finished_fits(run: Run) -> dict[str, FitRecord]:
    """Return the records of the run's finished fits by name, in alphabetical order."""
    with _readable(run, GROUP):
        if not arrays.there_is(run.group, GROUP):
            return {}
        names = sorted(cast(zarr.Group, run.group[GROUP]).group_keys())
    return {name: record for name in names if (record := fit_record(run, name)) is not None}


def fit_names(run: Run) -> list[str]:
    """Return the names of the run's finished fits."""
    return list(finished_fits(run))


def fit_record(run: Run, name: str) -> FitRecord | None:
    """Return the record of a finished fit, such as its method and masks; None when there is no such fit.

    Raises:
        CorruptRunError: When the fit's description is damaged: a key is missing or has another type.
    """
    key = f"{GROUP}/{name}"
    with _readable(run, key):
        if not arrays.there_is(run.group, key):
            return None
        stored = dict(cast(dict[str, Any], run.group[key].attrs.get(ATTRIBUTE, {})))
        return FitRecord.read(stored) if stored.get("state") == "ready" else None


@contextmanager
def _readable(run: Run, key: str) -> Iterator[None]:
    """Turn Zarr's errors about a damaged description into `CorruptRunError`."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CorruptRunError(
            f"the description of a fit in {key} of {run.path} is wrong ({error!r}); delete its folder, and fit again"
        ) from error


def finished_fit(run: Run, name: str) -> FitRecord:
    """Return the record of a finished fit; raise `RunError` when there is no such fit."""
    record = fit_record(run, name)
    if record is None:
        refuse_value("fit", name)
        finished = ", ".join(fit_names(run)) or "none"
        raise RunError(f"{run.path} has no finished fit {name!r} (finished: {finished}); make it with 'coar fit'")
    return record


def add_validation(run: Run, name: str, correlation: float, masks: int) -> None:
    """Store a finished fit's mean correlation on validation masks with the fit."""
    scored = finished_fit(run, name).model_copy(update={"validation": correlation, "validation_masks": masks})
    cast(zarr.Group, run.group[f"{GROUP}/{name}"]).attrs[ATTRIBUTE] = scored.stored()


def fit_fields(run: Run, name: str) -> list[str]:
    """Return the names of the fit's arrays, among `FIELDS`."""
    return [field for field in FIELDS if arrays.there_is(run.group, f"{GROUP}/{name}/{field}")]


def fit_array(run: Run, name: str, array: str) -> zarr.Array[Any]:
    """Open an array of a finished fit; raise `RunError` when there is no such fit or array."""
    finished_fit(run, name)
    key = f"{GROUP}/{name}/{array}"
    if array not in fit_fields(run, name):
        raise RunError(f"fit {name!r} of {run.path} has no {array}; only regressions have one")
    return run.array(key)


def read_fit(run: Run, name: str, array: str, *slices: slice) -> np.ndarray:
    """Read a region of a fit's array; raise when a chunk is damaged or missing."""
    found = fit_array(run, name, array)
    values = arrays.read(found, *slices)
    if np.isnan(values).any():
        raise IncompleteRunError(
            f"a chunk of {found.path} in {run.path} is missing; run 'coar verify --repair' and fit again"
        )
    return values


def check_name(name: str) -> str:
    """Return the name, or raise `SettingsError` when it cannot name a fit."""
    if not name.replace("-", "_").isidentifier():
        raise SettingsError(f"{name!r} cannot name a fit; use letters, digits, '_' and '-', and begin with a letter")
    return name


def chunk_rows(run: Run) -> int:
    """Return how many examples a fit's chunks hold: blocks of examples are written in multiples of this."""
    return rows_of_chunk(run.n_examples, run.n_components)


def rows_of_chunk(examples: int, components: int) -> int:
    """Return how many examples a chunk of a fit holds, for a run of this size."""
    return max(1, min(examples, CHUNK_BYTES // (4 * components)))


def blocks_of(run: Run) -> list[slice]:
    """Return the blocks of examples that are solved together; each fills a chunk of a fit."""
    n, step = run.n_examples, chunk_rows(run)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def write_block(run: Run, name: str, examples: slice, **fields: np.ndarray) -> None:
    """Write whole chunks of an unfinished fit: (examples, components) or (examples,) values by field."""
    for field, values in fields.items():
        array = run.array(f"{GROUP}/{name}/{field}")
        wide = (slice(None),) if values.ndim == 2 else ()
        arrays.write(array, values.astype(np.float32), examples, *wide)


class FitWriter:
    """Writes a fit block by block, in place of an older one; the fit exists once `finish` has been called.

    Args:
        run: The run to write into.
        name: Name of the fit.
        fields: Which of `weight`, `standard_error`, `intercept`, `penalty` it has.
        record: Method, number of masks, and other properties of the fit.
        begun: What identifies the fit while it is written, so that an interrupted one can go on.
        goes_on: Whether to keep what an interrupted fit has written.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        fields: tuple[str, ...],
        record: FitRecord,
        *,
        begun: str = "",
        goes_on: bool = False,
    ) -> None:
        self._run, self._name = run, name
        self._record = record
        if goes_on:
            self._group = cast(zarr.Group, run.group[f"{GROUP}/{name}"])
            return
        n, d, rows = run.n_examples, run.n_components, chunk_rows(run)
        self._group = run.group.create_group(
            f"{GROUP}/{name}", overwrite=True, attributes={ATTRIBUTE: {"state": "fitting", "begun": begun}}
        )
        for field in fields:
            wide = field in PER_COMPONENT
            arrays.create_array(
                self._group,
                field,
                shape=(n, d) if wide else (n,),
                chunks=(rows, d) if wide else (rows,),
                dtype="float32",
                dimensions=("example", "component") if wide else ("example",),
            )

    def write(self, examples: slice, **fields: np.ndarray) -> None:
        """Write whole chunks of examples: (examples, components) or (examples,) values by field."""
        write_block(self._run, self._name, examples, **fields)

    def finish(self) -> None:
        """Mark the fit as finished."""
        self._group.attrs[ATTRIBUTE] = self._record.stored()


@dataclass(frozen=True)
class BegunFit:
    """A fit that is about to be written, and what an interrupted attempt at it has written already.

    Attributes:
        run: The run.
        name: Name of the fit.
        fields: Names of its arrays.
        key: What identifies the fit: method, data, and way of computing, in this version.
        stored: The chunks of examples of which all arrays are stored; empty where no attempt at this fit was begun.
        goes_on: Whether there was such an attempt.
    """

    run: Run
    name: str
    fields: tuple[str, ...]
    key: str
    stored: frozenset[int]
    goes_on: bool

    @classmethod
    def of(cls, run: Run, name: str, fields: tuple[str, ...], request: FitRequest, plan: str) -> Self:
        """Look for an interrupted attempt at a fit."""
        about = {**request.stored(), "plan": plan, "version": __version__, "chunk": chunk_rows(run)}
        key, place = json.dumps(about, sort_keys=True), f"{GROUP}/{name}"
        with _readable(run, place):
            there = arrays.there_is(run.group, place)
            state = dict(cast(dict[str, Any], run.group[place].attrs.get(ATTRIBUTE, {}))) if there else {}
        paths = [f"{place}/{field}" for field in fields]
        goes_on = state == {"state": "fitting", "begun": key} and all(arrays.there_is(run.group, p) for p in paths)
        stored = [{chunk[0] for chunk in arrays.stored_chunks(run.array(p))} for p in paths] if goes_on else [set()]
        return cls(run, name, fields, key, frozenset(set.intersection(*stored)), goes_on)

    def missing(self, blocks: Sequence[slice]) -> list[slice]:
        """Return the blocks of examples of which a chunk is not stored."""
        step = chunk_rows(self.run)
        return [b for b in blocks if not self.stored.issuperset(range(b.start // step, -(-b.stop // step)))]

    def writer(self, record: FitRecord) -> FitWriter:
        """Return the writer of what is missing."""
        return FitWriter(self.run, self.name, self.fields, record, begun=self.key, goes_on=self.goes_on)
