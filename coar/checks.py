"""Whether numbers can be trusted: two ways to them agree, in gates, rows and precision, and they are finite."""

import logging
import platform
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from coar.ablation import Calibrated
from coar.batches import Block
from coar.components import Components
from coar.devices import rounding
from coar.errors import AblationError, OutputError, PrecisionError
from coar.examples import Examples
from coar.outputs import Output
from coar.store import ProbeUnit, Run, Unit
from coar.study import Study
from coar.worker import Precision, Worker

log = logging.getLogger(__name__)

GATE_TOLERANCE = 1e-3  # of the largest output, that two ways of gating may differ by,
ROUNDINGS = 8  # or as many roundings of the model's own precision, if that is more

Parts = tuple[nn.Module, Components, Tensor, Output]


@dataclass(frozen=True)
class PrecisionCheck:
    """How bfloat16 compares with float32 on the same masks and examples.

    Attributes:
        error: Root mean square difference over masks, relative to the float32 outputs' standard deviation over masks,
            averaged over examples.
        speedup: Time of float32 over time of bfloat16.
        tolerance: Largest error that was allowed.
        masks: How many masks were compared.
        device: The kind of device and processor.
    """

    error: float
    speedup: float
    tolerance: float
    masks: int
    device: str


def warn_of_overlap(study: Study) -> None:
    """Warn when examples of the study are calibration examples of its ablation too."""
    if not isinstance(study.ablation, Calibrated):
        return
    seen = set(study.ablation.calibration.input_hashes())
    count = sum(digest in seen for digest in study.examples.input_hashes())
    if count:
        log.warning(
            "%d of %d examples of the study are calibration examples too, so what replaces ablated components depends "
            "on the examples that are examined; give %s(calibration=...) other examples",
            count,
            len(study.examples),
            type(study.ablation).__name__,
        )


def gate_tolerance(model: nn.Module) -> float:
    """Return how far two ways of gating may be apart, relative to the largest output, in the model's precision."""
    return max(GATE_TOLERANCE, ROUNDINGS * rounding(model))


def compare_gates(expected: np.ndarray, found: np.ndarray, *, tolerance: float = GATE_TOLERANCE) -> float:
    """Return the largest difference between gated outputs and gated weights, relative to the largest output.

    Raises:
        AblationError: When they disagree, so that no run is made of numbers that depend on how a mask is applied.
    """
    with np.errstate(invalid="ignore"):  # of infinite outputs, which the first unit names
        error = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6))
    if error > tolerance:
        raise AblationError(
            f"ablating by weights and by outputs gives outputs that differ by {error:.1e} of the largest, and "
            f"{tolerance:.1g} is allowed: some layer does not compute what its type promises; exclude it"
        )
    return error


def compare_with_hooks(
    worker: Worker, parts: Parts, examples: Examples, masks: np.ndarray, called: set[str]
) -> float | None:
    """Compare a worker with hooks that apply one mask per forward to examples as they are, padding and all.

    Components that have no output are kept.

    Args:
        worker: A worker in float32.
        parts: Its model, components, replacements and output.
        examples: The examples.
        masks: (masks, components) boolean masks; the first and the last are compared.
        called: Sites whose module is called, see `called_sites`.

    Returns:
        What `compare_gates` does; None when no component has an output, or donors are in hooks either way.

    Raises:
        AblationError: When they disagree.
    """
    model, components, constants, output = parts
    rows = [i for i, row in enumerate(components) if row.side != "parameter" and row.site in called]
    block = worker.load(examples, 0, len(examples))
    if not rows or block.donors:
        return None
    chosen = Components(components[i] for i in rows)
    own = constants[..., torch.from_numpy(components.channels_of(rows))]
    plain = Worker(model, chosen, own, output, through_outputs=True, batch_size=worker.batch_size)
    shared = np.ones_like(masks)
    shared[:, rows] = masks[:, rows]
    ends = sorted({0, len(masks) - 1})
    expected = plain.outputs(plain.load(examples, 0, len(examples)), masks[ends][:, rows])
    found = worker.outputs(block, shared)[ends]
    return compare_gates(expected, found, tolerance=gate_tolerance(model))


