"""The finder of experts in mixtures of experts, one component per expert."""

from torch import nn

from coar.components.finders import Patterns, inside, matching
from coar.components.layers import LAST_PROJECTIONS, expert_stack_of, input_channels, is_linear, unwrapped
from coar.components.table import Component, Components
from coar.errors import ComponentError


def experts(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> Components:
    """Find the experts of every mixture: one component per expert.

    With zero ablation, an expert adds nothing to the output of its mixture except a bias of its last projection; the
    router chooses and weights experts as before, so other experts do not take its place.

    Mixtures are found by role: a module with the name `experts`, or with `Experts` at the end of its type's name. In
    one layout the mixture keeps the last projections of all experts in one parameter, experts first, as in
    transformers; then the component is all that an expert returns before it is weighted. In the other layout the
    mixture is a list of modules, one per expert; then the component is the whole input of an expert's last linear
    layer. Where a mixture has such a parameter but is not called with the routes of the tokens, the component is a
    slice of the parameter, which can only be zeroed.

    Args:
        model: The model to look through.
        include: Shell-style patterns of the mixtures' names; only those that match one are taken.
        exclude: Patterns of names to leave out; applied after `include`.

    Raises:
        ComponentError: When the model has no mixture, a pattern matches none, or an expert's last projection cannot be
            determined.
    """
    model = unwrapped(model)
    found = {name: module for name, module in model.named_modules() if _is_mixture(name, module)}
    if not found:
        raise ComponentError(
            f"{type(model).__name__} has no mixture of experts; choose a finder for another kind of component"
        )
    kept = matching(list(found), include, exclude, "mixture of experts")
    return Components(row for name in kept for row in _rows(name, found[name]))


def _is_mixture(name: str, module: nn.Module) -> bool:
    named = name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts")
    return named and next(module.parameters(), None) is not None


def _rows(name: str, mixture: nn.Module) -> list[Component]:
    if stack := expert_stack_of(mixture):
        size = stack.features
        return [
            Component(f"{inside(name, 'expert')}[{i}]", "expert", name, "expert", -1, i * size, size)
            for i in range(len(stack.weight))
        ]
    stacked = [key for key in LAST_PROJECTIONS if (p := mixture._parameters.get(key)) is not None and p.ndim == 3]
    if len(stacked) == 1:
        site, count = inside(name, stacked[0]), mixture.get_parameter(stacked[0]).shape[0]
        return [Component(f"{inside(name, 'expert')}[{i}]", "expert", site, "parameter", 0, i, 1) for i in range(count)]
    children = dict(mixture.named_children())
    if stacked or not children or mixture._parameters:
        raise _not_understood(name, mixture)
    rows = []
    for i, (key, expert) in enumerate(children.items()):
        layers = [last for last in LAST_PROJECTIONS if is_linear(getattr(expert, last, expert))]
        if len(layers) != 1:
            raise _not_understood(inside(name, key), expert)
        site = inside(inside(name, key), layers[0])
        width = input_channels(expert.get_submodule(layers[0]))
        rows.append(Component(f"{inside(name, 'expert')}[{i}]", "expert", site, "input", -1, 0, width))
    return rows


def _not_understood(name: str, module: nn.Module) -> ComponentError:
    parameters = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
    children = {key: type(child).__name__ for key, child in module.named_children()}
    return ComponentError(
        f"cannot determine the experts of {name!r}: it is a {type(module).__name__} with parameters {parameters} and "
        f"modules {children}; one last projection was expected, named {', '.join(LAST_PROJECTIONS)}, "
        f"which is a parameter of three axes for all experts or a linear layer in each: exclude it, or use "
        f"parameter_slices"
    )
