"""Leave-one-out by captum, one perturbation per forward pass, for comparison with the package's own."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from captum.attr import LayerFeatureAblation
from torch import Tensor, nn

import coar
from coar.components.table import Component
from coar.forward.devices import batch_size_on
from coar.peers import CaptumReader, PeerAttributions, by_channel


def layer_feature_ablation(
    study: coar.Study, *, device: str = "auto", batch_size: int | None = None
) -> PeerAttributions:
    """Attribute to each component the drop in output when it alone is ablated, one perturbation per forward pass.

    The positions of a component are one group of captum's feature mask, and the channels of a module outside all
    components are another, whose pass is not used. In addition, captum makes two passes per module before the first
    perturbation. An example must have one entry inside the model.

    Args:
        study: The study; its ablation gives the replacement constants.
        device: Where to compute.
        batch_size: Most examples per forward pass; by default as in `coar.collect`.

    Raises:
        AblationError: When components are parameter slices, which have no activation.
    """
    reader = CaptumReader(study, device)
    rows = batch_size or batch_size_on(reader.device)
    constants = study.ablation.replacements(reader.model, study.components, batch_size=rows).to(reader.device)
    shapes = _activation_shapes(study, reader)
    weights = np.empty((len(study.examples), len(study.components)), dtype=np.float32)
    start = time.perf_counter()
    for at in range(0, len(study.examples), rows):
        part = slice(at, min(at + rows, len(study.examples)))
        *inputs, targets = reader.load(study.examples, part)
        for (site, side, axis), indices in study.components.sites().items():
            chosen = [study.components[i] for i in indices]
            values = LayerFeatureAblation(reader, reader.model.get_submodule(site)).attribute(
                tuple(inputs),
                additional_forward_args=(targets,),
                attribute_to_layer_input=side == "input",
                layer_mask=_groups(shapes[site, side], axis, chosen),
                layer_baselines=_constants(shapes[site, side], axis, chosen, constants[indices]),
            )
            first = [component.position for component in chosen]  # a group's positions all have the same score
            weights[part, indices] = by_channel(values, axis)[:, first, 0].cpu().numpy()
    return reader.result(study, weights, time.perf_counter() - start)


def _activation_shapes(study: coar.Study, reader: CaptumReader) -> dict[tuple[str, str], tuple[int, ...]]:
    """Return the shape of each site's activations, one example's, by path and side."""
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}

    def keep(site: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def record(_module: nn.Module, args: Any, y: Tensor) -> None:
            shapes[site, "input"], shapes[site, "output"] = tuple(args[0].shape), tuple(y.shape)

        return record

    handles = [
        reader.model.get_submodule(site).register_forward_hook(keep(site)) for site, _, _ in study.components.sites()
    ]
    with torch.no_grad():
        reader(*reader.load(study.examples, slice(0, 1)))
    for handle in handles:
        handle.remove()
    reader.forwards = 0
    return shapes


def _groups(shape: tuple[int, ...], axis: int, chosen: list[Component]) -> Tensor:
    """Return captum's feature mask: a component's channels have its number, all others the number after the last."""
    groups = torch.full((shape[axis],), len(chosen))
    for number, component in enumerate(chosen):
        groups[component.position : component.position + component.size] = number
    return _along(shape, axis, groups)


def _constants(shape: tuple[int, ...], axis: int, chosen: list[Component], constants: Tensor) -> Tensor:
    """Return the replacement of each channel, 0 where there is no component."""
    values = constants.new_zeros(shape[axis])
    for component, constant in zip(chosen, constants, strict=True):
        values[component.position : component.position + component.size] = constant
    return _along(shape, axis, values)


def _along(shape: tuple[int, ...], axis: int, values: Tensor) -> Tensor:
    sizes = [1] * len(shape)
    sizes[axis] = -1
    return values.view(sizes)
