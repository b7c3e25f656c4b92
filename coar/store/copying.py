"""Checked copies of runs, and merges of several runs of one study."""

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype

from coar.errors import CorruptRunError, MismatchError, RunError, SettingsError
from coar.store import arrays
from coar.store.gradients import GRADIENTS, OUTPUTS, MaskGradients
from coar.store.integrity import verify
from coar.store.layout import SUMS
from coar.store.lock import write_lock
from coar.store.migration import migrated, study_to_migrate
from coar.store.places import Address, locate, open_store
from coar.store.plan import Plan, Unit
from coar.store.run import Run, stretches
from coar.store.sealed import ROOT, wait
from coar.store.state import begin, end, state_of
from coar.store.storage_errors import insist, storage_errors

AT_ONCE = 16  # objects that are copied concurrently


def copy(source: Run | str | Path | Address, path: str | Path | Address) -> Run:
    """Copy a run, complete or not, to an empty path or address; then check every chunk of the copy.

    A run of format 1 is converted to the present format, with its outputs and fits; the source does not change.
    The conversion omits sums that workers have stored for an unfinished fit.

    Args:
        source: The run, its path or its address.
        path: Path or address of the copy.

    Raises:
        RunError: When the destination is not empty.
        CorruptRunError: When a chunk of the source or of the copy is damaged; the message names the first.
        StorageError: When a disk or an object store fails; the same call starts again.
    """
    origin, place = source.path if isinstance(source, Run) else locate(source), locate(path)
    study = study_to_migrate(origin)
    run = Run.open(origin) if study is None else None
    with write_lock(place):
        if (state := state_of(place)) not in ("nothing", "creating"):
            raise RunError(f"{place} already holds {'a run' if state == 'ready' else state}; copy to another path")
        if run is not None:
            _check_whole(run)
        begin(place, run.fingerprint if run is not None else study or {})
        with storage_errors(place):
            wait(_copy_objects(open_store(origin), open_store(place), study))
        end(place)
    made = Run.open(place)
    _check_whole(made)
    return made


def merge(sources: Sequence[str | Path | Address], *, into: str | Path | Address) -> Run:
    """Merge runs of one study, each with some of the masks, mask gradients or units, into a new run.

    The new run has the rows of all sources. Units that no source has are left for `collect`. Fits are not copied.

    Raises:
        SettingsError: When fewer than two runs are given.
        MismatchError: When the runs differ in study, precision, constants, rounds of mask gradients or size of units,
            or in outputs that two of them have.
        RunError: When the destination is not empty.
        CorruptRunError: When a chunk of a source is damaged.
    """
    if len(sources) < 2:
        raise SettingsError(f"{len(sources)} runs were given; give two or more to merge")
    runs = [Run.open(source) for source in sources]
    first, place = runs[0], locate(into)
    for other in runs[1:]:
        _check_alike(first, other)
    rounds = max((MaskGradients(run).rounds for run in runs), key=len)
    plan = Plan()
    for run in runs:
        counts = {(s.split, s.ablated_fraction): run.plan.count(s.split, s.ablated_fraction) for s in run.plan.segments}
        plan = plan.extended(counts)
    with write_lock(place):
        made = Run.create(
            place,
            components=first.components,
            metadata=first.metadata,
            replacements=first.replacements,
            fingerprint=first.fingerprint,
            facts=first.facts,
            blocks=first.blocks,
            plan=Plan(plan.segments, (len(plan),)) if len(plan) else plan,
        )
        for unit in made.units():
            _merge_unit(made, runs, unit)
        _merge_gradients(MaskGradients(made), [MaskGradients(run) for run in runs], rounds)
    return made


def _check_alike(one: Run, other: Run) -> None:
    other.check(one.fingerprint)
    precisions = [run.facts.precision.name for run in (one, other)]
    rounds = sorted((MaskGradients(run).rounds for run in (one, other)), key=len)
    problems = {
        f"precisions {precisions}": precisions[0] != precisions[1],
        f"units of {one.blocks} and {other.blocks} masks and examples": one.blocks != other.blocks,
        f"rounds of mask gradients {rounds}": rounds[1][: len(rounds[0])] != rounds[0],
        "constants": not np.allclose(one.replacements, other.replacements, rtol=1e-4, atol=1e-6),
    }
    if wrong := [what for what, differ in problems.items() if differ]:
        raise MismatchError(
            f"{one.path} and {other.path} have different {', '.join(wrong)}; only runs that were created with the same "
            f"settings can be merged"
        )


