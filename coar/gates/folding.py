"""Ablations made permanent in the weights, so that the edited model needs nothing of this package."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from coar.components.layers import TRANSPOSED_CONVOLUTIONS, input_axis, is_layer, output_axis, output_channels, stack_of
from coar.components.membership import check_components
from coar.components.table import Component, Components
from coar.errors import EditError

Constant = float | tuple[float, ...]  # of all channels of a component, or one for each

UNCHANGING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # in evaluation mode


def fold(
    model: nn.Module,
    components: Iterable[Component],
    values: Iterable[Constant],
    *,
    batch_norms: Mapping[str, str],
    strengths: Iterable[float] | None = None,
) -> None:
    """Replace components by constants for good, in place, wholly or in part.

    A component's weights are zeroed: rows for an output, columns for an input, all for a module, the last projection
    for an expert. Its constants then go into the layer's own bias; where there is none, an output's go into the running
    mean of the batch norm that follows, which keeps the state dict's keys; where there is neither, and for inputs, they
    go into a new bias of zeros.

    Args:
        model: The model to change.
        components: What to replace.
        values: Constants of each component; for zero weight, its biases.
        batch_norms: Path of the batch norm that follows a site without bias, see `following_batch_norms`.
        strengths: How far each goes towards its constants, above 0 and at most 1; by default 1.

    Raises:
        ComponentError: When a component is not part of the model.
        EditError: When a component has no constant, a module's output is not that of one layer inside, an expert's
            mixture has no biases to take constants, or a weight is shared with another module or computed, so that
            zeroing it would do something else.
    """
    pairs = list(zip(components, values, strict=True))
    chosen = list(zip(pairs, [1.0] * len(pairs) if strengths is None else strengths, strict=True))
    for component, value in pairs:
        check_permanent(component, value)
    if pairs:
        check_components(model, Components(component for component, _ in pairs))
    with torch.no_grad():
        for (component, value), strength in chosen:
            if component.side == "parameter":
                parameter = model.get_parameter(component.site)
                _fade(parameter.narrow(component.axis, component.position, component.size), strength)
            elif component.side == "input":
                _fold_input(model, component, value, strength)
            elif component.side == "expert":
                _fold_expert(model, component, value, strength)
            elif component.side == "module":
                _fold_output(model, _last_layer(model, component), value, None, strength)
            else:
                _fold_output(model, component, value, batch_norms.get(component.site), strength)


def check_permanent(component: Component, value: Constant) -> None:
    """Raise `EditError` for a component without constants, or with a number of them that is not its channels'."""
    if np.size(value) not in (1, component.size):
        raise EditError(
            f"{component.name!r} has {component.size} channels, and {np.size(value)} constants were given; give one "
            f"for each, or one for all"
        )
    if np.isnan(value).any():
        raise EditError(
            f"{component.name!r} is replaced by what another example has there, or by other means at every position, "
            f"which no weights can hold; collect with an ablation by constants, such as coar.Mean, to make edits"
        )


def _last_layer(model: nn.Module, component: Component) -> Component:
    """Return the outputs of the layer whose output is all that a whole module returns; raise `EditError` for others.

    Only a layer itself, and a sequence that ends in one, tell by their type what they return.
    """
    path, module = component.site, model.get_submodule(component.site)
    while type(module) is nn.Sequential:
        children = [name for name, child in module.named_children() if not isinstance(child, UNCHANGING)]
        if not children:
            break
        path, module = f"{path}.{children[-1]}", module.get_submodule(children[-1])
    if not is_layer(module):
        raise EditError(
            f"{component.name!r} is a whole module that ends in a {type(module).__name__}, and what it returns is "
            f"made permanent only where it is a linear layer or a convolution, or a sequence that ends in one; for "
            f"edits choose what its last layer reads, such as coar.input_features or coar.attention_heads"
        )
    return component._replace(site=path, side="output", position=0, size=output_channels(module))


