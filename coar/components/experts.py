"""The finder of experts in mixtures of experts."""

from torch import nn

from coar.components.finders import Patterns, inside, matching
from coar.components.layers import LAST, input_channels, is_linear, stack_of, unwrapped
from coar.components.table import Component, Components
from coar.errors import ComponentError


def experts(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> Components:
    """Find the experts of every mixture: one component per expert.

    An ablated expert adds nothing to what its mixture returns, but for a bias of its last projection; the router
    chooses and weighs as before, so other experts do not take its share.

    Mixtures are found by role: a module that is called `experts`, or has `Experts` at the end of its type's name. It
    either keeps all experts' last projections in one parameter, experts first, as the models of transformers do, and an
    expert is all that it returns, before it is weighed; or it is a list of modules, one per expert, and an expert is
    all that its last linear layer reads. Where such a parameter is there and the mixture is not told where tokens are
    sent, an expert is a slice of the parameter, and can only be zeroed.

    Args:
        model: The model to look through.
        include: Shell-style patterns of the mixtures' names; only those that match one are taken.
        exclude: Patterns of names to leave out; applied after `include`.

    Raises:
        ComponentError: When the model has no mixture, a pattern matches none, or an expert's last projection cannot be
            told.
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
    called = name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts")
    return called and next(module.parameters(), None) is not None


def _rows(name: str, mixture: nn.Module) -> list[Component]:
    if stack := stack_of(mixture):
        size = stack.features
        return [
            Component(f"{inside(name, 'expert')}[{i}]", "expert", name, "expert", -1, i * size, size)
            for i in range(len(stack.weight))
        ]
    stacked = [key for key in LAST if (p := mixture._parameters.get(key)) is not None and p.ndim == 3]
    if len(stacked) == 1:
        site, count = inside(name, stacked[0]), mixture.get_parameter(stacked[0]).shape[0]
        return [Component(f"{inside(name, 'expert')}[{i}]", "expert", site, "parameter", 0, i, 1) for i in range(count)]
    children = dict(mixture.named_children())
    if stacked or not children or mixture._parameters:
        raise _not_understood(name, mixture)
    rows = []
    for i, (key, expert) in enumerate(children.items()):
        layers = [last for last in LAST if is_linear(getattr(expert, last, expert))]
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
        f"the experts of {name!r} cannot be told: it is a {type(module).__name__} with parameters {parameters} and "
        f"modules {children}; expected is one last projection, called {', '.join(LAST)}, which is a parameter of three "
        f"axes for all experts or a linear layer in each: exclude it, or use parameter_slices"
    )
