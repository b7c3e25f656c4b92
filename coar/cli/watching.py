"""The progress of a run: units stored, rate, time left, and workers lost."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coar.errors import SettingsError
from coar.progress import WORKER_LOST
from coar.store.fits import finished_fits
from coar.store.gradients import MaskGradients
from coar.store.places import Address
from coar.store.run import Run
from coar.store.storage_errors import storage_errors


@dataclass(frozen=True)
class RunStatus:
    """The progress of a run at one moment.

    Attributes:
        done: Number of stored units, of masks and of mask gradients.
        units: Number of units of the complete run.
        rate: Units per second since the first status; None at the first, and while nothing has been stored since.
        correlation: Mean correlation of predicted and true outputs under validation masks, of the best of the run's
            fits; None without a fit that has been validated.
        lost: Workers lost so far according to the log of the collecting command; None without a log.
    """

    done: int
    units: int
    rate: float | None
    correlation: float | None = None
    lost: int | None = None

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end at this rate; None without a rate."""
        return None if self.rate is None else (self.units - self.done) / self.rate

    def __str__(self) -> str:
        share = f"{self.done} of {self.units} units"
        if self.correlation is not None:
            share += f", held-out correlation {self.correlation:.3f}"
        if self.lost is not None:
            share += f", {self.lost} workers lost"
        if self.seconds_left is None or self.rate is None or self.done == self.units:
            return share
        ending = time.strftime("%d %b %H:%M:%S", time.localtime(time.time() + self.seconds_left))
        return f"{share}, {60 * self.rate:.1f} a minute, done about {ending}"


def watched(place: Path | Address, *, every: float | None, log_file: Path | None = None) -> Iterator[RunStatus]:
    """Yield the status of a run: once, or every so many seconds until it is complete.

    Args:
        place: Path or address of the run.
        every: Seconds between statuses; None for a single one.
        log_file: The log that `coar collect --log-file` writes, to count lost workers.

    Raises:
        SettingsError: When `every` is not above 0, or the log is missing or cannot be read as one.
    """
    if every is not None and not every > 0:
        raise SettingsError(f"a pause of {every:g} s was given; give seconds above 0")
    began, first, glance = time.monotonic(), _glance(place, log_file, None), None
    while glance is None or (every is not None and glance.done < glance.units):
        if glance is not None and every is not None:
            time.sleep(every)
        glance = _glance(place, log_file, (first.done, began)) if glance else first
        yield glance


def write_metrics(glance: RunStatus, path: Path) -> None:
    """Write a status atomically in Prometheus' text format, for the textfile collector of its node exporter.

    Raises:
        StorageError: When the file cannot be written.
    """
    lines = [
        "# HELP coar_units_stored Units of the run that are stored.",
        "# TYPE coar_units_stored gauge",
        f"coar_units_stored {glance.done}",
        "# HELP coar_units_planned Units that the run has when complete.",
        "# TYPE coar_units_planned gauge",
        f"coar_units_planned {glance.units}",
    ]
    if glance.rate is not None:
        lines += [
            "# HELP coar_units_per_second Units stored per second since watching began.",
            "# TYPE coar_units_per_second gauge",
            f"coar_units_per_second {glance.rate:.6g}",
        ]
    if glance.correlation is not None:
        lines += [
            "# HELP coar_held_out_correlation Mean correlation of the best fit on validation masks.",
            "# TYPE coar_held_out_correlation gauge",
            f"coar_held_out_correlation {glance.correlation:.6g}",
        ]
    if glance.lost is not None:
        lines += [
            "# HELP coar_workers_lost Workers lost so far, by the log of the collecting command.",
            "# TYPE coar_workers_lost gauge",
            f"coar_workers_lost {glance.lost}",
        ]
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("\n".join(lines) + "\n")
        partial.replace(path)


def workers_lost(log_file: Path) -> int:
    """Count the lost workers in a log of events; its last line may be incomplete.

    Raises:
        SettingsError: When the log is missing or cannot be read as one.
    """
    try:
        lines = log_file.read_text(encoding="utf-8").split("\n")[:-1]
        return sum(json.loads(line).get("event") == WORKER_LOST for line in lines)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise SettingsError(
            f"{log_file} cannot be read as a log of events ({error}); give the file of 'coar collect --log-file'"
        ) from None


def _glance(place: Path | Address, log_file: Path | None, since: tuple[int, float] | None) -> RunStatus:
    run = Run.open(place)
    mask_gradients = MaskGradients(run)
    units = len(run.units()) + len(mask_gradients.units())
    done = units - len(run.missing_units()) - len(mask_gradients.missing_units())
    grown = done - since[0] if since else 0
    rate = grown / (time.monotonic() - since[1]) if since and grown > 0 else None
    scores = [record.validation for record in finished_fits(run).values() if record.validation is not None]
    best = max(scores, default=None)
    return RunStatus(done, units, rate, best, None if log_file is None else workers_lost(log_file))
