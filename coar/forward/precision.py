"""Measured error and speed of bfloat16 against float32, and the choice between them."""

import platform
import time
from dataclasses import dataclass

import numpy as np

from coar.errors import PrecisionError
from coar.forward.batches import ExampleBlock
from coar.forward.execution_plan import Precision
from coar.forward.runner import FastRunner


@dataclass(frozen=True)
class PrecisionCheck:
    """How bfloat16 compares with float32 on the same masks and examples.

    Attributes:
        error: Root mean square difference over masks, relative to the float32 outputs' standard deviation over masks,
            averaged over examples.
        speedup: Time of float32 over time of bfloat16.
        tolerance: Largest allowed error.
        masks: Number of masks in the comparison.
        device: Kind of device and processor.
    """

    error: float
    speedup: float
    tolerance: float
    masks: int
    device: str


def compare_precisions(
    plain: FastRunner, low: FastRunner, block: ExampleBlock, masks: np.ndarray, tolerance: float
) -> PrecisionCheck:
    """Measure bfloat16 against float32 on the first masks of the first unit."""
    for worker in (plain, low):
        worker.outputs(block, masks[:1])  # the first pass also chooses kernels
    start = time.perf_counter()
    exact = plain.outputs(block, masks)
    middle = time.perf_counter()
    rough = low.outputs(block, masks)
    end = time.perf_counter()
    spread = exact.std(axis=0)
    difference = np.sqrt(((rough - exact) ** 2).mean(axis=0))
    error = float((difference / np.maximum(spread, 1e-6)).mean())
    return PrecisionCheck(
        error, (middle - start) / (end - middle), tolerance, len(masks), f"{plain.device.type} {platform.machine()}"
    )


def choose_precision(asked: str, check: PrecisionCheck) -> Precision:
    """Return the precision to use.

    `auto` takes bfloat16 when it is within the tolerance and faster, and float32 otherwise.

    Raises:
        PrecisionError: When `bf16` is requested and its error is above the tolerance.
    """
    if asked == "bf16" and not check.error <= check.tolerance:
        raise PrecisionError(
            f"bfloat16 moves the outputs by {check.error:.3f} of their spread over {check.masks} masks, and the "
            f"tolerance is {check.tolerance}; use float32 or auto, or raise the precision tolerance"
        )
    return "bf16" if asked == "bf16" or (check.error <= check.tolerance and check.speedup > 1) else "float32"
