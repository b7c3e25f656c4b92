"""Checks of gradients by gates: they describe what a small change of the gates does, for each example."""

import logging
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from coar.components.table import Side
from coar.equivalence import ROUNDINGS, Kind, compare, rounding
from coar.errors import CoarError
from coar.forward.batches import ExampleBlock
from coar.forward.model_runner import GatedRunner
from coar.forward.runner import ReferenceRunner
from coar.outputs.base import RelativeOutput
from coar.preflight.absolute import absolute
from coar.preflight.findings import Findings
from coar.preflight.gates import agree
from coar.preflight.tracing import rounding_of
from coar.study import Study

log = logging.getLogger(__name__)
ROWS = 8  # examples on which a mask per example is compared with one mask for all
SIZES = (1, 2, 4, 8)  # of the batches in which the gradients of the same examples are compared
FEW = 2  # examples on which gradients are compared with changes of gates
ZEROS, OTHERS = 8, 3  # sites compared, of those without any gradient and of the others
STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)  # changes of gates
ALLOWED = 0.2  # difference of a gradient from the effect of such a change, relative to the effect
APART = 0.1  # difference of an example's gradients in batches of two sizes, relative to their size
ALIKE = 0.5  # difference of the slopes on either side up to which both measure one, relative to their mean
GROWN = 1.5  # growth of this difference, from one step to the next shorter one, from which on there is a jump
SETTLED = 0.1  # difference of the effects of two steps up to which both measure the slope
FINEST = 1e-6  # rounding above which small changes of gates say nothing


def check_gradients(findings: Findings, study: Study, model: nn.Module, *, batch_size: int | None = None) -> None:
    """Check mask gradients of a few examples.

    Args:
        findings: Takes the outcomes.
        study: The study.
        model: A copy of its model made by `device_copy`.
        batch_size: Most examples per pass.

    Raises:
        AblationError: When a component or the output has no gradient, or a check fails that the study does not accept.
    """
    zeros = torch.zeros(study.components.width)
    reference = ReferenceRunner(model, study.components, zeros, study.output, batch_size=batch_size)
    block = reference.load(study.examples, 0, ROWS)
    masks = study.sampler.masks("gradient", range(block.size), len(study.components))
    findings.conclude("rows", mixed_rows(reference, block, masks))
    if isinstance(study.output, RelativeOutput):  # whose gradient at the unablated model may be 0
        reference = ReferenceRunner(model, study.components, zeros, absolute(study.output), batch_size=batch_size)
    blocks = [reference.load(study.examples, 0, size) for size in SIZES if size <= len(study.examples)]
    findings.conclude("rows", gradients_by_size(reference, blocks))
    findings.conclude("gradients", wrong_gradients(reference, reference.load(study.examples, 0, FEW)))


