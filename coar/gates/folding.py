"""Ablations made permanent in the weights, so that the edited model does not need this package."""

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from coar.components.layers import (
    TRANSPOSED_CONVOLUTIONS,
    expert_stack_of,
    input_axis,
    is_dense,
    is_layer,
    output_axis,
    output_channels,
)
from coar.components.membership import check_components
from coar.components.table import Component, Components
from coar.errors import EditError
from coar.gates.response import is_proportional, responds

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
    """Replace components by constants permanently, in place, completely or in part.

    A component's weights are zeroed: rows for an output, columns for an input, all for a module, the last projection
    for an expert. Its constants are then added to the layer's bias. Where there is no bias, the constants of an output
    go into the running mean of the batch norm that follows, which keeps the keys of the state dict; where there is no
    such batch norm either, and for inputs, the layer gets a new bias of zeros.

    Args:
        model: The model to change.
        components: The components to replace.
        values: Constants of each component, one or one per channel; with `ZeroWeight`, its biases.
        batch_norms: Path of the batch norm that follows a site without bias, see `following_batch_norms`.
        strengths: Strength s of each component, above 0 and at most 1, by default 1: it becomes (1 - s) * y + s * r,
            where y is what it computes and r are its constants.

    Raises:
        ComponentError: When a component is not part of the model.
        EditError: When a component has no constants, a module's output is not that of one layer inside, an expert's
            mixture has no biases to hold constants, or a weight is shared with another module or computed, so that
            zeroing it would have other effects.
    """
    pairs = list(zip(components, values, strict=True))
    chosen = list(zip(pairs, [1.0] * len(pairs) if strengths is None else strengths, strict=True))
    for component, value in pairs:
        check_permanent(component, value)
    if pairs:
        check_components(model, Components(component for component, _ in pairs))
    owners = _Owners(model)
    outputs: dict[tuple[str, str | None], list[tuple[Component, Constant, float]]] = {}
    with torch.no_grad():
        for (component, value), strength in chosen:
            if component.side == "parameter":
                parameter = model.get_parameter(component.site)
                if not is_dense(parameter):
                    raise _quantised("parameter", component.site, parameter)
                _shrink(parameter.narrow(component.axis, component.position, component.size), strength)
            elif component.side == "input":
                _fold_input(owners, component, value, strength)
            elif component.side == "expert":
                _fold_expert(owners, component, value, strength)
            elif component.side == "module":
                layer = _last_layer(model, component)
                outputs.setdefault((layer.site, None), []).append((layer, value, strength))
            else:
                key = component.site, batch_norms.get(component.site)
                outputs.setdefault(key, []).append((component, value, strength))
        for (site, batch_norm), replaced in outputs.items():
            _fold_outputs(owners, site, replaced, batch_norm)


def added_parameters(original: nn.Module, edited: nn.Module) -> tuple[str, ...]:
    """Return the names in the edited model's state dict that the original's does not have."""
    before = original.state_dict().keys()
    return tuple(name for name in edited.state_dict() if name not in before)


