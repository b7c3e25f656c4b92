"""Progress bars, and the names of events in logs."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

WORKER_LOST = "worker lost"  # name of the event in logs


def progress_bar(items: Iterable[Any] | None = None, *, shown: bool, **settings: Any) -> "tqdm[Any]":
    """Return a bar on standard error: redrawn in place on a terminal and removed at its end; every 15 s in a log."""
    watched = sys.stderr.isatty()
    wait = 0.1 if watched else 15.0
    return tqdm(items, disable=not shown, leave=not watched, mininterval=wait, maxinterval=4 * wait, **settings)