def compare_rows(worker: Worker, block: Block, masks: np.ndarray, *, tolerance: float) -> float:
    """Return the largest difference that a mask per example makes to one mask for all, relative to the largest output.

    Args:
        worker: The worker.
        block: A few examples.
        masks: (examples, components) boolean masks, one per example.
        tolerance: The largest difference that is allowed.

    Raises:
        AblationError: When they disagree, since an example was then given another one's mask, or when there is no
            gradient to be had.
    """
    found = worker.probe(block, masks[None], np.arange(block.size))[2][0]
    expected = worker.outputs(block, masks).diagonal()
    error = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6))
    if error > tolerance:
        raise AblationError(
            f"a mask for every example gives outputs that differ by {error:.1e} of the largest from those of one mask "
            f"for all, and {tolerance:.1g} is allowed: some layer does not lay the entries of an example out side by "
            f"side; exclude it, or collect masks instead of probes"
        )
    return error


def compare_precisions(plain: Worker, low: Worker, block: Block, masks: np.ndarray, tolerance: float) -> PrecisionCheck:
    """Measure bfloat16 against float32 on the first masks of the first unit."""
    for worker in (plain, low):
        worker.outputs(block, masks[:1])  # the first pass also pays for kernels to be chosen
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
    """Return the precision to use; raise `PrecisionError` when `bf16` was asked for and is too far off.

    `auto` takes bfloat16 when it is within the tolerance and faster, and float32 otherwise.
    """
    if asked == "bf16" and not check.error <= check.tolerance:
        raise PrecisionError(
            f"bfloat16 moves the outputs by {check.error:.3f} of their spread over {check.masks} masks, and the "
            f"tolerance is {check.tolerance}; use float32 or auto, or raise the precision tolerance"
        )
    return "bf16" if asked == "bf16" or (check.error <= check.tolerance and check.speedup > 1) else "float32"


def check_probes_finite(
    study: Study, unit: ProbeUnit, examples: slice, kept: np.ndarray, ablated: np.ndarray, outputs: np.ndarray
) -> None:
    """Raise `OutputError`, naming round and example, when probes give an output or a gradient that is not finite."""
    bad = ~np.isfinite(outputs).all(0) | np.isinf(kept).any(1) | np.isinf(ablated).any(1)
    bad |= (np.isnan(kept) & np.isnan(ablated)).any(1)  # one end without probes is NaN, never both
    if bad.any():
        example = examples.start + int(bad.argmax())
        raise OutputError(
            f"round {unit.round} of probes gives outputs or gradients that are not finite for example "
            f"{_identity(study, example)}; nothing of the unit was stored: use float32, a smaller ablated fraction, or "
            f"leave the example out in a new run"
        )


def check_finite(study: Study, run: Run, unit: Unit, outputs: np.ndarray, base: np.ndarray | None) -> None:
    """Raise `OutputError`, naming mask and example, when an output of a unit is not finite."""
    rows, examples = run.rows_of(unit)
    if base is not None and not np.isfinite(base).all():
        example = examples.start + int((~np.isfinite(base)).argmax())
        raise OutputError(
            f"the unablated model gives {base[example - examples.start]} for example {_identity(study, example)}; mend "
            f"that input or leave it out"
        )
    bad = np.argwhere(~np.isfinite(outputs))
    if len(bad):
        row, example = rows.start + int(bad[0, 0]), examples.start + int(bad[0, 1])
        raise OutputError(
            f"{run.plan.label(row)} gives {outputs[tuple(bad[0])]} for example {_identity(study, example)} ({len(bad)} "
            f"of {outputs.size} outputs in this unit are not finite); nothing of the unit was stored: use float32, a "
            f"smaller ablated fraction, or leave the example out in a new run"
        )


def _identity(study: Study, example: int) -> str:
    identifier = np.asarray(study.examples.metadata["id"])[example]
    return f"{example} (id {identifier})"
