"""The stores of a run keep zarr's own contract for stores, and no synchronous access goes past seals and syncs."""

import asyncio
import functools
import inspect
from pathlib import Path

import google_crc32c
import pytest
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.core.sync import sync
from zarr.testing.store import StoreTests

from coar.store import disk
from coar.store.disk import DurableStore
from coar.store.sealed import HEAD, MovedChunkError, RunStore

STUDY = {"study": 1}


def run_coroutines(tests):
    """Make plain functions of the coroutines among a class's tests, which pytest does not run by itself."""
    for name, test in inspect.getmembers(tests, inspect.iscoroutinefunction):
        if name.startswith("test_"):
            setattr(tests, name, plain(test))
    return tests


def plain(test):
    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


KEY = "foo/c/0"


async def set_many(store, key, value):
    await store._set_many([(key, value)])


async def get_many(store, key):
    ((_, value),) = [pair async for pair in store._get_many([(key, default_buffer_prototype(), None)])]
    return value


WRITES = {
    "set": lambda store, key, value: store.set(key, value),
    "set_if_not_exists": lambda store, key, value: store.set_if_not_exists(key, value),
    "set_many": set_many,
    "set_sync": lambda store, key, value: asyncio.to_thread(store.set_sync, key, value),
}
READS = {
    "get": lambda store, key: store.get(key, default_buffer_prototype()),
    "get_many": get_many,
    "get_sync": lambda store, key: asyncio.to_thread(store.get_sync, key),
}


class OpenedRunStore(RunStore):
    """A run's store on a disk, opened by its folder as zarr's tests open stores."""

    @classmethod
    async def open(cls, root, *, read_only=False):
        store = await DurableStore.open(root, read_only=read_only)
        return cls(store, place=Path(root), study=STUDY)


class OnDisk(StoreTests):
    """What both stores of a run on a disk need to be tested."""

    buffer_cls = cpu.Buffer

    async def set(self, store, key, value):
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value.to_bytes())

    async def get(self, store, key):
        return self.buffer_cls.from_bytes((self.folder / key).read_bytes())

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folder = tmp_path / "store"
        self.folder.mkdir()

    @pytest.fixture
    def store(self, open_kwargs):
        return sync(self.store_cls.open(**open_kwargs))

    @pytest.fixture
    def store_not_open(self, store_kwargs):
        return self.store_cls(**store_kwargs)

    def test_store_supports_writes(self, store):
        assert store.supports_writes

    def test_store_supports_listing(self, store):
        assert store.supports_listing


@run_coroutines
class TestDurableStore(OnDisk):
    store_cls = DurableStore

    @pytest.fixture
    def store_kwargs(self):
        return {"root": str(self.folder)}

    def test_store_repr(self, store):
        assert str(store) == f"file://{self.folder}"

    def test_a_synchronous_write_is_synced(self, store, monkeypatch):
        synced = []
        monkeypatch.setenv(disk.SWITCH, "1")
        monkeypatch.setattr(disk.os, "fsync", synced.append)  # file handles
        store.set_sync("a/c/0", self.buffer_cls.from_bytes(b"content"))
        assert (self.folder / "a/c/0").read_bytes() == b"content"
        assert len(synced) >= 2  # the file, and the folder that names it


@run_coroutines
class TestRunStore(OnDisk):
    store_cls = OpenedRunStore

    @pytest.fixture
    def store_kwargs(self):
        return {"store": DurableStore(self.folder), "place": self.folder, "study": STUDY}

    @pytest.fixture
    def open_kwargs(self):
        return {"root": str(self.folder)}

    def test_store_repr(self, store):
        assert str(store) == str(self.folder)

    @pytest.mark.parametrize("key", ["zarr.json", "c/0", "foo/0/0"])
    @pytest.mark.parametrize("data", [b"\x01\x02\x03\x04", b""])
    async def test_set(self, store, key, data):
        await StoreTests.test_set(self, store, key, data)  # a chunk of an array is stored with a seal: see below

    async def test_set_many(self, store):
        for key in ("zarr.json", "c/0", "foo/0/0"):
            await store._set_many([(key, self.buffer_cls.from_bytes(key.encode()))])
            assert (await self.get(store, key)).to_bytes() == key.encode()

    @pytest.mark.parametrize("write", WRITES)
    @pytest.mark.parametrize("read", READS)
    async def test_every_write_seals_a_chunk_and_every_read_checks_the_seal(self, store, write, read):
        content = b"compressed"
        checksum = int(google_crc32c.value(content)).to_bytes(4, "little")
        await WRITES[write](store, KEY, self.buffer_cls.from_bytes(content + checksum))
        stored = (self.folder / KEY).read_bytes()
        assert stored.startswith(content + HEAD)
        assert (await READS[read](store, KEY)).to_bytes() == stored
        moved = self.folder / "foo/c/1"
        moved.write_bytes(stored)
        with pytest.raises(MovedChunkError):
            await READS[read](store, "foo/c/1")

    def test_zarr_does_not_choose_the_synchronous_path(self, store):
        assert not store._supports_sync_io
