"""What the model computes on the examples of a page: predictions, and the examples that excite each component."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from coar.components.table import Component, Components
from coar.examples import call_model, device_of
from coar.forward.copies import device_copy
from coar.outputs.base import find_logits
from coar.outputs.classification import ClassLogit, CorrectClassMargin, CrossEntropy
from coar.study import Study

BATCH = 64  # examples per forward pass
TOP = 8  # examples that are kept per component
CLASSIFIERS = (CorrectClassMargin, ClassLogit, CrossEntropy)  # outputs of (examples, classes) logits
SIDE = 8  # parts of a picture along each side, in which an activation is shown
CELLS = SIDE**2  # of a map; tokens of a text that it covers
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
        maps: (components, top, `CELLS`) activations as shares of the component's largest, 0 for those below 0: over a
            picture's `SIDE` x `SIDE` parts, row by row, in each the largest; or over the first tokens of a text.
    """

    rows: np.ndarray
    values: np.ndarray
    places: np.ndarray
    maps: np.ndarray

    @classmethod
    def none(cls, components: int) -> Self:
        """Return what is known before the first pass."""
        shape = components, TOP
        return cls(
            np.full(shape, -1),
            np.full(shape, -np.inf, dtype=np.float32),
            np.full((*shape, 4), np.nan, dtype=np.float32),
            np.zeros((*shape, CELLS), dtype=np.float32),
        )

    def enter(self, chosen: list[int], more: Self) -> None:
        """Keep the largest activations of some components and of more examples, which come after those so far."""
        own = (self.rows, self.values, self.places, self.maps)
        both = [
            np.concatenate([kept[chosen], new], axis=1)
            for kept, new in zip(own, (more.rows, more.values, more.places, more.maps), strict=True)
        ]
        order = np.argsort(-both[1], axis=1, kind="stable")[:, :TOP]
        for kept, joined in zip(own, both, strict=True):
            kept[chosen] = joined[np.arange(len(chosen))[:, None], order]

    def scaled(self) -> Self:
        """Return the same with maps as shares of each component's largest activation, and NaN where there is none."""
        known = np.isfinite(self.values)
        largest = np.where(known[:, :1], self.values[:, :1], 0).clip(min=1e-12)[:, :, None]
        maps = (self.maps / largest).clip(0, 1)
        return type(self)(np.where(known, self.rows, -1), np.where(known, self.values, np.nan), self.places, maps)


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
    net = device_copy(study.model, device)
    examples, components = study.examples.subset(rows), study.components
    found = Exciting.none(len(components))
    margin, logits, margins = study.output.hard_and_smooth(), [], []
    with torch.no_grad(), _recorded(net, components, batch_norms) as recorded:
        for start in range(0, len(examples), BATCH):
            inputs, targets = examples.block(start, start + BATCH)
            recorded.clear()
            result = call_model(net, inputs)
            if isinstance(study.output, CLASSIFIERS):
                logits.append(find_logits(result).float().cpu())
            if margin is not None:
                margins.append(margin[0].read(result, targets.to(device_of(net))).cpu())
            there = inputs.get("attention_mask") if isinstance(inputs, dict) else None
            for chosen, activations in recorded.items():
                block = _of_block([components[row] for row in chosen], activations.float(), there, start)
                found.enter(list(chosen), block)
    predicted = probability = correct = None
    if margins:
        correct = (torch.cat(margins) > 0).numpy()
    if logits:
        shares, classes = torch.cat(logits).softmax(1).max(1)
        predicted, probability = classes.numpy(), shares.numpy()
    return Computed(predicted, probability, correct, found.scaled())


def activations_of(
    net: nn.Module, component: Component, batch_norms: dict[str, str], inputs: Tensor | dict[str, Tensor]
) -> np.ndarray:
    """Return the (places,) activations of a component on one example, in the order of its feature map or tokens.

    Args:
        net: The model.
        component: The component; of several channels, the Euclidean norm over them is returned.
        batch_norms: By site, the path of the batch norm that follows it.
        inputs: The inputs of the example, with an axis of length 1.
    """
    with torch.no_grad(), _recorded(net, Components([component]), batch_norms) as recorded:
        call_model(net, inputs)
    (activations,) = recorded.values()
    own = activations[0].flatten(0, -2)[:, component.position : component.position + component.size].float().cpu()
    found: np.ndarray = (own[:, 0] if component.size == 1 else own.norm(dim=1)).numpy()
    return found


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


def _of_block(chosen: list[Component], activations: Tensor, there: Tensor | None, start: int) -> Exciting:
    """Return a site's components' largest activations within a block of examples, which begins at `start`.

    Args:
        chosen: The components.
        activations: (examples, ..., channels) activations of the site.
        there: (examples, tokens) mask of the tokens that are no padding; None without one.
        start: Number of the first example.
    """
    n, places = len(activations), tuple(activations.shape[1:-1])
    flat = activations.reshape(n, -1, activations.shape[-1])
    if all(one.size == 1 for one in chosen):
        sizes = flat[:, :, [one.position for one in chosen]]
    else:
        sizes = torch.stack([flat[:, :, one.position : one.position + one.size].norm(dim=-1) for one in chosen], -1)
    if there is not None and there.shape == sizes.shape[:2]:
        present = there.bool().to(sizes.device)
        order = (~present).long().argsort(dim=1, stable=True)  # the text first, then its padding
        sizes = sizes.masked_fill(~present[:, :, None], -torch.inf).take_along_dim(order[:, :, None], dim=1)
    largest, where = (value.T for value in sizes.max(dim=1))
    top, rows = largest.sort(dim=1, descending=True, stable=True)
    top, rows = top[:, :TOP], rows[:, :TOP]
    own = sizes.permute(2, 0, 1)[torch.arange(len(chosen), device=rows.device)[:, None], rows]
    boxes = _boxes(where.take_along_dim(rows, dim=1).cpu().numpy(), places)
    return Exciting(start + rows.cpu().numpy(), top.cpu().numpy(), boxes, _map(own, places).cpu().numpy())


def _map(activations: Tensor, places: tuple[int, ...]) -> Tensor:
    """Return (components, examples, `CELLS`) maps of (components, examples, places) activations."""
    positive = activations.clamp(min=0)
    if len(places) == 2:
        pictures = positive.reshape(*positive.shape[:2], *places)
        return functional.adaptive_max_pool2d(pictures, (SIDE, SIDE)).flatten(2)
    return functional.pad(positive[:, :, :CELLS], (0, max(0, CELLS - positive.shape[2])))


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
