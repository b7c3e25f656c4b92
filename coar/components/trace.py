"""The calls of a model's modules in one pass, and the tensors that pass between them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees

from coar.components.layers import unwrapped
from coar.errors import ComponentError

MANY = 10_000  # number of tokens from which random ones are drawn


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        path: The module's path.
        module: The module.
        given: The first floating-point tensor among its arguments; None if there is none.
        returned: The first tensor that it returned; None if there is none.
        values: Copies of these two, made when the call ended.
    """

    path: str
    module: nn.Module
    given: Tensor | None
    returned: Tensor | None
    values: tuple[Tensor | None, Tensor | None]

    @property
    def passes_on(self) -> bool:
        """Whether the module returned its input tensor, as dropout does in evaluation mode."""
        return _same(self.given, self.values[0], self.returned, self.values[1])


class Trace:
    """The calls of one pass, in the order in which they ended.

    Tensors of the pass stay in memory, so two with the same address and size are the same tensor. Their values must be
    equal too, since a later module may have written into it.

    Args:
        calls: The calls.
    """

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self._by_path: dict[str, list[int]] = {}
        for i, call in enumerate(calls):
            self._by_path.setdefault(call.path, []).append(i)

    def __contains__(self, path: str) -> bool:
        return path in self._by_path

    def index(self, path: str) -> int:
        """Return the number of a module's only call; raise `ComponentError` if there are several."""
        numbers = self._by_path[path]
        if len(numbers) > 1:
            raise ComponentError(
                f"{path!r} is called {len(numbers)} times in one pass; edges need a model that calls every layer once: "
                f"use attention_heads and modules instead"
            )
        return numbers[0]

    def __getitem__(self, path: str) -> Call:
        return self.calls[self.index(path)]

    def maker(self, call: Call, within: str) -> Call | None:
        """Return the call inside the module `within` that made the input of a call; None if there is none."""
        for other in self.calls:
            made = _same(other.returned, other.values[1], call.given, call.values[0])
            if made and not other.passes_on and is_inside(other.path, within):
                return other
        return None

    def taker(self, call: Call, within: str) -> Call | None:
        """Return the call inside `within` that took and changed the result of a call; None if there is none."""
        for other in self.calls:
            taken = _same(call.returned, call.values[1], other.given, other.values[0])
            if taken and not other.passes_on and is_inside(other.path, within) and other.returned is not None:
                return other
        return None


def trace(model: nn.Module, tokens: Tensor) -> Trace:
    """Run a model on (rows, positions) tokens and return the calls of its modules."""
    calls: list[Call] = []

    def record(path: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        given = next((leaf for leaf in _tensors((args, kwargs)) if leaf.is_floating_point()), None)
        returned = next(iter(_tensors(result)), None)
        copies = tuple(None if tensor is None else tensor.detach().clone() for tensor in (given, returned))
        calls.append(Call(path, module, given, returned, (copies[0], copies[1])))

    with ExitStack() as stack, torch.no_grad():
        for path, module in model.named_modules():

            def after(module: nn.Module, args: Any, kwargs: Any, result: Any, path: str = path) -> None:
                record(path, module, args, kwargs, result)

            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        run(model, tokens)
    return Trace(calls)


def run(model: nn.Module, tokens: Tensor) -> None:
    """Run a model on tokens in evaluation mode, then restore every module's mode."""
    with _evaluating(model):
        try:
            model(tokens)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ComponentError(
                f"{type(model).__name__} cannot be run on {tuple(tokens.shape)} token numbers alone ({error}); edges "
                f"need a decoder-only language model: give such a model itself"
            ) from error


def random_tokens(model: nn.Module, rows: int, positions: int) -> Tensor:
    """Return (rows, positions) random token numbers from the model's vocabulary."""
    table = token_embedding(unwrapped(model))
    tokens = torch.tensor([token for token in range(min(table.num_embeddings, MANY)) if token != table.padding_idx])
    picks = torch.randint(len(tokens), (rows, positions), generator=torch.Generator().manual_seed(0))
    return tokens[picks].to(table.weight.device)


def token_embedding(model: nn.Module) -> nn.Embedding:
    """Return the embedding of tokens: that of `get_input_embeddings`, or the model's first."""
    try:
        named = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        named = None
    tables = [table for table in (named, *model.modules()) if isinstance(table, nn.Embedding)]
    if not tables:
        raise ComponentError(
            f"{type(model).__name__} has no embedding of tokens; edges need a decoder-only language model"
        )
    return tables[0]


def is_inside(path: str, outer: str) -> bool:
    """Return whether a module's path lies below another's."""
    return not outer or path.startswith(f"{outer}.")


def _same(first: Tensor | None, first_values: Tensor | None, second: Tensor | None, values: Tensor | None) -> bool:
    if first is None or second is None or first_values is None or values is None:
        return False
    if (first.data_ptr(), first.numel(), first.dtype) != (second.data_ptr(), second.numel(), second.dtype):
        return False
    return torch.equal(first_values.flatten(), values.flatten())


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in trees.tree_leaves(values) if isinstance(leaf, Tensor)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
