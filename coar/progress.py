"""Progress bars, and the names of events in logs."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

WORKER_LOST = "worker lost"  # the name of this event in a log of events


def progress_bar(items: Iterable[Any] | None = None, *, shown: bool, **settings: Any) -> "tqdm[Any]":
    """Return a bar on standard error: on a terminal redrawn in place and removed at its end; in a log every 15 s."""
    watched = sys.stderr.isatty()
    wait = 0.1 if watched else 15.0
    return tqdm(items, disable=not shown, leave=not watched, mininterval=wait, maxinterval=4 * wait, **settings)
