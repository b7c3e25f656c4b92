"""Gates: apply masks to a model during its forward passes and leave nothing behind.

A gate turns a component's output y into keep * y + (1 - keep) * replacement. Where the component is an output row of
a convolution or a linear layer and a batch shares one mask, the same is done to the layer's weight and bias instead,
which costs as much as reading the weights once and nothing per example. Everywhere else a forward hook does it, and
then every row of a batch may have a mask of its own and gradients reach the mask.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from coar.components import (
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    Component,
    Components,
    check_components,
    output_channels,
)
from coar.errors import AblationError


class Gates:
    """Context manager that gates a model's components; inside it, `set` chooses the mask of the next forwards.

    Args:
        model: The model; its parameters and hooks are as before when the context ends, also after an exception.
        components: The components a mask speaks of.
        replacements: (components,) constants that replace ablated outputs.
        batch_norms: Path of the batch norm that alone follows a site, see `following_batch_norms`; it is folded into
            the gated weights, which saves its pass over the activations.
        through_outputs: Gate every component by forward hooks, so that masks may differ between the rows of a batch
            and carry gradients; parameter slices cannot be gated so.

    Raises:
        ComponentError: When a component is not part of the model.
        AblationError: When two kinds of components claim the same weights, or `through_outputs` is asked of a
            parameter slice.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        replacements: Tensor,
        *,
        batch_norms: Mapping[str, str] | None = None,
        through_outputs: bool = False,
    ) -> None:
        norms = batch_norms or {}
        check_components(model, components)
        if replacements.shape != (len(components),):
            raise AblationError(
                f"replacements have shape {tuple(replacements.shape)}; one constant for each of the {len(components)} "
                f"components was expected"
            )
        values = replacements.to(next(model.parameters()).device)
        self._length = len(components)
        self._stack = ExitStack()
        self._gates: list[_Gate] = []
        claimed: dict[nn.Parameter, str] = {}
        for (site, side, axis), indices in components.sites().items():
            first = components[indices[0]]
            if side == "parameter":
                self._gates.append(_slice_gate(model, components, indices, through_outputs))
                weight: nn.Parameter | None = model.get_parameter(site)
            else:
                layer = model.get_submodule(site)
                lookup = _lookup(output_channels(layer), components, indices).to(values.device)
                by_weight = not through_outputs and reads_own_weight(layer)
                norm = model.get_submodule(norms[site]) if site in norms else None
                self._gates.append(
                    _LayerGate(layer, lookup, values, norm)
                    if by_weight
                    else _OutputGate(layer, first, axis, lookup, values)
                )
                weight = layer._parameters.get("weight")
            if weight is not None and weight in claimed and "parameter" in (side, claimed[weight]):
                raise AblationError(
                    f"{first.name!r} and another component claim the same weights, one of them as a parameter slice; "
                    f"keep either the parameter slices or the other kind"
                )
            if weight is not None:
                claimed[weight] = side

    def __enter__(self) -> Self:
        for gate in self._gates:
            self._stack.callback(gate.restore)
            gate.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def set(self, keep: Tensor) -> None:
        """Choose the mask of the forwards that follow.

        Args:
            keep: (components,) mask, or (rows, components) with one mask per row of the batch; True or 1 keeps.
                With `through_outputs`, a floating-point mask that requires gradients receives them.
        """
        if keep.shape[-1:] != (self._length,):
            raise AblationError(
                f"the mask has shape {tuple(keep.shape)}; ({self._length},), or one such row per example, was expected"
            )
        one = keep.new_ones((*keep.shape[:-1], 1))
        extended = torch.cat([keep, one], dim=-1)  # (..., components + 1), the last entry for what has no gate
        for gate in self._gates:
            gate.set(extended)

    def confirm(self) -> None:
        """Raise `AblationError` when a gate saw no forward pass, which would make its component silently immune."""
        for gate in self._gates:
            gate.confirm()