def mixed_rows(runner: GatedRunner, block: ExampleBlock, masks: np.ndarray) -> str:
    """Return in words how outputs of a mask per example differ from those of one mask for all examples, or "".

    Args:
        runner: The runner.
        block: A few examples.
        masks: (examples, components) boolean masks, one per example.

    Raises:
        AblationError: When the output has no gradient by the gates.
    """
    base = runner.outputs(block, np.ones((1, masks.shape[1]), dtype=bool))
    precision = rounding(runner.model)

    def both(rows_masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = runner.mask_gradients(block, rows_masks[None], np.arange(block.size))[2]
        return runner.outputs(block, rows_masks).diagonal()[None], found

    expected, found = both(masks)
    if agree(base, expected, found, precision):
        return ""
    place = ""
    for (site, side, _), rows in runner.components.sites().items():
        alone = np.ones_like(masks)
        alone[:, rows] = masks[:, rows]
        if not agree(base, *both(alone), precision):
            place = f" at the {side} of {site!r}"
            break
    compared = compare(expected, found, Kind.REFORMULATED, precision=precision)
    return (
        f"a mask for every example and one mask for all give outputs that {compared}{place}: some layer does not put "
        f"the entries of an example side by side, or holds examples along no one axis, so mask gradients would mix "
        f"examples; exclude it, or collect masks instead of mask gradients"
    )


def gradients_by_size(runner: GatedRunner, blocks: list[ExampleBlock]) -> str:
    """Return in words how gradients of the same examples differ in a smaller and in a larger batch, or "".

    The smallest batch that the model runs on is compared with the next one: many models fail on one example alone.

    Args:
        runner: The runner.
        blocks: The first examples, in batches of growing size.
    """
    for small, large in pairwise(blocks):
        try:
            by_itself = runner.full_model_gradients(small)
        except CoarError:
            raise
        except Exception as error:  # whatever a model may raise
            log.warning(
                "gradients in a batch of %d are not compared, since the model fails on it: %s", small.size, error
            )
            continue
        return _apart(runner, by_itself, runner.full_model_gradients(large)[: small.size], small.size, large.size)
    return ""


def _apart(runner: GatedRunner, by_itself: np.ndarray, in_batch: np.ndarray, small: int, large: int) -> str:
    precision = max(rounding(runner.model), float(np.finfo(np.float32).eps))
    error, size = _norm(by_itself - in_batch), _norm(in_batch)
    if not error > max(APART, 8 * ROUNDINGS * precision) * size:
        return ""
    return (
        f"gradients of an example in a batch of {small} differ by {error / size:.1e} from those that it has in a batch "
        f"of {large}, though outputs do not: an operation has wrong derivatives for some sizes of a batch, as torch's "
        f"fused attention on a CPU may for a batch of one, so mask gradients would depend on the batch size; turn "
        f"fused attention off, or collect masks instead of mask gradients"
    )


def wrong_gradients(runner: GatedRunner, block: ExampleBlock) -> str:
    """Return in words at which site the gradients by gates differ from the effect of small changes of them, or "".

    Sites without any gradient come first: there, autograd may not reach the gates, though ablation does.
    """
    gradients = runner.full_model_gradients(block)  # (examples, components)
    precision = max(rounding(runner.model), float(np.finfo(np.float32).eps))
    sites = list(runner.components.sites().items())
    silent = [one for one in sites if not gradients[:, one[1]].any()]
    others = [one for one in sites if gradients[:, one[1]].any()]
    spread = np.unique(np.linspace(0, len(others) - 1, min(OTHERS, len(others))).round().astype(int))
    for place, rows in [*silent[:ZEROS], *(others[i] for i in spread)]:
        seen = _compared(runner, block, rows, gradients, precision)
        if seen and (used := rounding_of(lambda: runner.base_output(block))) > precision:  # as in autocast
            precision = used
            seen = _compared(runner, block, rows, gradients, precision)
        if seen:
            return _in_words(runner.model, place, seen, silent=not gradients[:, rows].any())
    return ""


def _compared(
    runner: GatedRunner, block: ExampleBlock, rows: list[int], gradients: np.ndarray, precision: float
) -> str:
    """Return in words how gradients differ from the effects of steps in a direction of a site's gates, or "".

    A gradient between the slopes on either side is right, such as one at a kink. It is wrong only if two steps give the
    same effect per length and no step agrees with it: where the output is curved or has many kinks, longer steps do not
    measure the slope, and where roundings are large, shorter ones do not.
    """
    direction = np.zeros(len(runner.components), dtype=np.float32)
    direction[rows] = np.resize([1.0, -1.0, 1.0], len(rows))
    by_gradient = gradients @ direction
    if precision >= FINEST:  # only whether there is a gradient at all can be judged
        kept, removed = runner.outputs(block, _removed(direction)).astype(np.float64)
        effect, noise = kept - removed, 4 * ROUNDINGS * precision * np.abs(kept).max()
        return "" if by_gradient.any() or not _norm(effect) > noise else _seen(effect, by_gradient)
    base = runner.outputs(block, np.ones((1, len(direction)), dtype=np.float32))[0].astype(np.float64)
    verdict, earlier, agreed = (
        "",
        None,
        None,
    )  # the effect, and how far slopes on both sides lie apart, at a step before
    for step in STEPS:
        masks = np.stack([1 + step * direction, 1 - step * direction]).astype(np.float32)
        up, down = runner.outputs(block, masks).astype(np.float64)
        slopes = np.stack([up - base, base - down]) / step  # on either side; they differ where the output has a kink
        effect, noise = slopes.mean(0), 8 * ROUNDINGS * precision * np.abs(base).max() / step
        if earlier is not None and noise > ALLOWED * max(_norm(effect), _norm(by_gradient)):
            return verdict
        difference = by_gradient - by_gradient.clip(slopes.min(0), slopes.max(0))
        apart = _norm(slopes[0] - slopes[1])
        if not np.isfinite(difference).all() or _norm(difference) <= ALLOWED * _norm(effect) + noise:
            if not apart > ALIKE * _norm(effect) + noise or (agreed is not None and apart <= GROWN * agreed):
                return ""
            agreed = apart  # at a jump, they lie further apart the shorter the step is
        else:
            agreed = None
            settled = earlier is not None and _norm(effect - earlier) <= SETTLED * _norm(effect)
            if settled or _norm(effect) <= noise:  # 0 between the jumps of what autograd takes for a smooth function
                verdict = _seen(effect, by_gradient)
        earlier = effect
    return verdict if by_gradient.any() else _seen(effect, by_gradient)


def _seen(effect: np.ndarray, by_gradient: np.ndarray) -> str:
    return f"{_norm(effect):.2g} by a change of the gates and {_norm(by_gradient):.2g} by the gradient"


def _removed(direction: np.ndarray) -> np.ndarray:
    """Return two masks: all that keeps everything, and one that ablates the site."""
    return np.stack([np.ones_like(direction), (direction == 0).astype(np.float32)])


def _norm(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


def _in_words(model: nn.Module, place: tuple[str, Side, int], seen: str, *, silent: bool) -> str:
    site, side, _ = place
    kind = type(model.get_submodule(site)).__name__
    if silent:
        return (
            f"the gates at the {side} of {site!r}, a {kind}, have no gradient, though they change the output ({seen}): "
            f"something after them is computed without autograd, as under no_grad or after detach, so everything made "
            f"from mask gradients would be 0 there; collect masks instead of mask gradients, or let gradients pass"
        )
    return (
        f"the gradient by the gates at the {side} of {site!r}, a {kind}, is not the output's ({seen}): a part of what "
        f"follows is computed without autograd, as under no_grad, after detach or by rounding, so everything made from "
        f"mask gradients would be wrong there; collect masks instead of mask gradients, or let gradients pass"
    )