class _Owners:
    """Which modules hold each parameter of a model, gathered once.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._paths: dict[int, list[str]] = {}
        for path, module in model.named_modules():
            for parameter in {id(one) for one in module._parameters.values() if one is not None}:
                self._paths.setdefault(parameter, []).append(path)

    def own(self, site: str, name: str) -> nn.Parameter | None:
        """Return a layer's weight or bias, None where it has none.

        Raises:
            EditError: When it is not a parameter of the layer alone.
        """
        layer = self.model.get_submodule(site)
        if name not in layer._parameters and not isinstance(getattr(layer, name, None), Tensor):
            raise _quantised(name, site, layer)
        if name not in layer._parameters:
            raise EditError(
                f"the {name} of {site!r} is computed from other parameters; make it a parameter first, with "
                f"torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove, remove_weight_norm "
                f"or remove_spectral_norm"
            )
        parameter = layer._parameters[name]
        if parameter is not None and not is_dense(parameter):
            raise _quantised(name, site, parameter)
        owners = self._paths.get(id(parameter), [])
        if len(owners) > 1:
            raise EditError(
                f"the {name} of {site!r} is shared by {', '.join(owners)}; changing it changes them all: untie it first"
            )
        return parameter


def _quantised(name: str, site: str, holder: object) -> EditError:
    return EditError(
        f"the {name} of {site!r} is held by a {type(holder).__name__}, quantised, and edits change weights of ordinary "
        f"numbers; edit the model before it is quantised, and quantise the edited one"
    )


def check_permanent(component: Component, value: Constant) -> None:
    """Raise `EditError` for an edge, and for a component without constants or with neither one nor one per channel."""
    if component.side == "edge":
        raise EditError(
            f"{component.name!r} is an edge, or a writer of edges, and no weight belongs to one edge alone; make edits "
            f"with other components, such as attention_heads"
        )
    if np.size(value) not in (1, component.size):
        raise EditError(
            f"{component.name!r} has {component.size} channels, and {np.size(value)} constants were given; give one "
            f"for each, or one for all"
        )
    if np.isnan(value).any():
        raise EditError(
            f"{component.name!r} is replaced by another example's activations, or by other means at every position, "
            f"which no weights can hold; collect with an ablation by constants, such as coar.Mean, to make edits"
        )


def _last_layer(model: nn.Module, component: Component) -> Component:
    """Return the outputs of the layer whose output a whole module returns; raise `EditError` when it is unknown.

    It is known only for a layer itself and for a sequence that ends in one.
    """
    path, module = component.site, model.get_submodule(component.site)
    while type(module) is nn.Sequential:
        children = [name for name, child in module.named_children() if not isinstance(child, UNCHANGING)]
        if not children:
            break
        path, module = f"{path}.{children[-1]}", module.get_submodule(children[-1])
    if not is_layer(module):
        raise EditError(
            f"{component.name!r} is a whole module that ends in a {type(module).__name__}; an edit of a module is "
            f"possible only where it is a linear layer or a convolution, or a sequence that ends in one; for edits "
            f"choose the inputs of its last layer, such as coar.input_features or coar.attention_heads"
        )
    return component._replace(site=path, side="output", position=0, size=output_channels(module))


def _shrink(weight: Tensor, strength: float) -> None:
    """Multiply a weight by 1 - strength, in place; strength 1 leaves zeros, also of values that are not finite."""
    if strength == 1:
        weight.zero_()
    else:
        weight.mul_(1 - strength)


def _fold_outputs(
    owners: _Owners, site: str, replaced: list[tuple[Component, Constant, float]], batch_norm: str | None
) -> None:
    """Replace output channels of one layer by constants, all at once."""
    layer = owners.model.get_submodule(site)
    weight, bias = owners.own(site, "weight"), owners.own(site, "bias")
    sizes = [component.size for component, _, _ in replaced]
    rows = np.concatenate([component.position + np.arange(component.size) for component, _, _ in replaced])
    values = np.concatenate([np.broadcast_to(value, size) for (_, value, _), size in zip(replaced, sizes, strict=True)])
    strengths = np.repeat([strength for _, _, strength in replaced], sizes)
    _check_response(layer, site, "output", partial=bool((strengths != 1).any()))
    for strength in np.unique(strengths):
        _shrink_outputs(layer, weight, rows[strengths == strength], float(strength))  # type: ignore[arg-type]
    at = torch.from_numpy(rows).to(weight.device)  # type: ignore[union-attr]
    constants = _scaled(weight.new_tensor(values), strengths)  # type: ignore[union-attr]
    if bias is None and constants.any() and batch_norm is None:
        layer.bias = bias = nn.Parameter(constants.new_zeros(output_channels(layer)))
    if bias is not None:
        kept = torch.where(torch.from_numpy(strengths == 1).to(at.device), 0, _scaled(bias[at], 1 - strengths))
        bias[at] = kept + constants
    elif batch_norm is not None:
        mean: Tensor = owners.model.get_submodule(batch_norm).running_mean  # type: ignore[assignment]
        mean[at.to(mean.device)] -= constants.to(mean.device)


def _check_response(layer: nn.Module, site: str, side: Literal["output", "input"], *, partial: bool) -> None:
    """Raise `EditError` when a layer does not respond to its weight as the edit needs.

    Args:
        layer: The layer.
        site: Its path.
        side: The side of the layer that the edit replaces.
        partial: Whether the edit needs a part of the weight, and not only zeros.
    """
    if is_proportional(layer) or responds(layer, side, (0.5, 0.0) if partial else (0.0,)):
        return
    kind = type(layer).__name__
    if partial:
        raise EditError(
            f"{site!r}, a {kind}, computes its weight from the parameter, so a part of the parameter is not the same "
            f"part of its output; make the edit at full strength, or replace the layer by a plain one with the "
            f"computed weight"
        )
    raise EditError(
        f"{site!r}, a {kind}, does not return zeros where its weight is zero and its bias where it has one, so no edit "
        f"of its weight replaces its output by constants; replace it by a plain layer with the same output"
    )


def _scaled(values: Tensor, factors: np.ndarray) -> Tensor:
    """Return the product with a factor per number, rounded once to the type of the values."""
    exact = torch.promote_types(values.dtype, torch.float32)
    return (values.to(exact) * torch.from_numpy(factors).to(values.device, exact)).to(values.dtype)


def _shrink_outputs(layer: nn.Module, weight: Tensor, rows: np.ndarray, strength: float) -> None:
    """Take a share of the weight that makes these output channels away, in place."""
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS):
        inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        for row in rows.tolist():
            group, position = divmod(row, outputs)
            _shrink(weight[group * inputs : (group + 1) * inputs, position], strength)
        return
    by_output, at = weight.movedim(output_axis(layer), 0), torch.from_numpy(rows).to(weight.device)
    by_output[at] = 0.0 if strength == 1 else by_output[at] * (1 - strength)


def _fold_input(owners: _Owners, component: Component, value: Constant, strength: float) -> None:
    layer = owners.model.get_submodule(component.site)
    weight, bias = owners.own(component.site, "weight"), owners.own(component.site, "bias")
    _check_response(layer, component.site, "input", partial=strength != 1)
    axis = input_axis(layer)
    columns = weight.narrow(axis, component.position, component.size)  # type: ignore[union-attr]
    constants = strength * columns.new_tensor(value).expand(component.size)
    if constants.any():
        if bias is None:
            layer.bias = bias = nn.Parameter(columns.new_zeros(output_channels(layer)))
        bias.add_(constants @ columns if axis == 0 else columns @ constants)
    _shrink(columns, strength)


def _fold_expert(owners: _Owners, component: Component, value: Constant, strength: float) -> None:
    mixture, expert = owners.model.get_submodule(component.site), component.position // component.size
    stack = expert_stack_of(mixture)
    weight = owners.own(component.site, stack.name if stack else "weight")
    bias = owners.own(component.site, f"{stack.name}_bias") if stack and stack.bias is not None else None
    constants = strength * weight.new_tensor(value).expand(component.size)  # type: ignore[union-attr]
    if bias is None and constants.any():
        raise EditError(
            f"{component.name!r} is an expert of a mixture without biases, so no weights can hold the constants that "
            f"replace it where the router chooses it; to edit experts collect with coar.ZeroWeight"
        )
    _shrink(weight[expert], strength)  # type: ignore[index]
    if bias is not None:
        _shrink(bias[expert], strength)
        bias[expert] += constants
