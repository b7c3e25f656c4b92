"""Numbers to compare with, from hooks and weights changed by hand: this module imports nothing of the package.

A row of a table of components is read as what it states: a site, a side of it, an axis, a first index and a size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

ROUNDINGS = 8  # of inputs that are moved, see `rounded`
UNCALLED = {"MultiheadAttention": "out_proj", "ShiftedWindowAttention": "proj"}  # projections that are only read
STACKED = ("down_proj", "w2", "wo", "fc2", "output_linear", "c_proj")


class Row(NamedTuple):
    """One component: where it is, and which indices along an axis it has."""

    site: str
    side: str
    axis: int
    position: int
    size: int


Keep = Callable[[int], Tensor]  # from the number of a row to its gate


def reading(result: Any, rows: int) -> Tensor:
    """Return one number per example: a fixed projection of the first tensors in a model's result."""
    parts = [part.flatten(1) for part in _tensors(result) if part.ndim >= 2 and len(part) == rows]
    if not parts:
        raise ValueError(f"no tensor with {rows} rows in a {type(result).__name__}")
    flat = parts[0] if parts[0].dtype == torch.float64 else parts[0].float()
    weights = torch.cos(torch.arange(flat.shape[1]) * 1.7 + 0.3).to(flat)
    return flat @ weights / flat.shape[1] ** 0.5


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def run(model: nn.Module, inputs: Any) -> Tensor:
    """Return one number per example of a plain pass."""
    rows = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
    return reading(model(**inputs) if isinstance(inputs, dict) else model(inputs), rows)


def twice(inputs: Any, n: int) -> Any:
    """Return a batch that holds one example twice.

    A batch of one will not do: torch's attention on a CPU has wrong derivatives there if its inputs are channels-last.
    """
    if isinstance(inputs, dict):
        return {name: value[[n, n]] for name, value in inputs.items()}
    return inputs[[n, n]]


def double(inputs: Any) -> Any:
    """Return inputs whose real numbers are float64."""
    if isinstance(inputs, dict):
        return {name: double(value) for name, value in inputs.items()}
    return inputs.double() if inputs.is_floating_point() else inputs


