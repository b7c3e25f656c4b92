"""Checks before a run: two ways to gate components agree, and examples are not calibration examples."""

import logging

import numpy as np
import torch
from torch import Tensor, nn

from coar.ablation.base import Calibrated
from coar.components.table import Components
from coar.equivalence import Kind, compare, rounding
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
            "%d of %d examples of the study are calibration examples too, so the replacements of ablated components "
            "depend on the studied examples; give %s(calibration=...) other examples",
            count,
            len(study.examples),
            type(study.ablation).__name__,
        )


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
        The largest difference of their outputs, relative to the largest output; None when no component has an output,
        or both runners resample in hooks.

    Raises:
        AblationError: When they disagree; a run must not depend on how a mask is applied.
    """
    model, components, constants, output = parts
    rows = [i for i, row in enumerate(components) if row.side != "parameter" and row.site in called]
    block = fast.load(examples, 0, len(examples))
    if not rows or block.sources:
        return None
    chosen, own = components, constants
    if len(rows) < len(components):
        chosen = Components(components[i] for i in rows)
        own = constants[..., torch.from_numpy(components.channels_of(rows))]
    reference = ReferenceRunner(model, chosen, own, output, batch_size=fast.batch_size)
    shared = np.ones_like(masks)
    shared[:, rows] = masks[:, rows]
    ends = sorted({0, len(masks) - 1})
    expected = reference.outputs(reference.load(examples, 0, len(examples)), masks[ends][:, rows])
    found = fast.outputs(block, shared)[ends]
    compared = compare(expected, found, Kind.REFORMULATED, precision=rounding(model))
    if not compared.agrees:  # outputs that are not finite in both ways are an error of the first unit
        raise AblationError(
            f"ablating by weights and by outputs gives outputs that {compared}: some layer does not compute the "
            f"function of its type; exclude it"
        )
    return compared.error


def compare_rows(runner: GatedRunner, block: ExampleBlock, masks: np.ndarray) -> None:
    """Compare outputs of a mask per example with outputs of one mask for all examples.

    Args:
        runner: The runner.
        block: A few examples.
        masks: (examples, components) boolean masks, one per example.

    Raises:
        AblationError: When they disagree, because examples get masks of others, or when the output has no gradient by
            the gates.
    """
    found = runner.mask_gradients(block, masks[None], np.arange(block.size))[2][0]
    expected = runner.outputs(block, masks).diagonal()
    compared = compare(expected, found, Kind.REFORMULATED, precision=rounding(runner.model))
    if not compared.agrees:
        raise AblationError(
            f"a mask for every example and one mask for all give outputs that {compared}: some layer does not put the "
            f"entries of an example side by side; exclude it, or collect masks instead of mask gradients"
        )