def called_sites(model: nn.Module, components: Components, *, run: Callable[[nn.Module], object]) -> set[str]:
    """Return the sites whose module is called when the model runs; the others are read by weight, or not at all."""
    called: set[str] = set()
    with ExitStack() as stack:
        for site, side, _ in components.sites():
            if side == "output":
                module = model.get_submodule(site)
                handle = module.register_forward_hook(lambda _module, _args, _y, site=site: called.add(site))
                stack.callback(handle.remove)
        run(model)
    return called


def reads_own_weight(layer: nn.Module) -> bool:
    """Say whether swapping the layer's weight and bias gates its outputs: plain convolutions and linear layers."""
    if not isinstance(layer, (*CONVOLUTIONS, nn.Linear)) or "bias" not in layer._parameters:
        return False
    return layer._parameters.get("weight") is not None and not (
        isinstance(layer, TRANSPOSED_CONVOLUTIONS) and layer.groups > 1
    )


class _Gate(Protocol):
    def install(self) -> None: ...
    def restore(self) -> None: ...
    def set(self, extended: Tensor) -> None: ...
    def confirm(self) -> None: ...


class _LayerGate:
    """Swaps a layer's weight and bias for gated buffers, with the batch norm that follows folded in if one is given.

    Channel c then computes keep * (scale w_c x + kept_c) + (1 - keep) * ablated_c, where scale and both constants hold
    what the batch norm does, which itself steps aside.
    """

    def __init__(self, layer: nn.Module, lookup: Tensor, values: Tensor, norm: nn.Module | None) -> None:
        self._layer, self._norm = layer, norm
        self._forward = {name: value for name, value in vars(norm).items() if name == "forward"} if norm else {}
        self._lookup = lookup  # (channels,) into the extended mask
        self._originals = {name: layer._parameters[name] for name in ("weight", "bias")}
        weight, bias = self._originals["weight"], self._originals["bias"]
        if weight is None:
            raise AblationError(f"{type(layer).__name__} has no weight of its own to gate; use through_outputs")
        scale, shift = _affine(norm) if norm is not None else (weight.new_ones(1), weight.new_zeros(1))
        self._shape = _along(1 if isinstance(layer, TRANSPOSED_CONVOLUTIONS) else 0, weight)
        self._weight = weight.detach() * scale.view(self._shape)
        plain = weight.new_zeros(len(lookup)) if bias is None else bias
        self._kept = plain.detach() * scale + shift
        replacement = torch.cat([values.to(plain), plain.new_zeros(1)])[lookup]
        self._ablated = torch.where(lookup < len(values), replacement * scale + shift, self._kept)
        self._buffers = {"weight": self._weight.clone()}
        if norm is not None or not torch.equal(self._ablated, self._kept):  # else the bias stays as it is
            self._buffers["bias"] = self._kept.clone()

    def install(self) -> None:
        self._layer._parameters.update(self._buffers)  # type: ignore[arg-type]
        if self._norm is not None:
            self._norm.forward = _unchanged

    def restore(self) -> None:
        self._layer._parameters.update(self._originals)
        if self._norm is not None:
            vars(self._norm).pop("forward", None)
            vars(self._norm).update(self._forward)  # some libraries keep a wrapper there

    def set(self, extended: Tensor) -> None:
        if extended.ndim != 1:
            raise AblationError("one mask per row needs Gates(..., through_outputs=True); give one mask instead")
        keep = extended[self._lookup].to(self._weight.dtype)
        torch.mul(self._weight, keep.view(self._shape), out=self._buffers["weight"])
        if "bias" in self._buffers:
            torch.mul(self._kept, keep, out=self._buffers["bias"]).addcmul_(self._ablated, 1 - keep)

    def confirm(self) -> None:
        """Nothing to confirm: the layer cannot run without reading its weight."""


