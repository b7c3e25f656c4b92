"""Checks while a run is collected: one pass in a hundred is repeated in another batch, and must give the same.

Checks before a run see few passes. Noise that is used rarely, and conditions on a whole batch that few masks meet, show
under the masks of the run. A repeated pass has a few examples of the unit, in another order, so that all of them cost
at most 1 % of the run. Which passes are repeated depends on their numbers alone.
"""

from dataclasses import dataclass

import numpy as np

from coar.equivalence import ROUNDINGS, SMALLEST, Comparison, Kind, allowed_difference, rounding
from coar.errors import CoarError
from coar.examples import Examples
from coar.forward.batches import ExampleBlock
from coar.forward.runner import FastRunner
from coar.preflight.findings import Findings
from coar.preflight.passes import with_one_rounding
from coar.study import Study

EVERY = 101  # passes of which one is repeated; a prime number, so that every block of examples has its turn
FEW = 8  # most examples of a repeated pass
EXCUSES = ("repeats", "random", "batch", "examples")  # accepted checks that leave nothing to compare
BFLOAT16 = 2.0**-7  # its rounding


@dataclass(frozen=True)
class UnitResult:
    """What was computed for a unit of masks.

    Attributes:
        row: Number of its first mask in the run.
        examples: Positions of its examples in the study.
        number: Number of its block of examples in the run.
        masks: (rows, components) its masks.
        outputs: (rows, examples) the outputs, all finite.
    """

    row: int
    examples: slice
    number: int
    masks: np.ndarray
    outputs: np.ndarray


class Repeats:
    """Repeats passes of a run in other batches.

    Args:
        study: The study.
        blocks: Number of blocks of examples of the run.

    Attributes:
        findings: The outcome; it has the check `repeats` once a pass was repeated.
    """

    def __init__(self, study: Study, blocks: int) -> None:
        self.findings = Findings(study.accept)
        self._study, self._blocks = study, blocks
        self._excused = any(check in study.accept for check in EXCUSES)

    def check(self, runner: FastRunner, block: ExampleBlock, unit: UnitResult) -> None:
        """Repeat those passes of a unit whose turn it is.

        Args:
            runner: The runner that computed the unit.
            block: The unit's examples.
            unit: What it computed.

        Raises:
            AblationError: When a repeated pass gives something else.
        """
        if self._excused:
            return
        for i in range(len(unit.masks)):
            if ((unit.row + i) * self._blocks + unit.number) % EVERY == 0:
                self.findings.conclude("repeats", self._problem(runner, block, unit, i))

    def _problem(self, runner: FastRunner, block: ExampleBlock, unit: UnitResult, i: int) -> str:
        """Return in words how the pass of a unit's i-th mask differs when it is repeated, or ""."""
        count = unit.examples.stop - unit.examples.start
        chosen = np.unique(np.linspace(0, count - 1, min(FEW, max(2, count // 2))).astype(int))[::-1]
        few, mask = self._few(unit.examples.start + chosen, count), unit.masks[i : i + 1]
        expected = unit.outputs[i, chosen]

        def run(examples: Examples) -> np.ndarray:
            size = len(chosen) + int(count <= 2)
            found: np.ndarray = runner.outputs(runner.load(examples, 0, min(size, len(examples))), mask)[0]
            return found[: len(chosen)]

        def compared(one: np.ndarray, other: np.ndarray) -> Comparison:
            return _compared(one, other, float(np.abs(unit.outputs).max()), runner)

        try:
            found = run(few)
        except CoarError:
            raise
        except Exception as error:  # whatever a model may raise
            return _in_words(
                runner, unit.row + i, f"fails in a batch of {len(chosen)} ({type(error).__name__}: {error})"
            )
        difference = compared(expected, found)
        if difference.agrees or difference.error <= ROUNDINGS * compared(found, run(with_one_rounding(few))).error:
            return ""
        if compared(unit.outputs[i], runner.outputs(block, mask)[0]).agrees:
            why = "though they stay the same in the same batch, as where a condition depends on the whole batch"
        else:
            why = "and in a second pass of the same batch too, as where noise is used rarely"
        return _in_words(runner, unit.row + i, f"gives outputs that {difference}, in another batch, {why}")

    def _few(self, positions: np.ndarray, count: int) -> Examples:
        """Return examples, one more where the unit has no others, and the resample sources of all."""
        chosen, study = positions.tolist(), self._study
        if count <= 2:  # the same examples alone would be the same batch
            chosen += [(max(chosen) + 1) % len(study.examples)]
        return study.examples.subset(study.with_sources(list(dict.fromkeys(chosen))))


def _compared(expected: np.ndarray, found: np.ndarray, largest: float, runner: FastRunner) -> Comparison:
    """Compare outputs, relative to the unit's largest: small ones may be differences of large numbers."""
    finite = bool(np.isfinite(found).all())
    error = float(np.abs(found - expected).max()) / max(largest, SMALLEST) if finite else float("inf")
    precision = max(rounding(runner.model), BFLOAT16 if runner.precision == "bf16" else 0.0)
    return Comparison(error, allowed_difference(Kind.RECOMPUTED, precision))


def _in_words(runner: FastRunner, row: int, seen: str) -> str:
    return (
        f"under mask {row} {type(runner.model).__name__} {seen}, so outputs would depend on the batch size or on "
        f"chance, and some that are stored may do so already: let the model compute each example alone, and draw no "
        f"numbers in evaluation mode"
    )
