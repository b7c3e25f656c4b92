"""What every module of a model is given and returns in a pass, and the module where two passes part."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees
from torch.utils._python_dispatch import TorchDispatchMode

from coar.components.layers import in_vmap

Same = Callable[[Tensor, Tensor], bool]


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        path: Path of the module.
        given: The tensors among its arguments.
        returned: The tensors in what it returned.
    """

    path: str
    given: list[Tensor]
    returned: list[Tensor]


class _Coarsest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the coarsest rounding of the numbers that operations return."""

    rounding = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = function(*args, **(kwargs or {}))
        for leaf in trees.tree_leaves(returned):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and torch.finfo(leaf.dtype).bits >= 16:
                self.rounding = max(self.rounding, torch.finfo(leaf.dtype).eps)
        return returned


def rounding_of(run: Callable[[], object]) -> float:
    """Return the relative rounding error of the coarsest numbers in a pass, which autocast may have made."""
    seen = _Coarsest()  # type: ignore[no-untyped-call]
    with seen:
        run()
    return float(seen.rounding)


def calls_in(model: nn.Module, run: Callable[[], object]) -> list[Call]:
    """Run a pass and return all calls of modules, in the order in which they end."""
    calls: list[Call] = []
    given: dict[str, list[list[Tensor]]] = {}

    def before(path: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        given.setdefault(path, []).append(_tensors((args, kwargs)))

    def after(path: str, _module: nn.Module, _args: Any, _kwargs: Any, returned: Any) -> None:
        calls.append(Call(path, given[path].pop(), _tensors(returned)))

    with ExitStack() as stack:
        for path, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(before, path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(after, path), with_kwargs=True).remove)
        run()
    return calls


def where_they_part(one: list[Call], other: list[Call], same: Same) -> str | None:
    """Return the path of the first module that is given the same in both passes and returns something else.

    Modules inside come first. It is "" for the whole model, and None where no module does so.
    """
    for first, second in zip(one, other, strict=False):
        if first.path != second.path:
            return None
        if _all_same(first.given, second.given, same) and not _all_same(first.returned, second.returned, same):
            return first.path
    return None


def in_words(model: nn.Module, path: str | None) -> str:
    """Return the name of a module for a message; without a path, that of the whole model."""
    kind = type(model.get_submodule(path or "")).__name__
    return f"module {path!r}, a {kind}," if path else f"the forward pass of {kind}"


def _all_same(one: list[Tensor], other: list[Tensor], same: Same) -> bool:
    return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))


def _tensors(value: Any) -> list[Tensor]:
    """Return copies of the tensors in a value: a module that follows may write into them."""
    if hasattr(value, "__dict__") and not isinstance(value, Tensor | dict | tuple | list):
        value = vars(value)
    with torch.no_grad():
        leaves = [leaf for leaf in trees.tree_leaves(value) if isinstance(leaf, Tensor) and not in_vmap(leaf)]
        return [leaf.detach().clone() for leaf in leaves]
