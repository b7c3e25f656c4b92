"""Where the tensors of each module of a model hold the examples of a batch.

In most models they lie along the first axis, the entries of an example side by side. torch's encoders and recurrent
layers put positions first by default, and a batch that is flattened after its positions holds the first position of all
examples, then the second. Two passes show this: the part of the first example in a batch of two is what it is alone.
Some models fail on one example, such as those that squeeze their result; batches of four and of two show it there.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from coar.components.layers import in_vmap
from coar.errors import ExamplesError
from coar.examples import Examples, call_model, rows_of
from coar.gates.projections import PROJECTIONS

End = Literal["input", "output"]
SIZES = ((2, 1), (4, 2))  # examples in the two passes; the second pair where the model fails in the first
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
    """Find the layouts of a model from its first examples, unless they are known.

    Raises:
        ExamplesError: When the model fails on every number of examples that is tried.
    """
    if model in _known:
        return
    inputs, few = examples.block(0, max(map(max, SIZES)))[0], min(len(examples), max(map(max, SIZES)))
    failures: list[Exception] = []
    for sizes in SIZES:
        try:
            with torch.inference_mode():
                find_layouts(model, lambda rows: call_model(model, rows_of(inputs, torch.arange(rows) % few)), sizes)
        except Exception as error:  # whatever a model may raise, such as a batch norm of one example
            failures.append(error)
        else:
            return
    raise ExamplesError(
        f"{type(model).__name__} fails on {' and on '.join(str(min(sizes)) for sizes in SIZES)} examples, or on twice "
        f"as many ({failures[-1]}), so it is not known along which axis its modules hold examples; let it take any "
        f"number of examples, and keep no state of earlier passes"
    ) from failures[-1]


def find_layouts(model: nn.Module, run: Callable[[int], object], sizes: tuple[int, int] = SIZES[0]) -> None:
    """Find the layouts of all modules of a model, for `layouts_of`.

    Args:
        model: The model.
        run: Runs the model on the first examples, as many as it is given.
        sizes: Numbers of examples in two passes, the larger one first.
    """
    shapes = [_seen(model, partial(run, rows), lambda y: y.shape) for rows in sizes]
    unclear = {key for key, more in shapes[0].items() if not _is_usual(more, shapes[1].get(key), sizes)}
    found: Layouts = {}
    if unclear:
        both = [_seen(model, partial(run, rows), lambda y: y.detach().clone(), unclear) for rows in sizes]
        for key, more in both[0].items():
            less = both[1].get(key, [])
            kinds = (
                {_layout(*pair, sizes) for pair in zip(more, less, strict=True)} if len(more) == len(less) else set()
            )
            if len(kinds) == 1 and (layout := kinds.pop()) not in (None, USUAL):
                found[key] = layout
    for path, module in model.named_modules():
        for kind in type(module).__mro__:
            if (name := PROJECTIONS.get(kind.__name__)) and (path, "output") in found:
                ends: tuple[End, End] = ("input", "output")
                for end in ends:  # it is not called, and gets what the block returns
                    found.setdefault((f"{path}.{name}", end), found[path, "output"])
    _known[model] = found


def _seen(
    model: nn.Module, run: Callable[[], object], keep: Callable[[Tensor], Any], chosen: set[Any] | None = None
) -> dict[tuple[str, End], list[Any]]:
    """Return something of the tensors that modules are given and return first, call by call."""
    seen: dict[tuple[str, End], list[Any]] = {}

    def note(path: str, end: End, value: Any) -> None:
        first = value[0] if isinstance(value, tuple) and value else value
        if isinstance(first, Tensor) and not in_vmap(first) and (chosen is None or (path, end) in chosen):
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


def _is_usual(more: list[torch.Size], less: list[torch.Size] | None, sizes: tuple[int, int]) -> bool:
    """Return whether shapes in two passes show that each example has one entry on the first axis."""
    return (
        less is not None
        and len(less) == len(more)
        and all(
            len(a) > 0 and len(a) == len(b) and (a[0], b[0]) == sizes and a[1:] == b[1:]
            for a, b in zip(more, less, strict=True)
        )
    )


def _layout(more: Tensor, less: Tensor, sizes: tuple[int, int]) -> Layout | None:
    """Return the first layout in which a tensor begins with that of fewer examples, or None."""
    many, few = sizes
    rounded = more.is_floating_point() or more.is_complex()
    magnitudes = more.abs().nan_to_num(posinf=0.0) if rounded and more.numel() else torch.zeros(1)
    allowed = ALLOWED * float(magnitudes.max())
    for axis in range(more.ndim if more.ndim == less.ndim else 0):
        entries = less.shape[axis] // few
        if (more.shape[axis], less.shape[axis]) != (many * entries, few * entries):
            continue
        if more.numel() * few != less.numel() * many:
            continue
        for layout in (Layout(axis), Layout(axis, interleaved=True)):
            first = layout.arranged(more, entries)[: few * entries]
            if torch.allclose(first, layout.arranged(less, entries), rtol=0.0, atol=allowed, equal_nan=rounded):
                return layout
    return None
