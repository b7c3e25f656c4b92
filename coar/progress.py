"""Progress bars, and the names of events in logs."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

WORKER_LOST = "worker lost"  # the name of this event in a log of events


def progress_bar(items: Iterable[Any] | None = None, *, shown: bool, **settings: Any) -> "tqdm[Any]":
    """Return a bar on standard error, redrawn in place on a terminal and every 15 seconds in a log."""
    wait = 0.1 if sys.stderr.isatty() else 15.0
    return tqdm(items, disable=not shown, mininterval=wait, maxinterval=4 * wait, **settings)
