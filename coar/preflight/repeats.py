"""Checks while a run is collected: one pass in a hundred is repeated in another batch, and must give the same.

Checks before a run see few passes. Noise that is used rarely, and conditions on a whole batch that few masks meet, show
under the masks of the run. A repeated pass has a few examples of the unit's, so that all of them cost at most 1 % of
the run. Which passes are repeated depends on their numbers alone.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from coar.equivalence import ROUNDINGS, SMALLEST, Comparison, Kind, allowed_difference, rounding
from coar.errors import CoarError
from coar.examples import rows_of
from coar.forward.batches import ExampleBlock
from coar.forward.runner import FastRunner
from coar.preflight.findings import Findings
from coar.preflight.passes import with_one_rounding
from coar.preflight.tracing import rounding_of
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
        findings: The outcome so far.
    """

    def __init__(self, study: Study, blocks: int) -> None:
        self.findings = Findings(study.accept)
        self._blocks = blocks
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
        few, chosen = _a_few(block, i)
        mask, expected = unit.masks[i : i + 1], unit.outputs[i, chosen]

        precision = max(rounding(runner.model), BFLOAT16 if runner.precision == "bf16" else 0.0)

        def compared(one: np.ndarray, other: np.ndarray) -> Comparison:
            return _compared(one, other, float(np.abs(unit.outputs).max()), precision)

        try:
            found = runner.outputs(few, mask)[0]
        except CoarError:
            raise
        except Exception as error:  # whatever a model may raise
            return _in_words(runner, unit.row + i, f"fails in a batch of {few.size} ({type(error).__name__}: {error})")
        difference = compared(expected, found)
        if not difference.agrees:  # a pass may compute in autocast
            precision = max(precision, rounding_of(lambda: runner.outputs(few, mask)))
            difference = compared(expected, found)
        if difference.agrees:
            return ""
        ((inputs, targets),) = few.batches
        rounded = replace(few, batches=[(with_one_rounding(inputs), targets)])
        if difference.error <= ROUNDINGS * compared(found, runner.outputs(rounded, mask)[0]).error:
            return ""
        if compared(unit.outputs[i], runner.outputs(block, mask)[0]).agrees:
            why = "though they stay the same in the same batch, as where a condition depends on the whole batch"
        else:
            why = "and in a second pass of the same batch too, as where noise is used rarely"
        return _in_words(runner, unit.row + i, f"gives outputs that {difference}, in another batch, {why}")


def _a_few(block: ExampleBlock, turn: int) -> tuple[ExampleBlock, np.ndarray]:
    """Return a block of a few examples of one of a block's batches, and their numbers in the block."""
    number = turn % len(block.batches)
    inputs, targets = block.batches[number]
    size = min(FEW, max(2, len(targets) // 2))
    part = torch.arange(0, len(targets), max(1, len(targets) // size))
    sources = [rows_of(block.sources[number], part)] if block.sources else []
    before = sum(len(other) for _, other in block.batches[:number])
    places = before + part
    chosen = places if block.order is None else block.order.cpu()[places]
    return ExampleBlock([(rows_of(inputs, part), targets[part])], len(places), sources), chosen.numpy()


def _compared(expected: np.ndarray, found: np.ndarray, largest: float, precision: float) -> Comparison:
    """Compare outputs, relative to the unit's largest: small ones may be differences of large numbers."""
    finite = bool(np.isfinite(found).all())
    error = float(np.abs(found - expected).max()) / max(largest, SMALLEST) if finite else float("inf")
    return Comparison(error, allowed_difference(Kind.RECOMPUTED, precision))


def _in_words(runner: FastRunner, row: int, seen: str) -> str:
    return (
        f"under mask {row} {type(runner.model).__name__} {seen}, so outputs would depend on the batch size or on "
        f"chance, and some that are stored may do so already: let the model compute each example alone, and draw no "
        f"numbers in evaluation mode"
    )
