"""Gates in forward hooks: every row of a batch may have its own mask, and gradients reach the masks."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from coar.components.layers import in_vmap, is_layer
from coar.errors import AblationError
from coar.gates.blending import blend
from coar.gates.building import GatedSite, GateKind, GateRequest
from coar.gates.channels import Channels, along
from coar.gates.gate import Gate
from coar.gates.layouts import USUAL, End, Layout, layouts_of
from coar.gates.weight import FoldedNorm, reads_own_weight

LIBRARIES = ("torch.", "transformers.")  # packages whose layers keep no reference to the tensor that they return
ModuleSide = Literal["output", "input", "module"]


@dataclass(frozen=True)
class HookPoint:
    """One tensor of one module, and the components along it.

    Attributes:
        module: The module to hook.
        site: Its path.
        side: The tensor: the module's `output` or `input` channel by channel, or all that the `module` returns.
        axis: Axis of that tensor along which the channels lie.
        channels: The component of each channel; a whole module has one.
        layout: Where the tensor holds the examples of a batch.
    """

    module: nn.Module
    site: str
    side: ModuleSide
    axis: int
    channels: Channels
    layout: Layout = USUAL


def hook(module: nn.Module, side: ModuleSide, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Register a hook that replaces a tensor that a module returns or receives by `change(tensor)`.

    Args:
        module: The module to hook.
        side: `input` for its first argument; `output` or `module` for what it returns, or the first of a tuple or a
            dataclass that it returns.
        change: Maps the tensor to its replacement.
    """

    def after(called: nn.Module, _args: Any, y: Any) -> Any:
        if isinstance(y, Tensor):
            return change(y)
        if isinstance(y, tuple) and y and isinstance(y[0], Tensor):
            made = getattr(type(y), "_make", type(y))  # a named tuple stays one
            return made((change(y[0]), *y[1:]))
        fields = [field.name for field in dataclasses.fields(y)] if dataclasses.is_dataclass(y) else []
        given = [name for name in fields if getattr(y, name) is not None]  # transformers counts no others
        if given and isinstance(getattr(y, given[0]), Tensor):
            return dataclasses.replace(y, **{given[0]: change(getattr(y, given[0]))})
        raise AblationError(
            f"{type(called).__name__} returned a {type(y).__name__}; a tensor, or a tuple or dataclass that starts "
            f"with one, was expected: choose components of a module inside it"
        )

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


