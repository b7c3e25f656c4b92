"""Which parts of a model can be ablated: an immutable, ordered, named table, and the finders that fill it."""

import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

from torch import nn

from coar.errors import ComponentError

if TYPE_CHECKING:
    import pandas as pd

Side = Literal["output", "parameter"]
Patterns = str | Sequence[str] | None

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Component(NamedTuple):
    """One part of a model that is ablated as a whole.

    Attributes:
        name: Unique name, such as `layer1.0.conv1[17]`.
        kind: `conv filter`, `neuron` or `parameter slice`.
        site: Path of the module, or of the parameter for a parameter slice.
        side: What of the site is ablated: its `output`, or the `parameter` itself.
        axis: Axis of the module's output, or of the parameter, along which the component lies.
        position: First index of the component along that axis.
        size: How many indices it takes along that axis.
    """

    name: str
    kind: str
    site: str
    side: Side
    axis: int
    position: int
    size: int


def read_component(values: Sequence[object]) -> Component:
    """Return a component from a row of plain values; raise `ValueError` unless each has its type and makes sense."""
    types = (str, str, str, str, int, int, int)
    if len(values) != len(types) or any(type(v) is not kind for v, kind in zip(values, types, strict=True)):
        raise ValueError(f"{values!r} is no row of a component table")
    component = Component(*values)  # type: ignore[arg-type]
    if component.side not in ("output", "parameter") or component.position < 0 or component.size < 1:
        raise ValueError(f"{values!r} is no row of a component table")
    return component


class Components(Sequence[Component]):
    """The ordered table of all components; a row number is the component's index everywhere."""

    def __init__(self, rows: Iterable[Component]) -> None:
        self._rows = tuple(rows)
        self._index = {row.name: i for i, row in enumerate(self._rows)}
        if not self._rows:
            raise ComponentError("a component table needs at least one component, but none was given")
        if len(self._index) != len(self._rows):
            names = [row.name for row in self._rows]
            twice = next(name for name in names if names.count(name) > 1)
            raise ComponentError(f"component {twice!r} is in the table twice; leave one of the two out")

    @overload
    def __getitem__(self, index: int) -> Component: ...
    @overload
    def __getitem__(self, index: slice) -> "Components": ...
    def __getitem__(self, index: int | slice) -> "Component | Components":
        return Components(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Component]:
        return iter(self._rows)

    def __add__(self, other: "Components") -> "Components":
        return Components(self._rows + other._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Components) and self._rows == other._rows

    def __hash__(self) -> int:
        return hash(self._rows)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{sum(row.kind == kind for row in self)} {kind}s" for kind in dict.fromkeys(self.kinds))
        return f"Components({kinds}, from {self[0].name} to {self[-1].name})"

    @property
    def names(self) -> tuple[str, ...]:
        """Names in table order."""
        return tuple(row.name for row in self._rows)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds in table order."""
        return tuple(row.kind for row in self._rows)

    def index(self, name: str, *_: int) -> int:
        """Return the row number of a component by its name; raise `ComponentError` for an unknown name."""
        if name not in self._index:
            near = ", ".join(list(self._index)[:3])
            raise ComponentError(f"no component is called {name!r}; this table has {len(self)}, such as {near}")
        return self._index[name]

    def sites(self) -> dict[tuple[str, Side, int], list[int]]:
        """Group row numbers by (site, side, axis), in table order."""
        groups: dict[tuple[str, Side, int], list[int]] = {}
        for i, row in enumerate(self._rows):
            groups.setdefault((row.site, row.side, row.axis), []).append(i)
        return groups

    def fingerprint(self) -> str:
        """Return the SHA-256 of the whole table, in hexadecimal."""
        return hashlib.sha256(json.dumps(self._rows).encode()).hexdigest()

    def to_pandas(self) -> "pd.DataFrame":
        """Return the table as a frame, one row per component, its index the component's index."""
        import pandas as pd

        return pd.DataFrame(self._rows, columns=list(Component._fields)).rename_axis("component")


