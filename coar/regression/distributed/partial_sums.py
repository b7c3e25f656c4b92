"""Partial sums of a fit, one share per worker of a job array, stored until one process adds them up and solves."""

import hashlib
import json
from contextlib import suppress
from typing import Any, cast

import numpy as np
import torch
import zarr
from zarr.errors import ContainsGroupError

from coar.errors import CorruptRunError, IncompleteRunError, MismatchError
from coar.regression.sums import Gram, Moments, dealt_rows, moments_of, panels
from coar.store import arrays
from coar.store.layout import PANEL, SUMS, ArraySpec, laid_out, spec_of
from coar.store.run import Run

ATTRIBUTE = "coar"
CHUNK_BYTES = 64 * 2**20


class PartialSums:
    """Partial sums of a fit inside its run, in a separate group for every number of masks.

    Arrays, float64: `gram` (worker, components + 1, components), X'X and in the last row the sums of X, one per worker;
    `moments` (panel, components + 3, example), X'Y and in the last rows the sums of Y, the sums of Y * Y and the shift.

    Args:
        run: A complete run.
        name: Name of the fit.
        rows: Row numbers of its training masks.
        step: Number of examples that are solved together.
    """

    def __init__(self, run: Run, name: str, rows: np.ndarray, step: int) -> None:
        self._run, self._rows, self._step = run, rows, step
        self.panels = panels(slice(0, run.n_examples), step)
        about = json.dumps([len(rows), run.sampler.ablated_fraction, step]).encode()
        self.key = f"{SUMS}/{name}-{hashlib.blake2b(about, digest_size=6).hexdigest()}"

    def prepared(self) -> bool:
        """Return whether the group and its arrays exist."""
        return self._count() > 0 and all(arrays.there_is(self._run.group, self._path(n)) for n in ("gram", "moments"))

    def lay_out(self, count: int) -> None:
        """Create the group and its arrays for a number of workers, unless they exist."""
        group = self._run.group
        with suppress(ContainsGroupError):
            group.create_group(self.key, attributes={ATTRIBUTE: {"workers": count}})
        sizes, rows = self._run.sizes, max(1, CHUNK_BYTES // (8 * self._run.n_components))
        for name, growing in {"gram": count, "moments": len(self.panels)}.items():
            form = cast(ArraySpec, spec_of(self._path(name), sizes))
            shape, chunks = laid_out(form, sizes, growing=growing, some=min(rows, sizes.components + 1))
            arrays.create_beside_others(
                group, self._path(name), shape=shape, chunks=chunks, dtype=form.dtype, dimensions=form.dimensions
            )

    def do(self, worker: tuple[int, int]) -> None:
        """Make the missing sums of the share of worker k of n.

        Raises:
            MismatchError: When the sums were begun with another number of workers.
        """
        number, count = worker
        if self._count() != count:
            raise MismatchError(
                f"the sums of this fit are made by {self._count()} workers and {count} were given; give that "
                f"number, or delete {self.key} in {self._run.path} and start again"
            )
        if number - 1 in self._workers_missing():
            gram = Gram.of(self._run, dealt_rows(self._run, self._rows, (number - 1, count)))
            values = torch.cat([gram.product, gram.total[None]])[None].numpy()
            arrays.write(self._array("gram"), values, slice(number - 1, number), slice(None), slice(None))
        for at in sorted(set(range(number - 1, len(self.panels), count)) & self._panels_missing()):
            moments = moments_of(self._run, self._rows, self.panels[at])
            rows = (moments.product, moments.total[None], moments.square[None], moments.shift[None])
            values = self._padded(torch.cat(rows))
            arrays.write(self._array("moments"), values, slice(at, at + 1), slice(None), slice(None))

    def require(self) -> None:
        """Raise `IncompleteRunError` unless every worker's share is complete."""
        if not self.prepared():
            raise IncompleteRunError(
                f"no worker has made sums for a fit on {len(self._rows)} masks in {self._run.path}; first run 'coar "
                f"fit --worker K/N' for every K, with the same --method, --masks and --name"
            )
        count = self._count()
        missing = sorted(self._workers_missing() | {at % count for at in self._panels_missing()})
        if missing:
            shown = ", ".join(f"{number + 1}/{count}" for number in missing[:8])
            raise IncompleteRunError(
                f"{len(missing)} of {count} workers have not finished their share of this fit of {self._run.path}: "
                f"{shown}{' and more' if len(missing) > 8 else ''}; run 'coar fit --worker' again for these"
            )

    def gram(self) -> Gram:
        """Add up all workers' sums over masks, with one worker's in memory at a time."""
        array, whole = self._array("gram"), None
        for at in range(self._count()):
            part = torch.from_numpy(arrays.read(array, slice(at, at + 1), slice(None), slice(None))[0])
            whole = part if whole is None else whole.add_(part)
        return Gram(whole[:-1], whole[-1], len(self._rows)) if whole is not None else Gram.of(self._run, self._rows)

    def moments(self, examples: slice) -> Moments:
        """Read the moments of examples that form whole panels."""
        parts = []
        for at, panel in enumerate(self.panels):
            if examples.start <= panel.start and panel.stop <= examples.stop:
                region = slice(at, at + 1), slice(None), slice(0, panel.stop - panel.start)
                values = torch.from_numpy(arrays.read(self._array("moments"), *region)[0])
                total, square, shift = values[-3:]
                parts.append(Moments(values[:-3], total, square, shift, len(self._rows)))
        return Moments.joined(parts)

    def remove(self) -> None:
        """Delete the sums, after the fit is written."""
        del self._run.group[self.key]

    @staticmethod
    def _padded(values: torch.Tensor) -> np.ndarray:
        """Return (1, components + 3, PANEL) values of a panel that may be narrower."""
        whole = np.full((1, len(values), PANEL), np.nan)
        whole[0, :, : values.shape[1]] = values.numpy()
        return whole

    def _count(self) -> int:
        """Return the number of workers that make the sums; 0 before the first has begun."""
        if not arrays.there_is(self._run.group, self.key):
            return 0
        found = cast(dict[str, Any], cast(zarr.Group, self._run.group[self.key]).attrs.get(ATTRIBUTE, {}))
        count = found.get("workers")
        if not isinstance(count, int) or count < 1:
            raise CorruptRunError(f"{self.key} of {self._run.path} has no valid number of workers; delete it")
        return count

    def _workers_missing(self) -> set[int]:
        array = self._array("gram")
        return {key[0] for key in set(arrays.all_chunks(array)) - arrays.stored_chunks(array)}

    def _panels_missing(self) -> set[int]:
        array = self._array("moments")
        return set(range(len(self.panels))) - {key[0] for key in arrays.stored_chunks(array)}

    def _path(self, name: str) -> str:
        return f"{self.key}/{name}"

    def _array(self, name: str) -> zarr.Array[Any]:
        return self._run.array(self._path(name))
