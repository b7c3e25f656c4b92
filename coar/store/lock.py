"""Who may write: one process alone, or workers beside each other; the system drops locks however a process ends.

The locks are `flock`'s, on the run's folder. They keep apart the processes of one machine, and those of several where
the file system they share says so. Object stores have none: there, whole objects with the same content are put, and
whichever comes last changes nothing. Only what a run has in all, which is no such object, is changed by one at a time.
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
PATIENCE = 1800.0  # seconds that a worker waits for the one that creates the run
PAUSE = 0.2
EXTENDING = "extending.json"  # there while somebody extends a run in an object store
STALE = 60.0  # seconds for which the same mark is seen before it is taken for that of a dead process


class Lock:
    """A lock on a run that is held.

    Attributes:
        alone: Whether no other process holds it.
    """

    def __init__(self, handle: int | None, *, alone: bool) -> None:
        self._handle = handle
        self.alone = alone

    def share(self) -> None:
        """Let other workers in."""
        if self._handle is not None and self.alone:
            _flock(self._handle, fcntl.LOCK_SH)
        self.alone = False


@contextmanager
def write_lock(place: Path | Address) -> Iterator[Lock]:
    """Hold a run for writing alone, making its folder if need be; a folder still empty at the end goes away again.

    Raises:
        RunError: When the path is a file, or another process holds it.
        StorageError: When the disk refuses to make the folder.
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
    """Hold a run beside other workers; alone, until `Lock.share`, unless it is prepared for what the worker does.

    Raises:
        RunError: When somebody holds the run for longer than a creation can take.
        StorageError: When the disk refuses to make the folder.
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
    """Extend a run in an object store while nobody else does; on a disk, whoever may write is alone already.

    An object that only one process can create is the lock. Processes die without removing it, so one that does not
    change for `STALE` seconds by this machine's clock is removed; several that do so at once find out after a pause.
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
            log.warning("whoever began to extend %s has not ended in %.0f s; going on without", place, STALE)
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
    """Lock, and say whether that succeeded; where the file system knows no locks it does, with a warning."""
    try:
        fcntl.flock(handle, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        log.warning("this file system has no locks (%s): see to it that nothing else writes to the run", error)
    return True


def _still_there(handle: int, root: Path) -> bool:
    """Say whether the folder is the one that was opened: it may have been removed, or made anew, before the lock."""
    return root.exists() and os.path.samestat(os.fstat(handle), root.stat())


def _taken(root: Path) -> RunError:
    return RunError(f"another process is writing to {root}; wait until it is done, or collect into another path")
