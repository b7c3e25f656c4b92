"""Calls of output projections in attention blocks that otherwise only read the projection's weight.

`torch.nn.MultiheadAttention` and torchvision's shifted-window attention (Swin) pass that weight to a function, so no
hook receives the input of the projection, which holds the heads.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PROJECTIONS = {"MultiheadAttention": "out_proj", "ShiftedWindowAttention": "proj"}  # by name of the block's type


class CalledProjection:
    """Makes a block compute the input of its projection, and calls the projection with it.

    The block's own forward runs with an identity instead of the projection, which is exact because it adds only zeros.
    The projection acts on every position separately, so the block may rearrange positions in between.

    Args:
        block: The attention block.
        name: Name of its projection.
    """

    def __init__(self, block: nn.Module, name: str) -> None:
        self._block, self._name = block, name
        self._own = {key: value for key, value in vars(block).items() if key == "forward"}

    def install(self) -> None:
        """Replace the block's forward."""
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
    """Return the blocks whose projections are among the sites; nothing is installed yet."""
    found = []
    for site in dict.fromkeys(sites):
        parent, _, name = site.rpartition(".")
        block = model.get_submodule(parent)
        if any(PROJECTIONS.get(kind.__name__) == name for kind in type(block).__mro__):
            found.append(CalledProjection(block, name))
    return found


@contextmanager
def called_projections(model: nn.Module, sites: Iterable[str]) -> Iterator[None]:
    """Make blocks call their projections, where these are among the sites, until the context ends."""
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
