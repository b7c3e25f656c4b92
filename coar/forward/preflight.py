"""Whether numbers can be trusted: two ways to them agree, in gates, rows and precision, and they are finite."""

import logging

import numpy as np
import torch
from torch import Tensor, nn

from coar.ablation.base import Calibrated
from coar.components.table import Components
from coar.equivalence import REFORMULATED, allowed_difference, difference, rounding
from coar.errors import AblationError
from coar.examples import Examples
from coar.forward.batches import ExampleBlock
from coar.forward.model_runner import GatedRunner
from coar.forward.runner import FastRunner, ReferenceRunner
from coar.outputs.base import Output
from coar.study import Study

log = logging.getLogger(__name__)

Parts = tuple[nn.Module, Components, Tensor, Output]


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


def compare_gates(expected: np.ndarray, found: np.ndarray, *, tolerance: float) -> float:
    """Return the largest difference between gated outputs and gated weights, relative to the largest output.

    Raises:
        AblationError: When they disagree, so that no run is made of numbers that depend on how a mask is applied.
    """
    error = difference(expected, found)  # outputs that are not finite in both ways are named by the first unit
    if not error <= tolerance:
        raise AblationError(
            f"ablating by weights and by outputs gives outputs that differ by {error:.1e} of the largest, and "
            f"{tolerance:.1g} is allowed: some layer does not compute what its type promises; exclude it"
        )
    return error


def compare_with_reference(
    fast: FastRunner, parts: Parts, examples: Examples, masks: np.ndarray, called: set[str]
) -> float | None:
    """Compare a fast runner with a reference runner.

    Components that have no output are kept.

    Args:
        fast: A fast runner in float32.
        parts: Its model, components, replacements and output.
        examples: The examples.
        masks: (masks, components) boolean masks; the first and the last are compared.
        called: Sites whose module is called, see `called_sites`.

    Returns:
        What `compare_gates` does; None when no component has an output, or both runners resample in hooks.

    Raises:
        AblationError: When they disagree.
    """
    model, components, constants, output = parts
    rows = [i for i, row in enumerate(components) if row.side != "parameter" and row.site in called]
    block = fast.load(examples, 0, len(examples))
    if not rows or block.sources:
        return None
    chosen = Components(components[i] for i in rows)
    own = constants[..., torch.from_numpy(components.channels_of(rows))]
    reference = ReferenceRunner(model, chosen, own, output, batch_size=fast.batch_size)
    shared = np.ones_like(masks)
    shared[:, rows] = masks[:, rows]
    ends = sorted({0, len(masks) - 1})
    expected = reference.outputs(reference.load(examples, 0, len(examples)), masks[ends][:, rows])
    found = fast.outputs(block, shared)[ends]
    return compare_gates(expected, found, tolerance=allowed_difference(REFORMULATED, rounding(model)))


def compare_rows(runner: GatedRunner, block: ExampleBlock, masks: np.ndarray, *, tolerance: float) -> float:
    """Return the largest difference that a mask per example makes to one mask for all, relative to the largest output.

    Args:
        runner: The runner, whose outputs under one mask are compared with its outputs under a mask per example.
        block: A few examples.
        masks: (examples, components) boolean masks, one per example.
        tolerance: The largest difference that is allowed.

    Raises:
        AblationError: When they disagree, since an example was then given another one's mask, or when there is no
            gradient to be had.
    """
    found = runner.mask_gradients(block, masks[None], np.arange(block.size))[2][0]
    expected = runner.outputs(block, masks).diagonal()
    error = difference(expected, found)
    if not error <= tolerance:
        raise AblationError(
            f"a mask for every example gives outputs that differ by {error:.1e} of the largest from those of one mask "
            f"for all, and {tolerance:.1g} is allowed: some layer does not lay the entries of an example out side by "
            f"side; exclude it, or collect masks instead of mask gradients"
        )
    return error
