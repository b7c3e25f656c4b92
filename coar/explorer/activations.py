"""What the model computes on the examples of a page: predictions, and the examples that excite each component."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from coar.components.table import Components
from coar.examples import call_model
from coar.forward.copies import device_copy
from coar.forward.devices import choose_device
from coar.outputs.base import find_logits
from coar.outputs.classification import ClassLogit, CorrectClassMargin, CrossEntropy
from coar.study import Study

BATCH = 64  # examples per forward pass
TOP = 8  # examples that are kept per component
CLASSIFIERS = (CorrectClassMargin, ClassLogit, CrossEntropy)  # outputs of (examples, classes) logits
KERNEL = 31  # pixels of a kernel's side, at most


@dataclass(frozen=True)
class Exciting:
    """The examples with the largest activations of each component.

    A component of several channels, such as an attention head, has the Euclidean norm over its channels.

    Attributes:
        rows: (components, top) numbers of examples, the largest activation first; -1 where a component has none.
        values: (components, top) activations.
        places: (components, top, 4) left, top, width and height of the feature map's cell with that activation, as
            shares of the picture; or the position in the text, -1, -1, -1; NaN where there is no place.
    """

    rows: np.ndarray
    values: np.ndarray
    places: np.ndarray


@dataclass(frozen=True)
class Computed:
    """What the model computes on some examples.

    Attributes:
        predicted: (examples,) classes; None where the output is not one of a classifier.
        probability: (examples,) their probabilities; None likewise.
        correct: (examples,) whether the output's margin against the largest competitor is above 0; None without one.
        exciting: The examples that excite each component.
    """

    predicted: np.ndarray | None
    probability: np.ndarray | None
    correct: np.ndarray | None
    exciting: Exciting


def compute(study: Study, rows: np.ndarray, batch_norms: dict[str, str], *, device: str = "auto") -> Computed:
    """Run the unablated model on examples, and record its predictions and the largest activations of components.

    The activation of a layer that a batch norm follows is that of the batch norm.

    Args:
        study: The study.
        rows: Positions of the examples.
        batch_norms: By site, the path of the batch norm that follows it.
        device: Where to compute.

    Raises:
        SettingsError: When there is no such device.
    """
    place = choose_device(device)
    net = device_copy(study.model, place)
    examples, components = study.examples.subset(rows), study.components
    shape = len(components), len(examples)
    found = np.full(shape, -np.inf, dtype=np.float32), np.full((*shape, 4), np.nan, dtype=np.float32)
    margin, logits, margins = study.output.hard_and_smooth(), [], []
    with torch.no_grad(), _recorded(net, components, batch_norms) as recorded:
        for start in range(0, len(examples), BATCH):
            inputs, targets = examples.block(start, start + BATCH)
            recorded.clear()
            result = call_model(net, inputs)
            if isinstance(study.output, CLASSIFIERS):
                logits.append(find_logits(result).float().cpu())
            if margin is not None:
                margins.append(margin[0].read(result, targets.to(place)).cpu())
            there = inputs.get("attention_mask") if isinstance(inputs, dict) else None
            for chosen, activations in recorded.items():
                _enter(found, chosen, components, activations.float(), there, start)
    predicted = probability = correct = None
    if margins:
        correct = (torch.cat(margins) > 0).numpy()
    if logits:
        shares, classes = torch.cat(logits).softmax(1).max(1)
        predicted, probability = classes.numpy(), shares.numpy()
    return Computed(predicted, probability, correct, _strongest(*found))


def first_kernels(model: nn.Module, components: Components) -> dict[int, np.ndarray]:
    """Return, by row number, the kernels of filters that read the picture: (height, width, channels), 1 or 3 channels.

    These are the filters of the first convolution of the table, if it has one or three input channels.
    """
    site = components[0].site
    module = dict(model.named_modules()).get(site)
    if not isinstance(module, nn.Conv2d) or module.in_channels not in (1, 3) or max(module.kernel_size) > KERNEL:
        return {}
    weight = module.weight.detach().cpu().float().permute(0, 2, 3, 1).numpy()
    whole = [
        (i, row) for i, row in enumerate(components) if row.site == site and row.side == "output" and row.size == 1
    ]
    return {i: weight[row.position] for i, row in whole}


@contextmanager
def _recorded(
    net: nn.Module, components: Components, batch_norms: dict[str, str]
) -> Iterator[dict[tuple[int, ...], Tensor]]:
    """Hook every site; each pass enters (examples, ..., channels) activations by the site's row numbers."""
    modules = dict(net.named_modules())
    recorded: dict[tuple[int, ...], Tensor] = {}
    handles: list[RemovableHandle] = []
    for (site, side, axis), rows in components.sites().items():
        if site not in modules or side not in ("output", "input"):
            continue
        module = modules[batch_norms.get(site, site)] if side == "output" else modules[site]
        enter = partial(_keep, recorded, tuple(rows), axis)
        if side == "output":
            handles.append(module.register_forward_hook(lambda _, __, out, enter=enter: enter(out)))
        else:
            handles.append(module.register_forward_pre_hook(lambda _, args, enter=enter: enter(args)))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _keep(recorded: dict[tuple[int, ...], Tensor], rows: tuple[int, ...], axis: int, value: Any) -> None:
    """Enter the tensor that a site returned or received, its component axis last."""
    if isinstance(value, tuple):
        value = value[0] if value else None
    if isinstance(value, Tensor):
        recorded[rows] = value.movedim(axis, -1)


def _enter(
    found: tuple[np.ndarray, np.ndarray],
    rows: tuple[int, ...],
    components: Components,
    activations: Tensor,
    there: Tensor | None,
    start: int,
) -> None:
    """Enter, for a site's components and a block of examples, the largest activation over places, and its place."""
    n, places = len(activations), tuple(activations.shape[1:-1])
    flat = activations.reshape(n, -1, activations.shape[-1])
    chosen = [components[row] for row in rows]
    if all(one.size == 1 for one in chosen):
        sizes = flat[:, :, [one.position for one in chosen]]
    else:
        sizes = torch.stack([flat[:, :, one.position : one.position + one.size].norm(dim=-1) for one in chosen], -1)
    if there is not None and there.shape == sizes.shape[:2]:
        sizes = sizes.masked_fill(~there.bool().to(sizes.device)[:, :, None], -torch.inf)
    values, where = sizes.max(dim=1)
    found[0][list(rows), start : start + n] = values.T.cpu().numpy()
    found[1][list(rows), start : start + n] = _boxes(where.T.cpu().numpy(), places)


def _boxes(where: np.ndarray, places: tuple[int, ...]) -> np.ndarray:
    """Return (components, examples, 4) places of flat indices within (height, width), or (length,)."""
    boxes = np.full((*where.shape, 4), np.nan, dtype=np.float32)
    if len(places) == 2:
        height, width = places
        row, column = np.divmod(where, width)
        boxes[..., 0], boxes[..., 1] = column / width, row / height
        boxes[..., 2], boxes[..., 3] = 1 / width, 1 / height
    elif len(places) == 1:
        boxes[..., 0], boxes[..., 1:] = where, -1
    return boxes


def _strongest(values: np.ndarray, places: np.ndarray) -> Exciting:
    """Return the examples with the largest activations."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :TOP]
    top = np.take_along_axis(values, order, axis=1)
    boxes = np.take_along_axis(places, order[:, :, None], axis=1)
    known = np.isfinite(top)
    return Exciting(np.where(known, order, -1), np.where(known, top, np.nan), boxes)
