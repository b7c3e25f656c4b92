"""Atomic, synced files of a run on a disk."""

import asyncio
import errno
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

SWITCH = "COAR_FSYNC"  # 0: do not sync files
STRAY = re.compile(r"\.[0-9a-f]{32}\.partial$")


class DurableStore(LocalStore):
    """Zarr's local store, with every file and the folder that names it synced to the disk.

    Zarr's own store renames files into place, and the system may rename before it has written the content; after a loss
    of power such a file can be empty.
    """

    async def _set(self, key: str, value: Buffer, exclusive: bool = False) -> None:
        await self._ensure_open()
        self._check_writable()
        await asyncio.to_thread(put, self.root / key, value.to_bytes(), exclusive=exclusive)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write a file and sync it, as `set` does."""
        self._ensure_open_sync()
        self._check_writable()
        put(self.root / key, value.to_bytes())

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """List all files below a folder of the store; several times as fast as Zarr's method, which stats each file."""
        for file in await asyncio.to_thread(lambda: list(files_below(self.root / prefix))):
            yield f"{prefix.rstrip('/')}/{file}".lstrip("/")


def put(path: Path, content: bytes, *, exclusive: bool = False) -> None:
    """Write a file atomically, and return once it is synced to the disk.

    Raises:
        FileExistsError: When the file exists and `exclusive` is set.
    """
    _make_folder(path.parent)
    partial = path.with_suffix(f".{uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            if synced():
                os.fsync(file.fileno())
        if exclusive:
            os.link(partial, path)
            partial.unlink()
        else:
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Sync the names of a folder's files to the disk."""
    if not synced():
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some mounted file systems cannot sync folders
            raise
    finally:
        os.close(handle)


def synced() -> bool:
    """Return whether files are synced to the disk: always, except with `COAR_FSYNC=0` in the environment."""
    return os.environ.get(SWITCH) != "0"


def files_below(folder: str | Path) -> Iterator[str]:
    """Yield the relative paths of all files below a folder; none when the folder does not exist."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from (f"{entry.name}/{file}" for file in files_below(entry.path))
            else:
                yield entry.name


def sweep(root: Path) -> list[Path]:
    """Delete temporary files that a killed writer left in a run; the caller must be the run's only writer."""
    stray = [root / file for file in files_below(root) if STRAY.search(file)]
    for path in stray:
        path.unlink()
    return stray


def is_stray(path: Path) -> bool:
    """Return whether a path is a temporary file of a store, by its name."""
    return STRAY.search(path.name) is not None and path.is_file()


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, and sync each entry to the disk."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)
