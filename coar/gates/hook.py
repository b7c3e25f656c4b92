"""Gates in forward hooks: a mask for every row of a batch, and gradients by the mask."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from coar.components.layers import is_layer
from coar.errors import AblationError
from coar.gates.blending import blend
from coar.gates.channels import Channels, along

OWNERS = ("torch.", "transformers.")  # of layers that return a tensor which they keep no hold of
ModuleSide = Literal["output", "input", "module"]


def hook(module: nn.Module, side: ModuleSide, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Register a hook that puts `change(tensor)` in the place of a tensor that a module returns or is given.

    Args:
        module: The module to hook.
        side: `input` for its first argument; `output` or `module` for what it returns, or the first of what it returns.
        change: Maps the tensor to the one that takes its place.
    """

    def after(called: nn.Module, _args: Any, y: Any) -> Any:
        if isinstance(y, tuple) and y and isinstance(y[0], Tensor):
            return (change(y[0]), *y[1:])
        if not isinstance(y, Tensor):
            raise AblationError(
                f"{type(called).__name__} returned a {type(y).__name__}; a tensor, or a tuple that starts with one, "
                f"was expected: choose components of a module inside it"
            )
        return change(y)

    def before(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, kwargs | {first: change(kwargs[first])}

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


class Hooked(ABC):
    """What gates in hooks share: the hook, the masks, and checks that they fit the tensor.

    Attributes:
        channels: Which component each channel belongs to, on the one side that is gated.
        site: The module's path.

    Args:
        module: The module to hook.
        site: Its path.
        side: What is gated: its `output` or `input` channel by channel, or the whole `module`.
        axis: Axis of that tensor along which the channels lie; axis 0 is the batch.
        channels: Which component each channel belongs to; a whole module has one.
    """

    def __init__(self, module: nn.Module, site: str, side: ModuleSide, axis: int, channels: Channels) -> None:
        self.channels: tuple[Channels, ...] = (channels,)
        self.site, self._module, self._side, self._axis = site, module, side, axis
        self._keep: Tensor | None = None  # (channels,) or (rows, channels)
        self._seen = False
        self._handle: RemovableHandle | None = None

    def install(self) -> None:
        """Register the hook, after those of the model's owner; without a mask, and seen by nobody yet."""
        self._keep, self._seen = None, False
        self._handle = hook(self._module, self._side, self._pass)

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
                f"module {self.site!r} was not called in the forward pass, so its gates had no effect; exclude it "
                f"from the components, or use parameter_slices on its weight"
            )

    def _pass(self, y: Tensor) -> Tensor:
        self._seen = True
        if self._keep is None:
            return y
        channels = self._keep.shape[-1]
        if self._side != "module" and (y.ndim == 0 or y.shape[self._axis] != channels):
            raise AblationError(
                f"the {self._side} of {self.site!r} has shape {tuple(y.shape)}; {channels} channels were expected on "
                f"axis {self._axis}: give inputs with a batch axis"
            )
        return self._change(y, self._keep if self._keep.ndim == 1 else self._spread(self._keep, y))

    @abstractmethod
    def _change(self, y: Tensor, keep: Tensor) -> Tensor:
        """Return y with the (channels,) mask, or the (rows of y, channels) masks, applied."""

    def _room(self, y: Tensor) -> Tensor | None:
        """Return where a pass without gradients may write its result, None where it must leave all else as it is.

        Fresh memory costs more than all of a gate's arithmetic. The output of a layer that is torch's own or
        transformers' is read by nobody else yet, unless a hook of the model's owner has kept it.
        """
        if torch.is_grad_enabled() or len(self._module._forward_hooks) + len(self._module._forward_pre_hooks) > 1:
            return None
        if self._side == "output" and is_layer(self._module) and type(self._module).__module__.startswith(OWNERS):
            return y
        return torch.empty_like(y) if self._side == "input" else None

    def _laid(self, y: Tensor, keep: Tensor) -> Tensor:
        """Return the masks in a shape and type that spread over y."""
        shape = [1] * y.ndim if self._side == "module" else list(along(self._axis, y))
        if keep.ndim == 2:
            shape[0] = len(y)
        return keep.to(y.dtype).view(shape)

    def _spread(self, keep: Tensor, y: Tensor) -> Tensor:
        """Repeat (rows, channels) masks for a batch axis that holds several entries of each row, side by side."""
        rows, least = len(keep), 1 if self._side == "module" else 2
        if y.ndim < least or len(y) % rows:
            raise AblationError(
                f"{rows} masks were given, one per row of the batch, but the {self._side} of {self.site!r} has shape "
                f"{tuple(y.shape)}: its first axis must hold all entries of a row side by side, a whole multiple of "
                f"{rows} in all; exclude it from the components, or give one mask for the whole batch"
            )
        return keep.repeat_interleave(len(y) // rows, dim=0)


class HookGate(Hooked):
    """Turns a channel y of what a module returns, or is given, into keep * (y + kept) + (1 - keep) * ablated.

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
        super().__init__(module, site, side, axis, channels)
        kept, self._ablated = constants or (torch.zeros_like(channels.replacement), channels.replacement)
        self._difference = None if torch.equal(kept, self._ablated) else kept - self._ablated

    def replace(self, constants: Tensor) -> None:
        """Take other (channels,) constants for the forwards that follow; gradients reach them."""
        self._ablated, self._difference = constants, -constants

    def _change(self, y: Tensor, keep: Tensor) -> Tensor:
        return blend(y, keep, self._ablated, self._difference, self._axis, self._room(y) if keep.ndim == 1 else None)


class ModuleGate(Hooked):
    """Turns all that a module returns, y, into keep * y + (1 - keep) * constants, one for each of its features."""

    def __init__(self, module: nn.Module, site: str, side: ModuleSide, axis: int, channels: Channels) -> None:
        super().__init__(module, site, side, axis, channels)
        self._constants = channels.replacement if channels.replacement.any() else None  # zeros suit any shape

    def replace(self, constants: Tensor) -> None:
        """Take other (channels,) constants for the forwards that follow; gradients reach them."""
        self._constants = constants

    def _change(self, y: Tensor, keep: Tensor) -> Tensor:
        mask = self._laid(y, keep)
        if self._constants is None:
            return y * mask
        check_features(y, self.site, self._axis, len(self._constants))
        return torch.lerp(self._constants.to(y.dtype).view(along(self._axis, y)), y, mask)


def check_features(y: Tensor, site: str, axis: int, features: int) -> None:
    """Raise `AblationError` unless a module returns as many features along an axis as its component has."""
    if not -y.ndim <= axis < y.ndim or y.shape[axis] != features:
        raise AblationError(
            f"{site!r} returned a tensor of shape {tuple(y.shape)}, where {features} features were expected on axis "
            f"{axis}; say where they are with modules(..., axis=, size=)"
        )


class ResampleGate(Hooked):
    """Turns what passes, y, into keep * y + (1 - keep) * what the donors' plain pass held at the same call."""

    _recording = False
    _calls = 0

    def install(self) -> None:
        """Register the hook; nothing is recorded yet."""
        self._donors: list[Tensor] = []  # (rows, ...), one for every call of the module in a forward pass
        super().install()

    def restore(self) -> None:
        """Remove the hook and forget the donors."""
        self._donors = []
        super().restore()

    def set(self, keeps: Sequence[Tensor]) -> None:
        """Take the (channels,) mask, or the (rows, channels) masks, of the next forward."""
        self._calls = 0
        super().set(keeps)

    def record(self, on: bool) -> None:
        """Begin to keep what passes, in the place of what was kept before; or stop."""
        if on:
            self._donors = []
        self._recording = on

    def _pass(self, y: Tensor) -> Tensor:
        if not self._recording:
            return super()._pass(y)
        self._donors.append(y.detach().clone())  # a layer that follows may write into y
        return y

    def _change(self, y: Tensor, keep: Tensor) -> Tensor:
        if not self._donors:
            raise AblationError(f"no donors were recorded at {self.site!r}; call Gates.record before a forward pass")
        source = self._donors[self._calls % len(self._donors)]
        self._calls += 1
        if len(source) and len(y) != len(source) and len(y) % len(source) == 0:  # several masks share a forward
            source = source.repeat(len(y) // len(source), *[1] * (y.ndim - 1))
        if source.shape != y.shape:
            raise AblationError(
                f"the {self._side} of {self.site!r} has shape {tuple(y.shape)} for the examples and "
                f"{tuple(source.shape)} for their donors; resampling needs activations of one shape: pad all examples "
                f"alike, or exclude that module from the components"
            )
        return torch.lerp(source, y, self._laid(y, keep), out=self._room(y))


class PositionGate(Hooked):
    """Turns what passes, y, into keep * y + (1 - keep) * constants, one for each channel at each position."""

    def __init__(self, module: nn.Module, site: str, side: ModuleSide, axis: int, channels: Channels) -> None:
        super().__init__(module, site, side, axis, channels)
        self._constants = channels.replacement  # (positions, channels)
        self._known = (~channels.replacement.isnan().any(-1)).tolist()  # asked at every call, so not on the device

    def _change(self, y: Tensor, keep: Tensor) -> Tensor:
        if y.ndim != 3:
            raise _without_positions(self.site, f"{tuple(y.shape)} entries")
        if self._side == "module":
            check_features(y, self.site, self._axis, self._constants.shape[-1])
        here = 3 - self._axis % 3  # the axis of positions
        length = y.shape[here]
        if sum(self._known[:length]) < length:
            raise AblationError(
                f"{self.site!r} works on sequences of {length} positions, and the calibration examples have tokens at "
                f"{sum(self._known[:length])} of these; give calibration examples that are as long, or cut positions "
                f"that are padding everywhere"
            )
        wanted = self._constants[:length] if here == 1 else self._constants[:length].T
        return torch.lerp(wanted.to(y.dtype)[None], y, self._laid(y, keep), out=self._room(y))


def _without_positions(site: str, seen: str) -> AblationError:
    return AblationError(
        f"{site!r} works on tensors of {seen}; a mean for each position needs (texts, positions, features), with as "
        f"many positions in all batches: exclude it, pad all texts alike, or use Mean(calibration=...)"
    )