def _fade(weight: Tensor, strength: float) -> None:
    """Take a share of a weight away, in place; all of it leaves zeros, whatever stood there."""
    if strength == 1:
        weight.zero_()
    else:
        weight.mul_(1 - strength)


def _fold_output(
    model: nn.Module, component: Component, value: Constant, batch_norm: str | None, strength: float
) -> None:
    layer, position = model.get_submodule(component.site), component.position
    weight, bias = _own(model, component.site, "weight"), _own(model, component.site, "bias")
    rows = range(position, position + component.size)
    for row in rows:
        _fade(weight[_filter_index(layer, row)], strength)  # type: ignore[index]
    constants = strength * layer.weight.new_tensor(value).expand(component.size)  # type: ignore[operator]
    if bias is None and constants.any() and batch_norm is None:
        layer.bias = bias = nn.Parameter(constants.new_zeros(output_channels(layer)))
    if bias is not None:
        _fade(bias[rows.start : rows.stop], strength)
        bias[rows.start : rows.stop] += constants
    elif batch_norm is not None:
        model.get_submodule(batch_norm).running_mean[rows.start : rows.stop] -= constants  # type: ignore[operator, index]


def _fold_input(model: nn.Module, component: Component, value: Constant, strength: float) -> None:
    layer = model.get_submodule(component.site)
    weight, bias = _own(model, component.site, "weight"), _own(model, component.site, "bias")
    axis = input_axis(layer)
    columns = weight.narrow(axis, component.position, component.size)  # type: ignore[union-attr]
    constants = strength * columns.new_tensor(value).expand(component.size)
    if constants.any():
        if bias is None:
            layer.bias = bias = nn.Parameter(columns.new_zeros(output_channels(layer)))
        bias.add_(constants @ columns if axis == 0 else columns @ constants)
    _fade(columns, strength)


def _fold_expert(model: nn.Module, component: Component, value: Constant, strength: float) -> None:
    mixture, expert = model.get_submodule(component.site), component.position // component.size
    stack = stack_of(mixture)
    weight = _own(model, component.site, stack.name if stack else "weight")
    bias = _own(model, component.site, f"{stack.name}_bias") if stack and stack.bias is not None else None
    constants = strength * weight.new_tensor(value).expand(component.size)  # type: ignore[union-attr]
    if bias is None and constants.any():
        raise EditError(
            f"{component.name!r} is an expert of a mixture without biases, so no weights can hold the constants that "
            f"replace it where the router chooses it; to edit experts collect with coar.ZeroWeight"
        )
    _fade(weight[expert], strength)  # type: ignore[index]
    if bias is not None:
        _fade(bias[expert], strength)
        bias[expert] += constants


def _own(model: nn.Module, site: str, name: str) -> nn.Parameter | None:
    """Return a layer's weight or bias, None where it has none; raise `EditError` when it is not the layer's alone."""
    layer = model.get_submodule(site)
    if name not in layer._parameters:
        raise EditError(
            f"the {name} of {site!r} is computed from other parameters; bake it in first, for example with "
            f"torch.nn.utils.parametrize.remove_parametrizations"
        )
    parameter = layer._parameters[name]
    owners = [n for n, module in model.named_modules() if any(p is parameter for p in module._parameters.values())]
    if parameter is not None and len(owners) > 1:
        raise EditError(
            f"the {name} of {site!r} is shared by {', '.join(owners)}; changing it changes them all: untie it first"
        )
    return parameter


def _filter_index(layer: nn.Module, position: int) -> tuple[slice | int, ...]:
    """Index the part of a layer's weight that makes output channel `position`."""
    if not isinstance(layer, TRANSPOSED_CONVOLUTIONS):
        return (slice(None),) * output_axis(layer) + (position,)
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    group = position // outputs
    return slice(group * inputs, (group + 1) * inputs), position % outputs
