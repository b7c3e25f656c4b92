"""What an informed fit cost compared with a classic one, measured once and kept in a file."""

import json
from pathlib import Path
from typing import ClassVar

from coar.errors import CoarError, PipelineError
from coar.settings import Settings


class MeasuredFit(Settings):
    """One way to attributions, measured.

    Attributes:
        method: The method of the fit.
        masks: Training masks: forward passes over all examples.
        gradients: Mask gradients: forward and backward passes over all examples.
        seconds: Processor seconds to collect these and to fit, without test masks.
        correlation: Mean correlation with outputs under held-out masks.
    """

    method: str
    masks: int
    gradients: int
    seconds: float
    correlation: float


class Comparison(Settings):
    """Two ways to attributions of the same study, measured on one machine.

    Attributes:
        ablation: Label of the study's ablation.
        date: When it was measured.
        machine: Where it was measured.
        informed: The fit from mask gradients.
        classic: The fit from masks alone.
    """

    ablation: str
    date: str
    machine: str
    informed: MeasuredFit
    classic: MeasuredFit

    mistake: ClassVar[type[CoarError]] = PipelineError

    @classmethod
    def read(cls, file: Path) -> "Comparison":
        """Read a comparison from a JSON file; raise `PipelineError` when it holds none."""
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise PipelineError(f"{file} holds no comparison of two fits ({error}); write it again") from None

    def __str__(self) -> str:
        new, old = self.informed, self.classic
        rows = ((f"{new.gradients:,} mask gradients", new), (f"{old.masks:,} masks", old))
        lines = [
            f"  {passes:<20} {fit.method:<9} {fit.seconds:5.0f} s   correlation {fit.correlation:.3f}"
            for passes, fit in rows
        ]
        heading = f"measured on {self.date} on one core of {self.machine}, to collect and to fit:"
        request = f"'--fit {old.method} --masks {old.masks}' does the second here"
        return "\n".join([heading, *lines, f"  {request}"])
