"""Verification of every chunk of a run, and removal of damaged chunks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from coar.errors import CorruptRunError
from coar.store import arrays
from coar.store.disk import sweep
from coar.store.gradients import ARRAYS, GRADIENTS, OUTPUTS, MaskGradients
from coar.store.layout import SUMS
from coar.store.run import ROW_COLUMNS, Run, pack
from coar.store.sealed import MovedChunkError
from coar.store.storage_errors import storage_errors

REMADE_BY_COLLECT = ("outputs", "masks", "base_output", *ARRAYS)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a run.

    Attributes:
        array: The array concerned.
        chunk: Path of the chunk inside the run.
        what: `missing`, `damaged`, `from elsewhere`, `partly filled`, `not from its seed`, `not finite` or
            `not as planned`.
        mended_by: The command that makes a deleted chunk again; empty when it must be restored from a copy.
    """

    array: str
    chunk: str
    what: str
    mended_by: str


def verify(run: Run) -> list[Problem]:
    """Read every chunk of every array; return chunks that are missing, damaged, or contradict the seed or the plan.

    Raises:
        CorruptRunError: When the description of an array is damaged, so its chunks cannot be read.
    """
    problems: list[Problem] = []
    mask_gradients = MaskGradients(run)
    expected = ARRAYS if mask_gradients.rounds else ()
    for name in sorted({*arrays.array_names(run.group), *expected}):
        try:
            array = run.array(name, rounds=len(mask_gradients.rounds))
        except CorruptRunError:
            if not name.startswith("attributions/"):
                raise
            problems.append(Problem(name, f"{name}/zarr.json", "damaged", _mended_by(name)))
            continue
        stored = arrays.stored_chunks(array)
        planned = _collected(run, mask_gradients, name) if name in REMADE_BY_COLLECT else set(arrays.all_chunks(array))
        for key in sorted(stored | planned):
            what = _look(run, mask_gradients, array, name, key) if key in stored else "missing"
            if what:
                problems.append(Problem(name, arrays.chunk_path(array, key), what, _mended_by(name)))
    if not run.rows_intact() and not any(problem.array in ROW_COLUMNS for problem in problems):
        problems.append(Problem(ROW_COLUMNS[0], ROW_COLUMNS[0], "not as planned", _mended_by(ROW_COLUMNS[0])))
    return problems


def _collected(run: Run, mask_gradients: MaskGradients, name: str) -> set[arrays.Chunk]:
    """Return an array's chunks in a complete run; for arrays stored with outputs, those whose outputs are stored."""
    if name in GRADIENTS:
        done = arrays.stored_chunks(run.array(OUTPUTS)) & mask_gradients.chunks(OUTPUTS)
        return {(number, block, 0) for number, _, block in done}
    if name == OUTPUTS:
        return mask_gradients.chunks(name)
    outputs = {tuple(unit) for unit in run.units()}
    if name == "outputs":
        return outputs
    stored = arrays.stored_chunks(run.array("outputs")) & outputs
    if name == "masks":
        return {(i, 0) for i, j in stored if j == 0}
    return {(j,) for i, j in stored if i == 0}


def repair(run: Run, problems: list[Problem]) -> list[Problem]:
    """Delete damaged chunks that can be made again, and fits with damaged chunks; return the problems that need a copy.

    The next collect makes deleted units again, and the next fit deleted fits.
    """
    with run.lock():
        now = Run.open(run.path)  # another process may have extended it since
        if isinstance(run.path, Path):
            with storage_errors(run.path):
                sweep(run.path)
        if any(problem.array in ROW_COLUMNS for problem in problems):
            now.extend(now.plan)
        for problem in problems:
            if _made_in_chunks(problem.array) and problem.what not in ("missing", "partly filled"):
                array = now.array(problem.array)
                key = tuple(int(part) for part in problem.chunk.removeprefix(f"{array.path}/c/").split("/"))
                arrays.delete_chunk(array, key)
            elif problem.array.startswith("attributions/"):
                fit = "/".join(problem.array.split("/")[:2])
                if fit in now.group:
                    del now.group[fit]
    return [problem for problem in problems if not problem.mended_by]


def _made_in_chunks(name: str) -> bool:
    """Return whether single chunks of an array are made again once they are deleted."""
    return name in REMADE_BY_COLLECT or name.startswith(f"{SUMS}/")


def _mended_by(name: str) -> str:
    if name in REMADE_BY_COLLECT:
        return "coar collect"
    if name.startswith("attributions/"):
        return "coar fit or coar baselines"
    if name.startswith(f"{SUMS}/"):
        return "coar fit --worker"
    return "coar verify --repair" if name in ROW_COLUMNS else ""


def _look(run: Run, mask_gradients: MaskGradients, array: zarr.Array[Any], name: str, key: arrays.Chunk) -> str:
    """Return the problem of a stored chunk, or an empty string."""
    region = [slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(key, array.chunks, array.shape, strict=True)]
    try:
        values = arrays.read(array, *region)
    except CorruptRunError as error:
        return "from elsewhere" if isinstance(error.__cause__, MovedChunkError) else "damaged"
    rows = region[0]
    if name in ARRAYS:
        return _look_at_gradients(mask_gradients, name, key[0], region[-1 if name == OUTPUTS else 1], values)
    if name in ("masks", "outputs"):
        return _look_at_rows(run, name, rows.start, values[: len(run.plan) - rows.start])
    if name == "base_output" and not np.isfinite(values).all():
        return "not finite"
    if name in ROW_COLUMNS:
        pieces = run.plan.pieces(rows.start, rows.stop)
        expected = [value for piece in pieces for value in [getattr(piece, name)] * piece.count]
        return "" if list(values) == expected else "not as planned"
    return ""


def _look_at_rows(run: Run, name: str, start: int, values: np.ndarray) -> str:
    """Return the problem of rows of masks or outputs, or an empty string."""
    planned = pack(run.draw(slice(start, start + len(values)))) if name == "masks" else None
    right = (np.isfinite(values) if planned is None else values == planned).all(axis=1)
    if right.all():
        return ""
    cuts = [extent - start for extent in run.plan.extents[:-1] if start < extent < start + len(values)]
    if any(right[:cut].all() and _blank(values[cut:]) for cut in cuts):
        return "partly filled"
    return "not finite" if planned is None else "not from its seed"


def _look_at_gradients(
    mask_gradients: MaskGradients, name: str, number: int, examples: slice, values: np.ndarray
) -> str:
    """Return the problem of one round's outputs or mean gradients, or an empty string."""
    if number >= len(mask_gradients.rounds):
        return "not as planned"
    values = values[0]
    if name == OUTPUTS:
        planned = np.repeat(np.arange(len(values))[:, None] < mask_gradients.rounds[number], values.shape[1], axis=1)
    else:
        planned = mask_gradients.counts([number], examples)[GRADIENTS.index(name)] > 0
    if not np.isfinite(values[planned]).all():
        return "not finite"
    return "" if np.isnan(values[~planned]).all() else "not as planned"  # a mean of no mask gradients is NaN


def _blank(values: np.ndarray) -> bool:
    """Return whether rows hold only fill values."""
    return bool((np.isnan(values) if values.dtype.kind == "f" else values == 0).all())