class _SliceGate:
    """Zeroes slices of a parameter in place, since a bare parameter may be read in any way, and puts them back."""

    def __init__(self, parameter: nn.Parameter, axis: int, lookup: Tensor) -> None:
        self._live = parameter.detach()
        self._kept = self._live.clone()
        self._shape = _along(axis, self._live)
        self._lookup = lookup

    def install(self) -> None:
        """Nothing to install before the first mask."""

    def restore(self) -> None:
        self._live.copy_(self._kept)

    def set(self, extended: Tensor) -> None:
        if extended.ndim != 1:
            raise AblationError("a parameter slice cannot have one mask per row of the batch; give one mask instead")
        torch.mul(self._kept, extended[self._lookup].to(self._kept.dtype).view(self._shape), out=self._live)

    def confirm(self) -> None:
        """Nothing to confirm: whatever reads the parameter reads it zeroed."""


class _OutputGate:
    """Blends a module's output with its replacements in a forward hook."""

    def __init__(self, module: nn.Module, first: Component, axis: int, lookup: Tensor, values: Tensor) -> None:
        self._module = module
        self._site = first.site
        self._axis = axis
        self._lookup = lookup  # (channels,) into the extended mask
        self._replacement = torch.cat([values, values.new_zeros(1)])[lookup]
        self._keep: Tensor | None = None
        self._seen = False
        self._handle: RemovableHandle | None = None

    def install(self) -> None:
        self._handle = self._module.register_forward_hook(self._blend)

    def restore(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def set(self, extended: Tensor) -> None:
        self._keep = extended[..., self._lookup]  # (channels,) or (rows, channels)

    def confirm(self) -> None:
        if not self._seen:
            raise AblationError(
                f"module {self._site!r} was not called in the forward pass, so its gates had no effect; exclude it "
                f"from the components, or use parameter_slices on its weight"
            )

    def _blend(self, _module: nn.Module, _args: Any, y: Tensor) -> Tensor | None:
        self._seen = True
        if self._keep is None:
            return None
        if y.shape[self._axis] != len(self._lookup):
            raise AblationError(
                f"the output of {self._site!r} has shape {tuple(y.shape)}; {len(self._lookup)} channels were expected "
                f"on axis {self._axis}: give inputs with a batch axis"
            )
        shape = [1] * y.ndim
        shape[self._axis] = len(self._lookup)
        rows = self._keep.shape[:-1]  # () or (rows,)
        keep = self._keep.to(y.dtype).view(*rows, *shape[len(rows) :])
        return y * keep + self._replacement.to(y.dtype).view(shape) * (1 - keep)


def _slice_gate(model: nn.Module, components: Components, indices: list[int], through_outputs: bool) -> _SliceGate:
    first = components[indices[0]]
    if through_outputs:
        raise AblationError(
            f"{first.name!r} is a parameter slice: it has no output to gate per row or to take gradients through; "
            f"use conv_filters or neurons"
        )
    parameter = model.get_parameter(first.site)
    lookup = _lookup(parameter.shape[first.axis], components, indices).to(parameter.device)
    return _SliceGate(parameter, first.axis, lookup)


def _lookup(length: int, components: Components, indices: list[int]) -> Tensor:
    """Map each position along an axis to its component's row; positions without one to the entry after the last."""
    lookup = torch.full((length,), len(components))
    for i in indices:
        span = slice(components[i].position, components[i].position + components[i].size)
        if (lookup[span] != len(components)).any():
            raise AblationError(f"{components[i].name!r} overlaps another component of the table; leave one out")
        lookup[span] = i
    return lookup


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return (channels,) scale and shift of a batch norm in evaluation mode."""
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    variance: Tensor = norm.running_var  # type: ignore[assignment]
    scale = (variance + norm.eps).rsqrt()  # type: ignore[operator]
    scale = scale if norm.weight is None else scale * norm.weight.detach()  # type: ignore[operator]
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()  # type: ignore[operator]


def _unchanged(x: Tensor) -> Tensor:
    return x


def _along(axis: int, tensor: Tensor) -> tuple[int, ...]:
    return tuple(-1 if i == axis else 1 for i in range(tensor.ndim))
