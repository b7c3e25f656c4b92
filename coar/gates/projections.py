"""Attention blocks that read their output projection's weight without calling it, made to call it.

`torch.nn.MultiheadAttention` and torchvision's shifted-window attention (Swin) hand that weight to a function, so no
hook can see what the projection reads: the heads.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PROJECTIONS = {"MultiheadAttention": "out_proj", "ShiftedWindowAttention": "proj"}  # by the name of the block's type


class CalledProjection:
    """Lets a block compute what its projection reads, and calls the projection with that.

    The block's own forward runs with an identity in the projection's place, which is exact, since it adds zeros only.
    The projection acts on every position by itself, so it makes no difference that the block rearranges positions in
    between.

    Args:
        block: The attention block.
        name: What it calls its projection.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        self._block, self._name = block, name
        self._own = {key: value for key, value in vars(block).items() if key == "forward"}

    def install(self) -> None:
        """Put another forward in the place of the block's."""
        plain, block, name = self._block.forward, self._block, self._name
        projection: nn.Module = block.get_submodule(name)
        identity = _identity(projection)

        def forward(*args: Any, **kwargs: Any) -> Any:
            block._modules[name] = identity
            try:
                heads = plain(*args, **kwargs)
            finally:
                block._modules[name] = projection
            return (projection(heads[0]), *heads[1:]) if isinstance(heads, tuple) else projection(heads)

        block.forward = forward

    def restore(self) -> None:
        """Put the block's forward back."""
        vars(self._block).pop("forward", None)
        vars(self._block).update(self._own)


def uncalled_projections(model: nn.Module, sites: Iterable[str]) -> list[CalledProjection]:
    """Return the blocks among whose projections are some of the sites, not changed yet."""
    found = []
    for site in dict.fromkeys(sites):
        parent, _, name = site.rpartition(".")
        block = model.get_submodule(parent)
        if any(PROJECTIONS.get(kind.__name__) == name for kind in type(block).__mro__):
            found.append(CalledProjection(block, name))
    return found


@contextmanager
def called_projections(model: nn.Module, sites: Iterable[str]) -> Iterator[None]:
    """Let blocks call their projections, where these are among the sites."""
    with ExitStack() as stack:
        for block in uncalled_projections(model, sites):
            stack.callback(block.restore)
            block.install()
        yield


def _identity(projection: nn.Module) -> nn.Module:
    weight: Tensor = projection.weight  # type: ignore[assignment]
    identity = nn.Linear(weight.shape[1], weight.shape[1], device=weight.device, dtype=weight.dtype)
    identity.requires_grad_(False)
    torch.nn.init.eye_(identity.weight)
    torch.nn.init.zeros_(identity.bias)
    return identity
