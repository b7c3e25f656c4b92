"""A measured comparison of the costs of an informed and a classic fit, read from a file."""

import json
from pathlib import Path
from typing import ClassVar

from coar.errors import CoarError, PipelineError
from coar.settings import Settings


class MeasuredFit(Settings):
    """The measured cost and accuracy of one fit.

    Attributes:
        method: The method of the fit.
        masks: Training masks: forward passes over all examples.
        gradients: Mask gradients: forward and backward passes over all examples.
        seconds: Processor seconds to collect the masks and mask gradients and to fit, without test masks.
        correlation: Mean correlation of predictions with outputs under held-out masks.
    """

    method: str
    masks: int
    gradients: int
    seconds: float
    correlation: float


class Comparison(Settings):
    """Two fits of the same study, measured on one machine.

    Attributes:
        ablation: Label of the study's ablation.
        date: Date of the measurement.
        machine: The machine of the measurement.
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
        """Read a comparison from a JSON file; raise `PipelineError` when the file does not hold one."""
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