class Hooked(Gate):
    """Base of the gates in hooks: the hook, the masks, and checks that they fit the tensor.

    Attributes:
        point: Where the hook is.
        always_arranged: Whether one mask for all examples needs the examples along the first axis too.

    Args:
        point: Where to hook.
    """

    always_arranged: ClassVar[bool] = False

    def __init__(self, point: HookPoint) -> None:
        self.point = point
        self.channels = (point.channels,)
        self.hooked_sites = (point.site,)
        self._keep: Tensor | None = None  # (channels,) or (rows, channels)
        self._seen = False
        self._handle: RemovableHandle | None = None

    def install(self) -> None:
        """Register the hook after those of the model's owner, without a mask."""
        self._keep, self._seen = None, False
        self._handle = hook(self.point.module, self.point.side, self._pass)

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
                f"module {self.point.site!r} was not called in the forward pass, so its gates had no effect; exclude "
                f"it from the components, or use parameter_slices on its weight"
            )

    def _pass(self, y: Tensor) -> Tensor:
        self._seen = True
        if self._keep is None:
            return y
        point, channels, keeps = self.point, self._keep.shape[-1], self._keep.to(y.device)
        if point.side != "module" and (y.ndim == 0 or y.shape[point.axis] != channels):
            raise AblationError(
                f"the {point.side} of {point.site!r} has shape {tuple(y.shape)}; {channels} channels were expected on "
                f"axis {point.axis}: give inputs with a batch axis"
            )
        by_row = keeps.ndim > 1
        if point.layout == USUAL or not (by_row or (self.always_arranged and not point.layout.interleaved)):
            return self._change(y, self._per_entry(keeps, y) if by_row else keeps)
        entries = y.shape[point.layout.axis] // len(keeps) if by_row else 1
        arranged = point.layout.arranged(y, max(entries, 1))
        changed = self._change(arranged, self._per_entry(keeps, arranged) if by_row else keeps)
        return point.layout.restored(changed, max(entries, 1))

    @abstractmethod
    def _change(self, y: Tensor, keep: Tensor) -> Tensor:
        """Return y with the (channels,) mask, or the (rows of y, channels) masks, applied."""

    def _result_memory(self, y: Tensor) -> Tensor | None:
        """Return the tensor that a pass without gradients may write its result into, or None where it needs a new one.

        Allocating memory costs more than all of a gate's arithmetic. Only the gate reads the output of a layer of torch
        or transformers at this point, unless a hook of the model's owner has kept it.
        """
        module, side = self.point.module, self.point.side
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        if torch.is_grad_enabled() or hooks > 1 or in_vmap(y):
            return None
        if side == "output" and is_layer(module) and type(module).__module__.startswith(LIBRARIES):
            return y
        return torch.empty_like(y) if side == "input" else None

    def _broadcast(self, keep: Tensor, y: Tensor) -> Tensor:
        """Return the masks in a shape and type that broadcast over y."""
        shape = [1] * y.ndim if self.point.side == "module" else list(along(self.point.axis, y))
        if keep.ndim == 2:
            shape[0] = len(y)
        return keep.to(y.dtype).view(shape)

    def _per_entry(self, keep: Tensor, y: Tensor) -> Tensor:
        """Repeat (rows, channels) masks for a batch axis that holds several entries of each row, side by side."""
        rows, least = len(keep), 1 if self.point.side == "module" else 2
        if y.ndim < least or len(y) % rows:
            raise AblationError(
                f"{rows} masks were given, one per row of the batch, but the {self.point.side} of {self.point.site!r} "
                f"has shape {tuple(y.shape)}: its first axis must hold all entries of a row side by side, a whole "
                f"multiple of {rows} in all; exclude it from the components, or give one mask for the whole batch"
            )
        return keep.repeat_interleave(len(y) // rows, dim=0)


class HookGate(Hooked):
    """Turns a channel y of a module's output or input into keep * (y + kept) + (1 - keep) * ablated.

    Args:
        point: Where to hook: an `output` or an `input`.
        constants: (channels,) `kept` and `ablated` after a folded batch norm; by default 0 and the replacements.
    """

    def __init__(self, point: HookPoint, constants: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(point)
        replacement = point.channels.replacement
        kept, self._ablated = constants or (torch.zeros_like(replacement), replacement)
        self._offset = None if torch.equal(kept, self._ablated) else kept - self._ablated

    def replace(self, constants: Sequence[Tensor]) -> None:
        """Take other (channels,) constants for the forwards that follow; gradients reach them."""
        (self._ablated,) = constants
        self._offset = -self._ablated

    def _change(self, y: Tensor, keep: Tensor) -> Tensor:
        out = self._result_memory(y) if keep.ndim == 1 else None
        offset = None if self._offset is None else self._offset.to(y.device)
        return blend(y, keep, self._ablated.to(y.device), offset, self.point.axis, out)


class ModuleGate(Hooked):
    """Turns all that a module returns, y, into keep * y + (1 - keep) * constants, one for each of its features.

    Args:
        point: Where to hook: a whole `module`.
    """

    def __init__(self, point: HookPoint) -> None:
        super().__init__(point)
        replacement = point.channels.replacement
        self._constants = replacement if replacement.any() else None  # zeros fit any shape

    def replace(self, constants: Sequence[Tensor]) -> None:
        """Take other (features,) constants for the forwards that follow; gradients reach them."""
        (self._constants,) = constants

    def _change(self, y: Tensor, keep: Tensor) -> Tensor:
        mask = self._broadcast(keep, y)
        if self._constants is None:
            return y * mask
        check_features(y, self.point.site, self.point.axis, len(self._constants))
        return torch.lerp(self._constants.to(y).view(along(self.point.axis, y)), y, mask)


def check_features(y: Tensor, site: str, axis: int, features: int) -> None:
    """Raise `AblationError` unless a module returns as many features along an axis as its component has."""
    if not -y.ndim <= axis < y.ndim or y.shape[axis] != features:
        raise AblationError(
            f"{site!r} returned a tensor of shape {tuple(y.shape)}, where {features} features were expected on axis "
            f"{axis}; give their place with modules(..., axis=, size=)"
        )


def hook_points(request: GateRequest, gated: GatedSite) -> list[HookPoint]:
    """Return where to hook a module, one point for each of the site's sides."""
    module, points = request.model.get_submodule(gated.site), []
    for side, rows in gated.sides.items():
        if side in ("output", "input", "module"):
            axis = request.components[rows[0]].axis
            layout = layout_at(request.model, gated.site, side, axis)
            points.append(HookPoint(module, gated.site, side, axis, request.channels(gated, side), layout))
    return points


def layout_at(model: nn.Module, site: str, side: ModuleSide, axis: int) -> Layout:
    """Return the layout of a tensor of a module; the usual one where its channels lie before its examples."""
    end: End = "input" if side == "input" else "output"
    layout = layouts_of(model).get((site, end), USUAL)
    return USUAL if side != "module" and 0 <= axis <= layout.axis else layout


def _build(request: GateRequest, sites: Sequence[GatedSite]) -> list[Gate]:
    return [gate for gated in sites for gate in _gates_of(request, gated)]


def _gates_of(request: GateRequest, gated: GatedSite) -> list[Gate]:
    """Return one hook for each side, after the batch norm that follows is folded where only outputs are gated."""
    points = hook_points(request, gated)
    norm = request.batch_norm(gated)
    if norm is not None and list(gated.sides) == ["output"] and reads_own_weight(points[0].module):
        folded = FoldedNorm(points[0].module, points[0].channels, norm, request.weight_dtype)
        return [folded, HookGate(points[0], (folded.kept, folded.ablated))]
    return [ModuleGate(point) if point.side == "module" else HookGate(point) for point in points]


HOOK_GATES = GateKind(lambda _request, _site: True, _build)
