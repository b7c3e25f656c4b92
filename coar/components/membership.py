"""The check that a table of components fits a model."""

from torch import nn

from coar.components.layers import expert_stack_of, input_channels, output_channels, unwrapped
from coar.components.table import Components, Side
from coar.errors import ComponentError


def check_components(model: nn.Module, components: Components) -> None:
    """Raise `ComponentError`, naming the first component that does not fit, unless all are parts of this model."""
    model = unwrapped(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for (site, side, axis), indices in components.sites().items():
        found = parameters.get(site) if side == "parameter" else modules.get(site)
        if found is None:
            raise ComponentError(
                f"component {components[indices[0]].name!r} lies in {site!r}, which this {type(model).__name__} does "
                f"not have; the components belong to another model: find them again on this one"
            )
        if side in ("module", "edge"):  # gates on edges find them in the model again
            continue
        length = _length(found, side, axis)
        last = int(components.positions_of(indices).max()) + 1
        if last > length:
            noun = "input features" if side == "input" else "rows"
            raise ComponentError(
                f"{site!r} has {length} {noun} in this model, but the component table reaches number {last - 1}; "
                f"the components belong to another model: find them again on this one"
            )


def _length(found: nn.Module | nn.Parameter, side: Side, axis: int) -> int:
    if isinstance(found, nn.Module) and side == "expert":
        stack = expert_stack_of(found)
        return len(stack.weight) * stack.features if stack else 0
    if isinstance(found, nn.Module):
        return input_channels(found) if side == "input" else output_channels(found)
    return found.shape[axis] if axis < found.ndim else 0
