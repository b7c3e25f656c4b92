"""How far a run is, how fast it grows, and when it will be done."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coar.errors import SettingsError
from coar.store.fits import fit_facts, fit_names
from coar.store.places import Address
from coar.store.probes import Probes
from coar.store.refusals import storage_errors
from coar.store.run import Run


@dataclass(frozen=True)
class Glance:
    """How far a run is at one moment.

    Attributes:
        done: Units that are stored, of masks and of probes.
        units: Units it shall have.
        rate: Units per second since the first glance; None at that, and while nothing has been stored since.
        correlation: Mean correlation of the best of the run's fits with outputs under masks that none was fitted on,
            as fitting measured it on validation masks; None where there are none.
    """

    done: int
    units: int
    rate: float | None
    correlation: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end at this rate; None where there is none."""
        return None if self.rate is None else (self.units - self.done) / self.rate

    def __str__(self) -> str:
        share = f"{self.done} of {self.units} units"
        if self.correlation is not None:
            share += f", held-out correlation {self.correlation:.3f}"
        if self.seconds_left is None or self.rate is None or self.done == self.units:
            return share
        ending = time.strftime("%d %b %H:%M:%S", time.localtime(time.time() + self.seconds_left))
        return f"{share}, {60 * self.rate:.1f} a minute, done about {ending}"


def watched(place: Path | Address, *, every: float | None) -> Iterator[Glance]:
    """Yield how far a run is: once, or every so many seconds until it is complete.

    Raises:
        SettingsError: When the pause is not above 0.
    """
    if every is not None and not every > 0:
        raise SettingsError(f"a pause of {every:g} s was given; give seconds above 0")
    began, first, glance = time.monotonic(), _glance(place, None), None
    while glance is None or (every is not None and glance.done < glance.units):
        if glance is not None and every is not None:
            time.sleep(every)
        glance = _glance(place, (first.done, began)) if glance else first
        yield glance


def write_metrics(glance: Glance, path: Path) -> None:
    """Write a glance in Prometheus' text format, whole or not at all, as its node exporter reads it from a folder.

    Raises:
        StorageError: When the disk refuses.
    """
    lines = [
        "# HELP coar_units_stored Units of the run that are stored.",
        "# TYPE coar_units_stored gauge",
        f"coar_units_stored {glance.done}",
        "# HELP coar_units_planned Units that the run shall have.",
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
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("\n".join(lines) + "\n")
        partial.replace(path)


def _glance(place: Path | Address, since: tuple[int, float] | None) -> Glance:
    run = Run.open(place)
    probes = Probes(run)
    units = len(run.units()) + len(probes.units())
    done = units - len(run.missing_units()) - len(probes.missing_units())
    grown = done - since[0] if since else 0
    rate = grown / (time.monotonic() - since[1]) if since and grown > 0 else None
    known = (fit_facts(run, name).get("validation") for name in fit_names(run))
    return Glance(done, units, rate, max((value for value in known if value is not None), default=None))
