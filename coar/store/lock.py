"""Locks for writing to a run: exclusive, or shared among workers.

A lock is a `flock` on the run's folder; the system releases it when the process ends. It excludes other processes of
the same machine, and of other machines if the shared file system supports that. Object stores have no locks: there,
concurrent writers put whole objects of equal content, so the order does not matter. The run's description is an
exception, and `extension_lock` guards it.
"""

import errno
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coar.errors import RunError
from coar.store.places import Address
from coar.store.sealed import create_object, read_object, remove_object
from coar.store.storage_errors import storage_errors

log = logging.getLogger(__name__)
UNSUPPORTED = (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
PATIENCE = 1800.0  # seconds that a worker waits for the creator of the run
PAUSE = 0.2
EXTENDING = "extending.json"  # exists while a process extends a run in an object store
STALE = 60.0  # seconds after which an unchanged mark counts as left by a dead process


class Lock:
    """A held lock on a run.

    Attributes:
        alone: Whether no other process holds it.
    """

    def __init__(self, handle: int | None, *, alone: bool) -> None:
        self._handle = handle
        self.alone = alone

    def share(self) -> None:
        """Make an exclusive lock a shared one, so that other workers can take it."""
        if self._handle is not None and self.alone:
            _flock(self._handle, fcntl.LOCK_SH)
        self.alone = False


@contextmanager
def write_lock(place: Path | Address) -> Iterator[Lock]:
    """Hold an exclusive lock; make the run's folder if there is none, and remove it afterwards if it is still empty.

    Raises:
        RunError: When the path is a file, or another process holds a lock.
        StorageError: When the folder cannot be made.
    """
    if isinstance(place, Address):
        yield Lock(None, alone=True)
        return
    with _opened(place) as handle:
        if not _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) or not _still_there(handle, place):
            raise _taken(place)
        with _cleared(place):
            yield Lock(handle, alone=True)


@contextmanager
def worker_lock(place: Path | Address, *, prepared: Callable[[], bool]) -> Iterator[Lock]:
    """Hold a shared lock if the run is prepared for the worker, otherwise an exclusive lock until `Lock.share`.

    Raises:
        RunError: When no lock is free for `PATIENCE` seconds.
        StorageError: When the folder cannot be made.
    """
    if isinstance(place, Address):
        yield Lock(None, alone=not prepared())
        return
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with _opened(place) as handle:
            if _flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB) and _still_there(handle, place) and prepared():
                yield Lock(handle, alone=False)
                return
            if _flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) and _still_there(handle, place):
                with _cleared(place):
                    yield Lock(handle, alone=True)
                return
        time.sleep(PAUSE)
    raise _taken(place)


@contextmanager
def extension_lock(place: Path | Address) -> Iterator[None]:
    """Exclude other extensions of a run in an object store; on a disk, the caller already holds an exclusive lock.

    The lock is an object that only one process can create. A process may die without removing it, so an object that
    does not change for `STALE` seconds by this machine's clock is removed; when several processes do this at once,
    reading the object again after a pause decides which of them holds the lock.
    """
    if isinstance(place, Path):
        yield
        return
    mine = uuid.uuid4().hex.encode()
    _mark(place, mine)
    try:
        yield
    finally:
        if read_object(place, EXTENDING) == mine:
            remove_object(place, EXTENDING)


def _mark(place: Address, mine: bytes) -> None:
    seen: bytes | None = b""
    since = time.monotonic()
    while True:
        create_object(place, EXTENDING, mine)
        found = read_object(place, EXTENDING)
        if found == mine:
            return
        if found != seen:
            seen, since = found, time.monotonic()
        elif found is not None and time.monotonic() - since > STALE:
            log.warning("the process that extends %s has not finished in %.0f s; removing its lock", place, STALE)
            if read_object(place, EXTENDING) == seen:
                remove_object(place, EXTENDING)
                create_object(place, EXTENDING, mine)
                time.sleep(5 * PAUSE)  # until others that saw the same mark have removed it too
        else:
            time.sleep(PAUSE)


@contextmanager
def _opened(root: Path) -> Iterator[int]:
    if root.exists() and not root.is_dir():
        raise RunError(f"{root} holds a file, not a run; give the path of a run, or one that does not exist yet")
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def _cleared(root: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):  # raised unless the folder is empty
            root.rmdir()


def _flock(handle: int, operation: int) -> bool:
    """Lock, and return whether that succeeded; without support of the file system, warn and return True."""
    try:
        fcntl.flock(handle, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        log.warning("this file system has no locks (%s): make sure that no other process writes to the run", error)
    return True


def _still_there(handle: int, root: Path) -> bool:
    """Return whether the folder is the opened one: it may have been removed or replaced before the lock."""
    return root.exists() and os.path.samestat(os.fstat(handle), root.stat())


def _taken(root: Path) -> RunError:
    return RunError(f"another process is writing to {root}; wait until it ends, or collect into another path")
