"""Zarr arrays of a run: checksums, whole chunks, errors that name the chunk."""

import itertools
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.errors import ContainsArrayError

from coar.errors import CorruptRunError
from coar.store.layout import is_group
from coar.store.sealed import wait

Chunk = tuple[int, ...]


def create_array(
    group: zarr.Group,
    name: str,
    *,
    shape: Sequence[int],
    chunks: Sequence[int],
    dtype: Any,
    dimensions: Sequence[str],
    overwrite: bool = False,
) -> zarr.Array[Any]:
    """Create an array: NaN fill for floats, every chunk stored, zstd and then crc32c."""
    floating = dtype is not str and np.dtype(dtype).kind == "f"
    return group.create_array(
        name,
        shape=tuple(shape),
        chunks=tuple(max(1, c) for c in chunks),
        dtype=dtype,
        fill_value=float("nan") if floating else None,
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        dimension_names=tuple(dimensions),
        config={"write_empty_chunks": True},
        overwrite=overwrite,
    )


UNREADABLE = (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)


def create_beside_others(group: zarr.Group, name: str, **layout: Any) -> None:
    """Create an array as `create_array` does, unless another process has created the same one meanwhile."""
    with suppress(ContainsArrayError):
        create_array(group, name, **layout)


def there_is(group: zarr.Group, name: str) -> bool:
    """Return whether a group contains a name; raise `CorruptRunError` when the description of that node is damaged."""
    try:
        return name in group
    except UNREADABLE as error:
        raise _damaged(group, name, error) from error


def open_array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """Open an array of a run; raise `CorruptRunError` when it is missing or its description is damaged."""
    try:
        found = group[name]
    except UNREADABLE as error:
        raise _damaged(group, name, error) from error
    if not isinstance(found, zarr.Array):
        raise CorruptRunError(f"{name!r} of {group.store_path} is not an array; collect into a new path")
    return found.with_config({"write_empty_chunks": True})


def read(array: zarr.Array[Any], *slices: slice) -> np.ndarray:
    """Read a region; raise `CorruptRunError`, naming the chunk, when a checksum or a decoder fails."""
    try:
        return np.asarray(array[slices])
    except (ValueError, RuntimeError, TypeError, MemoryError) as error:
        bad = [key for key in chunks_of(array, slices) if not readable(array, key)]
        keys = ", ".join(chunk_path(array, key) for key in bad) or array.path
        raise CorruptRunError(
            f"chunk {keys} of {array.store} is damaged ({error}); 'coar verify --repair' deletes what collect or fit "
            f"can make again, and names what must be restored from a copy"
        ) from error


def write(array: zarr.Array[Any], values: np.ndarray, *slices: slice) -> None:
    """Write a region of whole chunks; raise `StorageError` when the storage fails."""
    array[slices] = values


def write_all(group: zarr.Group, name: str, values: np.ndarray, dimension: str) -> None:
    """Create or replace a one-dimensional array of a single chunk."""
    text = values.dtype.kind in "UT"
    array = create_array(
        group,
        name,
        shape=values.shape,
        chunks=values.shape,
        dtype=str if text else values.dtype,
        dimensions=(dimension,),
        overwrite=True,
    )
    write(array, values.astype(object) if text else values, slice(None))


def array_names(group: zarr.Group, within: str = "") -> list[str]:
    """List the paths of all arrays below a path in a group in one request; damaged descriptions count as arrays."""
    listed = wait(_list(group.store, within))
    nodes = (name.removesuffix("/zarr.json") for name in listed if name.endswith("/zarr.json"))
    return sorted(name for name in nodes if not is_group(name))


def stored_chunks(array: zarr.Array[Any]) -> set[Chunk]:
    """List the keys of the stored chunks in one request."""
    prefix = f"{array.path}/c/"
    names = wait(_list(array.store, prefix))
    return {
        tuple(int(part) for part in name.removeprefix(prefix).split("/"))
        for name in names
        if name.removeprefix(prefix).replace("/", "").isdigit()
    }


def all_chunks(array: zarr.Array[Any]) -> list[Chunk]:
    """Return the keys of all chunks of the array's shape."""
    return list(itertools.product(*(range(-(-n // c)) for n, c in zip(array.shape, array.chunks, strict=True))))


def chunks_of(array: zarr.Array[Any], slices: Iterable[slice]) -> list[Chunk]:
    """Return the keys of the chunks that a region touches."""
    ranges = []
    for part, n, c in zip(slices, array.shape, array.chunks, strict=True):
        start, stop, _ = part.indices(n)
        ranges.append(range(start // c, -(-stop // c)))
    return list(itertools.product(*ranges))


def readable(array: zarr.Array[Any], key: Chunk) -> bool:
    """Return whether one chunk decodes and passes its checksum; a missing chunk reads as fill values."""
    try:
        array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(key, array.chunks, strict=True))]
    except (ValueError, RuntimeError, TypeError, MemoryError):
        return False
    return True


def delete_chunk(array: zarr.Array[Any], key: Chunk) -> None:
    """Remove one chunk from the store."""
    wait(array.store.delete(chunk_path(array, key)))


def chunk_path(array: zarr.Array[Any], key: Chunk) -> str:
    """Return a chunk's path inside the run."""
    return "/".join([array.path, "c", *map(str, key)])


def _damaged(group: zarr.Group, name: str, error: Exception) -> CorruptRunError:
    return CorruptRunError(
        f"array {name!r} of {group.store_path} is missing or its zarr.json is damaged ({error}); restore it from a "
        f"copy, or collect into a new path"
    )


async def _list(store: Store, prefix: str) -> list[str]:
    return [name async for name in store.list_prefix(prefix)]
