"""Fitted attributions inside a run: one group each under `attributions/`, written in blocks of examples."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import zarr

from coar.errors import CorruptRunError, IncompleteRunError, RunError, SettingsError
from coar.renamed import refuse_value
from coar.store import arrays
from coar.store.run import Run

GROUP = "attributions"
ATTRIBUTE = "coar"
CHUNK_BYTES = 8 * 2**20
FIELDS = ("weight", "intercept", "standard_error", "penalty")
PER_COMPONENT = ("weight", "standard_error")
Kind = type | tuple[type, ...]
NUMBER = (int, float)
NEEDED: dict[str, Kind] = {"method": str, "masks": int}  # facts of a finished fit, and their types
ALLOWED: dict[str, Kind] = {
    "ablated_fraction": NUMBER,
    "gradients": int,
    "validation": NUMBER,
    "validation_masks": int,
    "prior_quality": dict,
}
QUALITY = ("explained", "error", "deviation", "reachable")  # numbers of `prior_quality`


def fit_names(run: Run) -> list[str]:
    """Return the names of the run's finished fits."""
    with _readable(run, GROUP):
        if not arrays.there_is(run.group, GROUP):
            return []
        names = sorted(cast(zarr.Group, run.group[GROUP]).group_keys())
    return [name for name in names if fit_facts(run, name).get("state") == "ready"]


def fit_facts(run: Run, name: str) -> dict[str, Any]:
    """Return the facts of a fit, such as state, method and masks; empty when there is no such fit.

    Raises:
        CorruptRunError: When the fit's description is damaged.
    """
    key = f"{GROUP}/{name}"
    with _readable(run, key):
        if not arrays.there_is(run.group, key):
            return {}
        return _checked(dict(cast(dict[str, Any], run.group[key].attrs.get(ATTRIBUTE, {}))))


def _checked(facts: dict[str, Any]) -> dict[str, Any]:
    """Return facts; raise `TypeError` when facts of a finished fit are missing or have other types."""
    if facts.get("state") == "ready":
        wrong = [name for name, kind in NEEDED.items() if not isinstance(facts.get(name), kind)]
        wrong += [name for name, kind in ALLOWED.items() if name in facts and not isinstance(facts[name], kind)]
        quality = facts.get("prior_quality", {})
        if wrong or (quality and not all(isinstance(quality.get(name), NUMBER) for name in QUALITY)):
            raise TypeError(f"wrong {', '.join(wrong) or 'prior_quality'}")
    return facts


@contextmanager
def _readable(run: Run, key: str) -> Iterator[None]:
    """Turn Zarr's errors about a damaged description into `CorruptRunError`."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CorruptRunError(
            f"the description of a fit in {key} of {run.path} is wrong ({error!r}); delete its folder, and fit again"
        ) from error


def add_fit_facts(run: Run, name: str, **facts: Any) -> None:
    """Add facts to a finished fit."""
    group = cast(zarr.Group, run.group[f"{GROUP}/{name}"])
    group.attrs[ATTRIBUTE] = {**fit_facts(run, name), **facts}


def fit_fields(run: Run, name: str) -> list[str]:
    """Return the names of the fit's arrays, among `FIELDS`."""
    return [field for field in FIELDS if arrays.there_is(run.group, f"{GROUP}/{name}/{field}")]


def fit_array(run: Run, name: str, array: str) -> zarr.Array[Any]:
    """Open an array of a finished fit; raise `RunError` when there is no such fit or array."""
    if fit_facts(run, name).get("state") != "ready":
        refuse_value("fit", name)
        finished = ", ".join(fit_names(run)) or "none"
        raise RunError(f"{run.path} has no finished fit {name!r} (finished: {finished}); make it with 'coar fit'")
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
    return max(1, min(run.n_examples, CHUNK_BYTES // (4 * run.n_components)))


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
        facts: Method, number of masks, and other properties of the fit.
    """

    def __init__(self, run: Run, name: str, fields: tuple[str, ...], facts: dict[str, Any]) -> None:
        self._run, self._name = run, name
        self._facts = {"state": "ready", **facts}
        n, d, rows = run.n_examples, run.n_components, chunk_rows(run)
        self._group = run.group.create_group(
            f"{GROUP}/{name}", overwrite=True, attributes={ATTRIBUTE: {"state": "fitting"}}
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
        self._group.attrs[ATTRIBUTE] = self._facts
