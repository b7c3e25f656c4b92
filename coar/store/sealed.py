"""The Zarr store of a run: it seals chunks with their path and study, and raises `StorageError`."""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import google_crc32c
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import WrapperStore

from coar.store.disk import is_stray
from coar.store.places import Address, open_store
from coar.store.storage_errors import insist, storage_errors

T = TypeVar("T")
ROOT = "zarr.json"
CHECKSUM = 4  # bytes of crc32c at a chunk's end
DIGEST = 16
LABEL = b"coar"
# The seal is a skippable frame, which every reader of Zstandard ignores (RFC 8878, 3.1.2).
HEAD = (0x184D2A5C).to_bytes(4, "little") + (len(LABEL) + DIGEST).to_bytes(4, "little") + LABEL
SEAL = len(HEAD) + DIGEST
CHUNK = re.compile(r"/c(/\d+)+$")  # end of a chunk's key


class MovedChunkError(ValueError):
    """A chunk is sealed for another path or another study."""


class RunStore(WrapperStore[Store]):
    """A store that seals every chunk with its path and its study, and refuses moved chunks.

    The checksum at a chunk's end shows that its bytes are intact, not that they belong to this chunk. The seal is
    between the compressed bytes and the checksum, so a chunk and its seal are one object, written at once.

    Args:
        store: Store of the bytes.
        place: Its name in messages.
        study: Fingerprint of the chunks' study.
        creating: Never replace or remove anything, so that concurrent creators of one run do not interfere.
    """

    def __init__(self, store: Store, *, place: Path | Address, study: dict[str, Any], creating: bool = False) -> None:
        super().__init__(store)
        self._place = place
        self._study = digest(study)
        self._creating, self._keeping = creating, False
        self._parts: dict[str, Any] = {"place": place, "study": study, "creating": creating}

    def __str__(self) -> str:
        return str(self._place)

    def keeping(self) -> Self:
        """Return a store that overwrites objects one by one, so that concurrent readers find all of them."""
        other = self._with_store(self._store)
        other._keeping = True
        return other

    def _with_store(self, store: Store) -> Self:
        return type(self)(store, **self._parts)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Read an object; raise `MovedChunkError` for a chunk that belongs elsewhere."""
        with storage_errors(self._place, "read"):
            value = await self._store.get(key, prototype, byte_range)
        if value is not None and byte_range is None and is_chunk(key) and self._moved(key, value):
            raise MovedChunkError("it was written for another path or another study, and moved here")
        return value

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object, a chunk with its seal."""
        if self._creating:
            await self.set_if_not_exists(key, value)
            return
        with storage_errors(self._place):
            await self._store.set(key, self._sealed(key, value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object unless it exists; the description of a run being created is left to `describe`."""
        if self._creating and key == ROOT:
            return
        with storage_errors(self._place):
            await insist(lambda: self._store.set_if_not_exists(key, self._sealed(key, value)))

    @property
    def _supports_sync_io(self) -> bool:
        """Disable the synchronous path of zarr 3.4, which would start a thread per chunk here."""
        return False

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object as `get` does; the wrapped store alone would not check the seal."""
        return wait(self.get(key, prototype or default_buffer_prototype(), byte_range))

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write an object as `set` does, a chunk with its seal."""
        wait(self.set(key, value))

    def delete_sync(self, key: str) -> None:
        """Remove an object as `delete` does."""
        wait(self.delete(key))

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        """Write several objects, each as `set` does."""
        await asyncio.gather(*(self.set(key, value) for key, value in values))

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        """Read several objects, each as `get` does."""
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        """Return whether an object exists."""
        with storage_errors(self._place, "read"):
            return await self._store.exists(key)

    async def delete(self, key: str) -> None:
        """Remove an object, if it exists."""
        with storage_errors(self._place):
            await self._store.delete(key)

    async def delete_dir(self, prefix: str) -> None:
        """Remove everything below a prefix; do nothing for a run being created, or in a store from `keeping`."""
        if self._creating or self._keeping:
            return
        with storage_errors(self._place):
            await self._store.delete_dir(prefix)

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """List everything below a prefix."""
        with storage_errors(self._place, "read"):
            async for name in self._store.list_prefix(prefix):
                yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """List the direct children of a prefix."""
        with storage_errors(self._place, "read"):
            async for name in self._store.list_dir(prefix):
                yield name

    def _moved(self, key: str, value: Buffer) -> bool:
        """Return whether an intact chunk has another chunk's seal; runs of the first version have no seals."""
        content = value.to_bytes()
        seal = content[-SEAL - CHECKSUM : -CHECKSUM]
        if not seal.startswith(HEAD) or seal == seal_of(key, self._study):
            return False
        return checksum(content[:-CHECKSUM]) == content[-CHECKSUM:]

    def _sealed(self, key: str, value: Buffer) -> Buffer:
        if not is_chunk(key):
            return value
        content = value.as_numpy_array()[:-CHECKSUM].tobytes() + seal_of(key, self._study)
        return value.from_bytes(content + checksum(content))


def seal_of(key: str, study: dict[str, Any] | bytes) -> bytes:
    """Return the seal of the chunk at a path, for a study given by its fingerprint or the fingerprint's digest."""
    keyed_with = study if isinstance(study, bytes) else digest(study)
    return HEAD + hashlib.blake2b(key.encode(), key=keyed_with, digest_size=DIGEST).digest()


def checksum(content: bytes) -> bytes:
    """Return the crc32c at a chunk's end."""
    return int(google_crc32c.value(content)).to_bytes(CHECKSUM, "little")


def is_chunk(key: str) -> bool:
    """Return whether a key is the key of an array's chunk, `<array>/c/0/0`; a fit may be called `c`."""
    return CHUNK.search(key) is not None


def digest(study: dict[str, Any]) -> bytes:
    """Return the 32-byte digest of a study's fingerprint."""
    return hashlib.blake2b(json.dumps(study, sort_keys=True).encode(), digest_size=32).digest()


def read_object(place: Path | Address, key: str) -> bytes | None:
    """Read one small object of a run; None when it does not exist."""
    with storage_errors(place, "read"):
        if isinstance(place, Path):
            return (place / key).read_bytes() if (place / key).is_file() else None
        value = wait(open_store(place).get(key, default_buffer_prototype()))
    return None if value is None else value.to_bytes()


def create_object(place: Path | Address, key: str, content: bytes) -> None:
    """Write one small object unless it exists."""
    store, value = open_store(place), default_buffer_prototype().buffer.from_bytes(content)
    with storage_errors(place):
        wait(insist(lambda: store.set_if_not_exists(key, value)))


def remove_object(place: Path | Address, key: str) -> None:
    """Remove one small object, if it exists."""
    with storage_errors(place):
        wait(open_store(place).delete(key))


def names(place: Path | Address) -> list[str]:
    """Return the names of a place's direct children, without temporary files of killed writers."""
    with storage_errors(place, "read"):
        if isinstance(place, Path):
            return [entry.name for entry in place.iterdir() if not is_stray(entry)] if place.exists() else []
        return wait(_names(open_store(place)))


async def _names(store: Store) -> list[str]:
    return [name async for name in store.list_dir("")]  # obstore requires to list inside the loop


def wait(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in another thread, since a notebook already runs an event loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