def _merge_unit(made: Run, runs: list[Run], unit: Unit) -> None:
    """Write a unit that the runs together contain completely; entries of earlier runs take precedence."""
    rows, examples = made.rows_of(unit)
    shape = rows.stop - rows.start, examples.stop - examples.start
    values, base = np.full(shape, np.nan, np.float32), np.full(shape[1], np.nan, np.float32)
    for run in runs:
        _fill(values, _rows_from(run, made.plan, rows, examples), run)
        _fill(base, arrays.read(run.array("base_output"), examples), run)
    with_base = unit.mask_block == 0
    if np.isfinite(values).all() and (np.isfinite(base).all() or not with_base):
        made.write_unit(unit, made.draw(rows), values, base if with_base else None)


def _rows_from(run: Run, plan: Plan, rows: slice, examples: slice) -> np.ndarray:
    """Return (rows, examples) outputs of a run for rows of another plan; NaN where the run has none."""
    parts, outputs = [], run.array("outputs")
    for piece in plan.pieces(rows.start, rows.stop):
        part = np.full((piece.count, examples.stop - examples.start), np.nan, np.float32)
        mine = run.plan.rows(piece.split, piece.ablated_fraction)[piece.first : piece.first + piece.count]
        at = 0
        for stretch in stretches(mine) if len(mine) else ():
            part[at : at + len(stretch)] = arrays.read(outputs, slice(stretch[0], stretch[-1] + 1), examples)
            at += len(stretch)
        parts.append(part)
    return np.concatenate(parts)


def _fill(values: np.ndarray, more: np.ndarray, run: Run) -> None:
    """Fill gaps in place; raise `MismatchError` where both have an entry and they differ."""
    from coar.equivalence import Kind, compare  # imports torch

    both = np.isfinite(values) & np.isfinite(more)
    if both.any() and run.facts.precision.name == "float32":
        compared = compare(values[both], more[both], Kind.RECOMPUTED)
        if not compared.agrees:
            raise MismatchError(
                f"{run.path} has other outputs than the runs before it, for the same masks and examples: they "
                f"{compared}; find the damaged run with 'coar verify'"
            )
    np.copyto(values, more, where=~np.isfinite(values))


def _merge_gradients(made: MaskGradients, sources: list[MaskGradients], rounds: tuple[int, ...]) -> None:
    made.lay_out(rounds)
    for unit in made.units():
        examples = made.examples_of(unit)
        have = [
            mask_gradients
            for mask_gradients in sources
            if unit in mask_gradients.units() and unit not in mask_gradients.missing_units()
        ]
        if have:
            run = have[0].run
            number = slice(unit.round, unit.round + 1)
            kept, ablated = (arrays.read(run.array(name), number, examples, slice(None))[0] for name in GRADIENTS)
            outputs = arrays.read(run.array(OUTPUTS), number, slice(0, rounds[unit.round]), examples)[0]
            made.write_unit(unit, kept, ablated, outputs)


def _check_whole(run: Run) -> None:
    """Raise `CorruptRunError` for the first stored chunk that fails `verify`."""
    for problem in verify(run):
        if problem.what not in ("missing", "partly filled"):
            raise CorruptRunError(
                f"chunk {problem.chunk} of {run.path} is {problem.what}; run 'coar verify --repair', then copy again"
            )


async def _copy_objects(source: Store, target: Store, study: dict[str, Any] | None) -> None:
    """Copy all objects, the run's description last: unchanged, or migrated when the fingerprint `study` is given."""
    keys = [key async for key in source.list_prefix("") if not key.endswith(".partial")]
    room = asyncio.Semaphore(AT_ONCE)

    async def one(key: str) -> None:
        async with room:
            value = await source.get(key, default_buffer_prototype())
            if value is not None:
                new, content = (key, value) if study is None else migrated(key, value, study)
                await insist(partial(target.set_if_not_exists, new, content))

    left_out = f"{SUMS}/" if study is not None else ROOT
    await asyncio.gather(*(one(key) for key in keys if key != ROOT and not key.startswith(left_out)))
    await one(ROOT)
