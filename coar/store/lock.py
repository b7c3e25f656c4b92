"""One writer at a time: a lock on the run's folder, which the system lets go of however the process ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coar.errors import RunError
from coar.store.arrays import storage_errors


@contextmanager
def write_lock(root: Path) -> Iterator[None]:
    """Hold a folder for writing, making it if need be; a folder that is still empty at the end goes away again.

    Raises:
        RunError: When the path is a file, or another process holds it.
        StorageError: When the disk refuses to make the folder.
    """
    if root.exists() and not root.is_dir():
        raise RunError(f"{root} holds a file, not a run; give the path of a run, or one that does not exist yet")
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(root) from None
        if not root.exists() or not os.path.samestat(os.fstat(handle), root.stat()):
            raise _taken(root)  # the folder was removed, or made anew, between opening and locking it
        try:
            yield
        finally:
            with suppress(OSError):  # raised unless the folder is empty
                root.rmdir()
    finally:
        os.close(handle)


def _taken(root: Path) -> RunError:
    return RunError(f"another process is writing to {root}; wait until it is done, or collect into another path")