def rounded(inputs: Any, seed: int) -> Any:
    """Return inputs with every real number moved by a few roundings of float32, up or down.

    An activation this close to the kink of a ReLU has one gradient or the other, by the order of sums in a kernel.
    """
    if isinstance(inputs, dict):
        return {name: rounded(value, seed) for name, value in inputs.items()}
    if not inputs.is_floating_point():
        return inputs
    signs = torch.randint(2, inputs.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return inputs * (1 + signs.to(inputs) * ROUNDINGS * torch.finfo(torch.float32).eps)


class Oracle:
    """A model under masks, by hooks on its modules and by products with its parameters.

    Args:
        model: The model; it is left as it was after every call.
        rows: The components.
        constants: The constants that replace each component, (size,) or one number; None for zeros of the weights.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Row], constants: Sequence[Tensor] | None) -> None:
        self.model, self.rows = model, rows
        self.constants = constants
        self.in_weights = [i for i, row in enumerate(rows) if row.side in ("parameter", "expert")]
        self.in_hooks = [i for i, row in enumerate(rows) if row.side not in ("parameter", "expert")]

    def outputs(self, inputs: Any, keep: Tensor) -> Tensor:
        """Return (examples,) numbers under one (rows,) mask; gradients reach the mask."""
        with self._hooked(keep):
            if not self.in_weights:
                return run(self.model, inputs)
            rows = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
            weights = self._weights(keep)
            args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
            return reading(functional_call(self.model, weights, args, kwargs), rows)

    def _weights(self, keep: Tensor) -> dict[str, Tensor]:
        places: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
        for i in self.in_weights:
            row = self.rows[i]
            name, axis, start, size = row.site, row.axis, row.position, row.size
            if row.side == "expert":
                stacks = [key for key in STACKED if key in self.model.get_submodule(row.site)._parameters]
                name, axis, start, size = f"{row.site}.{stacks[0]}", 0, row.position // row.size, 1
            places.setdefault((name, axis), []).append((i, start, size))
        changed: dict[str, Tensor] = {}
        for (name, axis), parts in places.items():
            weight = changed.get(name, self.model.get_parameter(name))
            rows, at = [], []
            for i, start, size in parts:
                rows += [i] * size
                at += range(start, start + size)
            gate = keep.new_ones(weight.shape[axis]).index_put((torch.tensor(at),), keep[rows])
            changed[name] = weight * gate.to(weight.dtype).view([-1 if a == axis else 1 for a in range(weight.ndim)])
        return changed

    @contextmanager
    def _hooked(self, keep: Tensor) -> Iterator[None]:
        places: dict[tuple[str, str, int], list[int]] = {}
        for i in self.in_hooks:
            places.setdefault((self.rows[i].site, self.rows[i].side, self.rows[i].axis), []).append(i)
        with ExitStack() as stack:
            for (site, side, axis), rows in places.items():
                change = self._change(rows, axis, keep)
                stack.enter_context(tapped(self.model, site, side, change))
            yield

    def _change(self, rows: list[int], axis: int, keep: Tensor) -> Callable[[Tensor], Tensor]:
        def change(y: Tensor) -> Tensor:
            if self.rows[rows[0]].side == "module":  # zeros replace all of it
                return y * keep[rows[0]].to(y.dtype)
            at = torch.cat([torch.arange(self.rows[i].size) + self.rows[i].position for i in rows])
            sizes = torch.tensor([self.rows[i].size for i in rows])
            gates = keep.new_ones(y.shape[axis]).index_put((at,), keep[rows].repeat_interleave(sizes))
            constants = keep.new_zeros(y.shape[axis])
            if self.constants is not None:
                own = [self.constants[i].to(keep).reshape(-1).expand(self.rows[i].size) for i in rows]
                constants[at] = torch.cat(own)
            shape = [-1 if a == axis % y.ndim else 1 for a in range(y.ndim)]
            gates, constants = gates.to(y.dtype).view(shape), constants.to(y.dtype).view(shape)
            return y * gates + constants * (1 - gates)

        return change


@contextmanager
def tapped(model: nn.Module, site: str, side: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace what a module receives (`input`) or returns (`output`, `module`) by `change` of it, for a while."""
    parent, _, leaf = site.rpartition(".")
    block = model.get_submodule(parent)
    if any(UNCALLED.get(kind.__name__) == leaf for kind in type(block).__mro__):
        with _projected(block, leaf, side, change):
            yield
        return
    module = model.get_submodule(site)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: change(kwargs[first])}

    def after(_module: nn.Module, _args: Any, y: Any) -> Any:
        return (change(y[0]), *y[1:]) if isinstance(y, tuple) else change(y)

    if side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _projected(block: nn.Module, leaf: str, side: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a block that reads its projection without a call make the heads, and project them by hand."""
    bare = deepcopy(block)
    projection, own = bare.get_submodule(leaf), block.get_submodule(leaf)
    with torch.no_grad():
        projection.weight.copy_(torch.eye(len(projection.weight)))  # type: ignore[operator,arg-type,union-attr]
        if projection.bias is not None:
            projection.bias.zero_()  # type: ignore[operator,union-attr]

    def after(_module: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        made = bare(*args, **kwargs)
        heads = made[0] if isinstance(made, tuple) else made
        heads = change(heads) if side == "input" else heads
        projected = heads @ own.weight.T + (0 if own.bias is None else own.bias)  # type: ignore[union-attr,operator]
        projected = projected if side == "input" else change(projected)
        return (projected, *made[1:]) if isinstance(y, tuple) else projected

    handle = block.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def means(model: nn.Module, rows: Sequence[Row], inputs: Any) -> list[Tensor]:
    """Return the mean of every channel of every component, over examples and positions."""
    seen: dict[tuple[str, str, int], list[Tensor]] = {}
    with ExitStack() as stack, torch.no_grad():
        for row in rows:
            place = (row.site, row.side, row.axis)
            if place in seen:
                continue
            kept = seen[place] = []

            def keep(y: Tensor, kept: list[Tensor] = kept, axis: int = row.axis) -> Tensor:
                values = y.detach().clone()  # what follows may write into y
                kept.append(values.movedim(axis, -1).reshape(-1, y.shape[axis]))
                return y

            stack.enter_context(tapped(model, row.site, row.side, keep))
        run(model, inputs)
    never = torch.full((2**20,), torch.nan)  # the constants of a module that is not called
    found = {place: torch.cat(parts).double().mean(0).to(parts[0]) if parts else never for place, parts in seen.items()}
    return [found[row.site, row.side, row.axis][row.position : row.position + row.size] for row in rows]


def biases(model: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
    """Return what is left of every component when the weights that make it are zero: its bias, or 0."""
    found = []
    for row in rows:
        bias = getattr(model.get_submodule(row.site), "bias", None) if row.side == "output" else None
        left = torch.zeros(row.size) if bias is None else bias.detach()[row.position : row.position + row.size]
        found.append(left)
    return found
