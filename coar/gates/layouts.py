"""Where the tensors of each module of a model hold the examples of a batch.

In most models they lie along the first axis, the entries of an example side by side. torch's encoders and recurrent
layers put positions first by default, and a batch that is flattened after its positions holds the first position of all
examples, then the second. Two passes show this: the part of the first example in a batch of two is what it is alone.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from coar.equivalence import fall_back
from coar.examples import Examples, call_model, rows_of
from coar.gates.projections import PROJECTIONS

End = Literal["input", "output"]
ALLOWED = 1e-3  # difference of an example's activations in two batches, relative to the largest


@dataclass(frozen=True)
class Layout:
    """Where a tensor holds the examples of a batch.

    Attributes:
        axis: The axis.
        interleaved: Whether the first entries of all examples come first there, then the second ones, and so on.
    """

    axis: int = 0
    interleaved: bool = False

    def arranged(self, y: Tensor, entries: int) -> Tensor:
        """Return a tensor with the examples along the first axis, the entries of each side by side.

        Args:
            y: A tensor of this layout.
            entries: Number of entries of an example along the axis.
        """
        if self.interleaved:
            y = _swapped(y, self.axis, (entries, -1))
        return y.movedim(self.axis, 0)

    def restored(self, y: Tensor, entries: int) -> Tensor:
        """Return the tensor of which `arranged` gives `y`."""
        y = y.movedim(0, self.axis)
        if self.interleaved:
            y = _swapped(y, self.axis, (-1, entries))
        return y


def _swapped(y: Tensor, axis: int, sizes: tuple[int, int]) -> Tensor:
    """Cut an axis into two and put the second of these first."""
    swapped: Tensor = torch.unflatten(y, axis, sizes).transpose(axis, axis + 1).flatten(axis, axis + 1)
    return swapped


USUAL = Layout()
Layouts = dict[tuple[str, End], Layout]  # by path of the module and its end, where it is not the usual one
_known: WeakKeyDictionary[nn.Module, Layouts] = WeakKeyDictionary()


def layouts_of(model: nn.Module) -> Layouts:
    """Return the unusual layouts of a model that `find_layouts` has seen; empty for others."""
    return _known.get(model, {})


def know_layouts(model: nn.Module, examples: Examples) -> None:
    """Find the layouts of a model from its first two examples, unless they are known or it does not run on one."""
    if model in _known or len(examples) < 2:
        return
    inputs = examples.block(0, 2)[0]
    with torch.inference_mode():
        try:
            find_layouts(model, lambda rows: call_model(model, rows_of(inputs, slice(rows))))
        except Exception as error:  # whatever a model may raise, such as a batch norm of one example
            fall_back("a layout with examples on another axis than the first", f"the model fails on one: {error}")


def find_layouts(model: nn.Module, run: Callable[[int], object]) -> None:
    """Find the layouts of all modules of a model, for `layouts_of`.

    Args:
        model: The model.
        run: Runs the model on the first one or two examples.
    """
    shapes = [_seen(model, partial(run, rows), lambda y: y.shape) for rows in (2, 1)]
    unclear = {key for key, two in shapes[0].items() if not _is_usual(two, shapes[1].get(key))}
    _known[model] = found = {}
    if not unclear:
        return
    both = [_seen(model, partial(run, rows), lambda y: y.detach().clone(), unclear) for rows in (2, 1)]
    for key, two in both[0].items():
        one = both[1].get(key, [])
        kinds = {_layout(*pair) for pair in zip(two, one, strict=True)} if len(two) == len(one) else set()
        if len(kinds) == 1 and (layout := kinds.pop()) not in (None, USUAL):
            found[key] = layout
    for path, module in model.named_modules():
        for kind in type(module).__mro__:
            if (name := PROJECTIONS.get(kind.__name__)) and (path, "output") in found:
                ends: tuple[End, End] = ("input", "output")
                for end in ends:  # it is not called, and gets what the block returns
                    found.setdefault((f"{path}.{name}", end), found[path, "output"])


def _seen(
    model: nn.Module, run: Callable[[], object], keep: Callable[[Tensor], Any], chosen: set[Any] | None = None
) -> dict[tuple[str, End], list[Any]]:
    """Return something of the tensors that modules are given and return first, call by call."""
    seen: dict[tuple[str, End], list[Any]] = {}

    def note(path: str, end: End, value: Any) -> None:
        first = value[0] if isinstance(value, tuple) and value else value
        if isinstance(first, Tensor) and (chosen is None or (path, end) in chosen):
            seen.setdefault((path, end), []).append(keep(first))

    def before(path: str, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        note(path, "input", args or tuple(kwargs.values()))

    def after(path: str, _module: nn.Module, _args: Any, returned: Any) -> None:
        note(path, "output", returned)

    with ExitStack() as stack:
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(before, path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(after, path)).remove)
        run()
    return seen


def _is_usual(two: list[torch.Size], one: list[torch.Size] | None) -> bool:
    """Return whether shapes for two examples and one show that each example has one entry on the first axis."""
    return (
        one is not None
        and len(one) == len(two)
        and all(
            len(a) > 0 and len(a) == len(b) and a[0] == 2 and b[0] == 1 and a[1:] == b[1:]
            for a, b in zip(two, one, strict=True)
        )
    )


def _layout(two: Tensor, one: Tensor) -> Layout | None:
    """Return the first layout in which a tensor of two examples begins with that of the first, or None."""
    allowed = ALLOWED * float(two.abs().max()) if two.numel() and two.is_floating_point() else 0.0
    for axis in range(two.ndim if two.ndim == one.ndim else 0):
        entries = one.shape[axis]
        if two.shape[axis] != 2 * entries or two.numel() != 2 * one.numel():
            continue
        for layout in (Layout(axis), Layout(axis, interleaved=True)):
            first = layout.arranged(two, entries)[:entries]
            if bool(((first - layout.arranged(one, entries)).abs() <= allowed).all()):
                return layout
    return None