def conv_filters(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> Components:
    """Find the output filters of every convolution: 1-d, 2-d, 3-d, transposed, grouped and depthwise.

    Args:
        model: The model to look through.
        include: Shell-style patterns of module names (`layer1.*`, `*conv*`); only modules that match one are taken.
        exclude: Patterns of module names to leave out; applied after `include`.

    Raises:
        ComponentError: When a pattern matches no convolution, or no convolution is left.
    """

    def filters(name: str, module: nn.Module) -> Iterator[Component]:
        for i in range(output_channels(module)):
            yield Component(f"{name}[{i}]", "conv filter", name, "output", 1, i, 1)

    return _find(model, CONVOLUTIONS, filters, "convolution", include, exclude)


def neurons(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> Components:
    """Find the neurons of every `nn.Linear`: one component per output row.

    The last layer of a classifier is among them unless `exclude` names it.

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

    return _find(model, (nn.Linear,), rows, "linear layer", include, exclude)


def parameter_slices(model: nn.Module, patterns: str | Sequence[str], *, axis: int = 0, size: int = 1) -> Components:
    """Cut parameters into slices along one axis, each slice a component that can only be zeroed.

    Args:
        model: The model to look through.
        patterns: Shell-style patterns of parameter names, such as `*.conv?.weight`.
        axis: Axis to cut along; 0 is the output side of most layers.
        size: Width of a slice, in indices along the axis; must divide the parameter's length there.

    Raises:
        ComponentError: When a pattern matches no parameter, or the axis or size does not fit one that it matches.
    """
    parameters = dict(model.named_parameters())
    rows = []
    for name in _matching(list(parameters), patterns, None, "parameter"):
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


def check_components(model: nn.Module, components: Components) -> None:
    """Raise `ComponentError`, naming the first culprit, unless every component is a part of this model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for (site, side, _), indices in components.sites().items():
        found = parameters.get(site) if side == "parameter" else modules.get(site)
        if found is None:
            raise ComponentError(
                f"component {components[indices[0]].name!r} lies in {site!r}, which this {type(model).__name__} does "
                f"not have; the components belong to another model: find them again on this one"
            )
        axis = components[indices[0]].axis
        length = output_channels(found) if isinstance(found, nn.Module) else _length(found, axis)
        last = max(components[i].position + components[i].size for i in indices)
        if last > length:
            raise ComponentError(
                f"{site!r} has {length} rows in this model, but the component table reaches row {last - 1}; "
                f"the components belong to another model: find them again on this one"
            )


def _length(parameter: nn.Parameter, axis: int) -> int:
    return parameter.shape[axis] if axis < parameter.ndim else 0


def output_channels(module: nn.Module) -> int:
    """Return how many output rows a convolution or linear layer has, 0 for any other module."""
    return int(getattr(module, "out_channels", 0) or getattr(module, "out_features", 0))


def _find(
    model: nn.Module,
    types: tuple[type[nn.Module], ...],
    rows: Callable[[str, nn.Module], Iterator[Component]],
    noun: str,
    include: Patterns,
    exclude: Patterns,
) -> Components:
    modules = {name: module for name, module in model.named_modules() if isinstance(module, types)}
    if not modules:
        raise ComponentError(f"{type(model).__name__} has no {noun}; choose a finder for another kind of component")
    for name, module in modules.items():
        if isinstance(getattr(module, "weight", None), nn.UninitializedParameter):
            raise ComponentError(f"{name!r} is lazy and has no shape yet; run the model once on real inputs first")
    kept = _matching(list(modules), include, exclude, noun)
    return Components(row for name in kept for row in rows(name, modules[name]))


def _matching(names: list[str], include: Patterns, exclude: Patterns, noun: str) -> list[str]:
    """Keep the names that match; a pattern without effect is a mistake, so it raises."""

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

    wanted = set(names) if include is None else match(include)
    left = [name for name in names if name in wanted - match(exclude)]
    if not left:
        raise ComponentError(
            f"include={include!r} and exclude={exclude!r} together leave no {noun}; loosen one of them"
        )
    return left
