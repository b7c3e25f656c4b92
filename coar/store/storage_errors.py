"""Failures of disks and object stores as `StorageError`, with the place, the reason and the remedy."""

import errno
import re
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from coar.errors import StorageError

REMEDIES = {
    "write to": "what was stored before is intact: fix the cause and run the same command again to continue",
    "read": "check the address, the network and your permission to read, then run the same command again",
}
CLUES = {  # an error's class, or words of its message, and their meaning
    "PermissionDeniedError": "permission was denied, or the credentials are wrong",
    "UnauthenticatedError": "the credentials were refused",
    "404 Not Found": "there is no such bucket",
    "169.254.": "no credentials were found in the environment, in the usual files, or in this machine's role",
}
LONGEST = 200  # characters of a server's answer


@contextmanager
def storage_errors(place: object, doing: Literal["write to", "read"] = "write to") -> Iterator[None]:
    """Turn errors of a disk or an object store into `StorageError`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageError) or not isinstance(error, (OSError, *_bucket_errors())):
            raise
        raise StorageError(f"cannot {doing} {place}: {_reason(error, place)}; {REMEDIES[doing]}") from error


async def insist(create: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Create an object that may exist, and retry twice: clients do not retry conditional puts by themselves."""
    for last in (False, False, True):
        try:
            await create()
        except _bucket_errors():
            if last:
                raise
        else:
            return


def _bucket_errors() -> tuple[type[Exception], ...]:
    """Return the base class of obstore's errors if obstore has been imported."""
    exceptions = sys.modules.get("obstore.exceptions")
    return (exceptions.BaseError,) if exceptions else ()


def _reason(error: Exception, place: object) -> str:
    said, kind = str(error), type(error).__name__
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk is full"
        missing = isinstance(error, FileNotFoundError) and "://" in str(place)
        return "there is no such bucket" if missing else said
    for clue, reason in CLUES.items():
        if clue == kind or clue in said:
            return reason
    # A server's XML may repeat parts of the credentials, and addresses may be signed: neither is printed.
    plain = re.sub(r"<\?xml.*|\?[^\s\"']*", "", said.partition("\n\nDebug source")[0], flags=re.DOTALL)
    return " ".join(plain.split())[:LONGEST]
