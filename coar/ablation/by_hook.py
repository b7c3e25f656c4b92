"""Gates in forward hooks: a mask for every row of a batch, and gradients by the mask."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from coar.ablation.blending import blend
from coar.ablation.channels import Channels
from coar.errors import AblationError

ModuleSide = Literal["output", "input"]


def hook(module: nn.Module, side: ModuleSide, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Register a hook that puts `change(tensor)` in the place of what a module returns, or of its first argument."""

    def after(_module: nn.Module, _args: Any, y: Tensor) -> Tensor:
        return change(y)

    def before(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, kwargs | {first: change(kwargs[first])}

    if side == "output":
        return module.register_forward_hook(after)
    return module.register_forward_pre_hook(before, with_kwargs=True)


class HookGate:
    """Turns a channel y of what a module returns, or is given, into keep * (y + kept) + (1 - keep) * ablated.

    Attributes:
        channels: Which component each channel belongs to, on the one side that is gated.

    Args:
        module: The module to hook.
        site: Its path, for messages.
        side: Whether its `output` or its `input` is gated.
        axis: Axis of that tensor along which the channels lie; axis 0 is the batch.
        channels: Which component each channel belongs to.
        constants: (channels,) `kept` and `ablated` after a folded batch norm; by default 0 and the replacements.
    """

    def __init__(
        self,
        module: nn.Module,
        site: str,
        side: ModuleSide,
        axis: int,
        channels: Channels,
        constants: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.channels: tuple[Channels, ...] = (channels,)
        self._module, self._site, self._side, self._axis = module, site, side, axis
        kept, self._ablated = constants or (torch.zeros_like(channels.replacement), channels.replacement)
        self._difference = None if torch.equal(kept, self._ablated) else kept - self._ablated
        self._keep: Tensor | None = None  # (channels,) or (rows, channels)
        self._seen = False
        self._handle: RemovableHandle | None = None

    def install(self) -> None:
        """Register the hook, after those of the model's owner; without a mask, and seen by nobody yet."""
        self._keep, self._seen = None, False
        self._handle = hook(self._module, self._side, self._blend)

    def restore(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()

    def set(self, keeps: Sequence[Tensor]) -> None:
        """Take the (channels,) mask, or the (rows, channels) masks, of the forwards that follow."""
        (self._keep,) = keeps

    def confirm(self) -> None:
        """Raise `AblationError` when the module was not called."""
        if not self._seen:
            raise AblationError(
                f"module {self._site!r} was not called in the forward pass, so its gates had no effect; exclude it "
                f"from the components, or use parameter_slices on its weight"
            )

    def _blend(self, y: Tensor) -> Tensor:
        self._seen = True
        if self._keep is None:
            return y
        channels = self._keep.shape[-1]
        if y.ndim == 0 or y.shape[self._axis] != channels:
            raise AblationError(
                f"the {self._side} of {self._site!r} has shape {tuple(y.shape)}; {channels} channels were expected on "
                f"axis {self._axis}: give inputs with a batch axis"
            )
        keep = self._keep if self._keep.ndim == 1 else self._spread(self._keep, y)
        return blend(y, keep, self._ablated, self._difference, self._axis)

    def _spread(self, keep: Tensor, y: Tensor) -> Tensor:
        """Repeat (rows, channels) masks for a batch axis that holds several entries of each row, side by side."""
        rows = len(keep)
        if y.ndim < 2 or len(y) % rows:
            raise AblationError(
                f"{rows} masks were given, one per row of the batch, but the {self._side} of {self._site!r} has shape "
                f"{tuple(y.shape)}: its first axis must hold all entries of a row side by side, a whole multiple of "
                f"{rows} in all; exclude it from the components, or give one mask for the whole batch"
            )
        return keep.repeat_interleave(len(y) // rows, dim=0)
