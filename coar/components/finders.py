"""Finders of components: filters, neurons, input features, whole modules and slices of parameters."""

import fnmatch
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from coar.components.layers import CONVOLUTIONS, input_channels, is_layer, is_linear, output_channels, unwrapped
from coar.components.table import Component, Components
from coar.errors import ComponentError

Patterns = str | Sequence[str] | None


def conv_filters(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> Components:
    """Find the output filters of every convolution: 1-d, 2-d, 3-d, transposed, grouped and depthwise.

    Args:
        model: The model to look through.
        include: Shell-style patterns of module names (`layer1.*`, `*conv*`); only modules that match one are searched.
        exclude: Patterns of module names to leave out; applied after `include`.

    Raises:
        ComponentError: When a pattern matches no convolution, or no convolution is left.
    """

    def filters(name: str, module: nn.Module) -> Iterator[Component]:
        for i in range(output_channels(module)):
            yield Component(f"{name}[{i}]", "conv filter", name, "output", 1, i, 1)

    return _find(model, lambda module: isinstance(module, CONVOLUTIONS), filters, "convolution", include, exclude)


def neurons(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> Components:
    """Find the neurons of every linear layer: one component per output row.

    The `Conv1D` of transformers counts as a linear layer; its weight is (inputs, outputs), so its outputs are columns.
    The last layer of a classifier is included unless `exclude` names it.

    Args:
        model: The model to look through.
        include: Shell-style patterns of module names; only modules that match one are taken.
        exclude: Patterns of module names to leave out; applied after `include`.

    Raises:
        ComponentError: When a pattern matches no linear layer, or no linear layer is left.
    """

    def rows(name: str, module: nn.Module) -> Iterator[Component]:
        for i in range(output_channels(module)):
            yield Component(f"{name}[{i}]", "neuron", name, "output", -1, i, 1)

    return _find(model, is_linear, rows, "linear layer", include, exclude)


def input_features(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> Components:
    """Find the input features of every linear layer: one component per column of an `nn.Linear`'s weight.

    The `Conv1D` of transformers counts as a linear layer; its weight is (inputs, outputs), so its inputs are rows. A
    feature is ablated where the layer reads it: the input features of a feed-forward block's second layer are the
    block's neurons after the activation.

    Args:
        model: The model to look through.
        include: Shell-style patterns of module names; only modules that match one are taken.
        exclude: Patterns of module names to leave out; applied after `include`.

    Raises:
        ComponentError: When a pattern matches no linear layer, or no linear layer is left.
    """

    def columns(name: str, module: nn.Module) -> Iterator[Component]:
        for i in range(input_channels(module)):
            yield Component(f"{inside(name, 'input')}[{i}]", "input feature", name, "input", -1, i, 1)

    return _find(model, is_linear, columns, "linear layer", include, exclude)


def modules(
    model: nn.Module, patterns: str | Sequence[str], *, axis: int | None = None, size: int | None = None
) -> Components:
    """Find whole modules, such as attention blocks or branches of a residual net: one component per module.

    Ablation replaces the tensor that the module returns, or the first of a tuple or dataclass. Zeros and other
    examples' activations replace a tensor of any shape. Constants, one per feature, need the axis of the features.

    Args:
        model: The model to look through.
        patterns: Shell-style patterns of module names, such as `*.mlp`.
        axis: Axis of the returned tensor along which the features lie; by default 1 where the last layer inside is a
            convolution and the last axis where it is linear. A tensor that does not fit is an `AblationError`.
        size: Number of features; by default the number of outputs of the last layer inside.

    Raises:
        ComponentError: When a pattern matches no module, or `axis` is that of the batch.
    """
    model = unwrapped(model)
    if axis == 0 or (size is not None and size < 1):
        raise ComponentError(
            f"axis={axis} and size={size} were given; axis 0 is the batch, and a module has at least one feature: give "
            f"the axis along which features lie, such as -1, and their number"
        )
    names = matching([name for name, _ in model.named_modules() if name], patterns, None, "module")
    return Components(
        Component(name, "module", name, "module", *_features(model.get_submodule(name), axis, size)) for name in names
    )


def _features(module: nn.Module, axis: int | None, size: int | None) -> tuple[int, int, int]:
    """Return axis, first index and number of a module's features; axis 0 and one feature when they are unknown."""
    layers = [layer for layer in module.modules() if is_layer(layer)]
    if layers:
        axis = axis or (1 if isinstance(layers[-1], CONVOLUTIONS) else -1)
        size = size or output_channels(layers[-1])
    return (axis, 0, size) if axis and size else (0, 0, 1)


def parameter_slices(model: nn.Module, patterns: str | Sequence[str], *, axis: int = 0, size: int = 1) -> Components:
    """Cut parameters into slices along one axis: one component per slice, which can only be zeroed.

    Args:
        model: The model to look through.
        patterns: Shell-style patterns of parameter names, such as `*.conv?.weight`.
        axis: Axis to cut along; 0 is the output side of most layers.
        size: Width of a slice, in indices along the axis; it must divide the parameter's length there.

    Raises:
        ComponentError: When a pattern matches no parameter, or the axis or size does not fit one that it matches.
    """
    parameters = dict(unwrapped(model).named_parameters())
    rows = []
    for name in matching(list(parameters), patterns, None, "parameter"):
        shape = tuple(parameters[name].shape)
        if not 0 <= axis < len(shape):
            raise ComponentError(f"parameter {name!r} has shape {shape}: there is no axis {axis}; choose another axis")
        if size < 1 or shape[axis] % size:
            raise ComponentError(
                f"slices of size {size} do not divide axis {axis} of {name!r}, whose length is {shape[axis]}; "
                f"choose a size that does"
            )
        before = ":," * axis
        for start in range(0, shape[axis], size):
            label = str(start) if size == 1 else f"{start}:{start + size}"
            rows.append(Component(f"{name}[{before}{label}]", "parameter slice", name, "parameter", axis, start, size))
    return Components(rows)


def _find(
    model: nn.Module,
    chosen: Callable[[nn.Module], bool],
    rows: Callable[[str, nn.Module], Iterator[Component]],
    noun: str,
    include: Patterns,
    exclude: Patterns,
) -> Components:
    model = unwrapped(model)
    found = {name: module for name, module in model.named_modules() if chosen(module)}
    if not found:
        raise ComponentError(f"{type(model).__name__} has no {noun}; choose a finder for another kind of component")
    for name, module in found.items():
        if isinstance(getattr(module, "weight", None), nn.UninitializedParameter):
            raise ComponentError(f"{name!r} is lazy and has no shape yet; run the model once on real inputs first")
    kept = matching(list(found), include, exclude, noun)
    return Components(row for name in kept for row in rows(name, found[name]))


def matching(names: list[str], include: Patterns, exclude: Patterns, noun: str) -> list[str]:
    """Return the names that match, in their order.

    Args:
        names: Paths of modules or parameters.
        include: Shell-style patterns; only names that match one are returned; None stands for all.
        exclude: Patterns of names to leave out; applied after `include`.
        noun: The kind of thing that has these names, for messages.

    Raises:
        ComponentError: When a pattern matches no name, or no name is left.
    """

    def match(patterns: Patterns) -> set[str]:
        matched: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
            hits = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
            if not hits:
                some = ", ".join(repr(name) for name in names[:5])
                raise ComponentError(
                    f"pattern {pattern!r} matches no {noun} of this model; it has {len(names)}, such as {some}: "
                    f"correct the pattern ('*' stands for any characters)"
                )
            matched |= hits
        return matched

    included = set(names) if include is None else match(include)
    left = [name for name in names if name in included - match(exclude)]
    if not left:
        raise ComponentError(
            f"include={include!r} and exclude={exclude!r} together leave no {noun}; loosen one of them"
        )
    return left


def inside(path: str, name: str) -> str:
    """Return the path of the child `name` of a module; the model's own path is empty."""
    return f"{path}.{name}" if path else name
