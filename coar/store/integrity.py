"""Reading a whole run to see that every chunk is what it should be, and removing what is not."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from coar.errors import CorruptRunError
from coar.store import arrays
from coar.store.run import ROW_COLUMNS, Run

REMADE_BY_COLLECT = ("outputs", "masks", "base_output")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a run.

    Attributes:
        array: The array concerned.
        chunk: Path of the chunk inside the run.
        what: `missing`, `damaged`, `not from its seed`, `not finite` or `not as planned`.
        mended_by: What makes the chunk again once it is deleted; empty when only a copy can bring it back.
    """

    array: str
    chunk: str
    what: str
    mended_by: str


def verify(run: Run) -> list[Problem]:
    """Read every chunk of every array; return what is missing, damaged, or not what seed and plan say."""
    problems: list[Problem] = []
    for name in sorted(_array_names(run.group)):
        array = run.array(name)
        stored = arrays.stored_chunks(array)
        for key in arrays.all_chunks(array):
            what = "missing" if key not in stored else _look(run, array, name, key)
            if what and not (what == "missing" and name in REMADE_BY_COLLECT):
                problems.append(Problem(name, arrays.chunk_path(array, key), what, _mended_by(name)))
    if not run.rows_intact():
        problems.append(Problem(ROW_COLUMNS[0], ROW_COLUMNS[0], "not as planned", _mended_by(ROW_COLUMNS[0])))
    missing = run.missing_units()
    problems += [
        Problem("outputs", arrays.chunk_path(run.array("outputs"), tuple(unit)), "missing", "coar collect")
        for unit in missing
    ]
    return problems


def repair(run: Run, problems: list[Problem]) -> list[Problem]:
    """Delete every damaged chunk that can be made again, and fits that hold one; return what cannot be mended.

    The next collect makes deleted units again, and the next fit deleted fits.
    """
    with run.lock():
        arrays.sweep(run.path)
        if any(problem.array in ROW_COLUMNS for problem in problems):
            run.extend(run.plan)
        for problem in problems:
            if problem.array in REMADE_BY_COLLECT and problem.what != "missing":
                array = run.array(problem.array)
                key = tuple(int(part) for part in problem.chunk.removeprefix(f"{array.path}/c/").split("/"))
                arrays.delete_chunk(array, key)
            elif problem.array.startswith("attributions/"):
                fit = "/".join(problem.array.split("/")[:2])
                if fit in run.group:
                    del run.group[fit]
    return [problem for problem in problems if not problem.mended_by]


def _array_names(group: zarr.Group) -> list[str]:
    return [name for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)]


def _mended_by(name: str) -> str:
    if name in REMADE_BY_COLLECT:
        return "coar collect"
    if name.startswith("attributions/"):
        return "coar fit"
    return "coar verify --repair" if name in ROW_COLUMNS else ""


def _look(run: Run, array: zarr.Array[Any], name: str, key: arrays.Chunk) -> str:
    """Return what is wrong with a stored chunk, or an empty string."""
    region = [slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(key, array.chunks, array.shape, strict=True)]
    try:
        values = arrays.read(array, *region)
    except CorruptRunError:
        return "damaged"
    rows = region[0]
    if name == "masks" and not np.array_equal(values, run.packed_masks(rows.start, rows.stop)):
        return "not from its seed"
    if name == "base_output" and not np.isfinite(values).all():
        return "not finite"
    if name in ROW_COLUMNS:
        pieces = run.plan.pieces(rows.start, rows.stop)
        expected = [value for piece in pieces for value in [getattr(piece, name)] * piece.count]
        return "" if list(values) == expected else "not as planned"
    return ""
