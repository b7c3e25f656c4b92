"""Gates in the weights of a layer: one mask for a whole batch, at no cost per example."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coar.components.layers import TRANSPOSED_CONVOLUTIONS, input_axis, is_conv1d, is_dense, is_layer, output_axis
from coar.errors import AblationError
from coar.gates.building import GatedSite, GateKind, GateRequest
from coar.gates.channels import Channels, along
from coar.gates.gate import Gate
from coar.gates.response import is_proportional


def reads_own_weight(layer: nn.Module) -> bool:
    """Return whether replacing the layer's weight and bias gates it: convolutions and linear layers that follow them.

    It does not where the weight is quantised, and where accelerate offloads it, so that it is on the meta device except
    while its layer runs.
    """
    if not is_layer(layer) or "bias" not in layer._parameters:
        return False
    weight = layer._parameters.get("weight")
    grouped = isinstance(layer, TRANSPOSED_CONVOLUTIONS) and layer.groups > 1
    return is_dense(weight) and not weight.is_meta and not grouped and is_proportional(layer)  # type: ignore[union-attr]


class LayerGate(Gate):
    """Replaces a layer's weight and bias by gated buffers, with the batch norm that follows folded in if one is given.

    Output channel c then computes keep_c * (scale_c w_c (k x + (1 - k) r) + kept_c) + (1 - keep_c) * ablated_c, where
    k and r are mask and replacements of the input features, and scale and both constants contain the effect of the
    batch norm, which itself is skipped.

    Attributes:
        layer: The layer.
        channels: Those of the outputs and of the inputs, where there are any, in this order; with neither, only the
            batch norm is folded.

    Args:
        layer: A layer of which `reads_own_weight` is true.
        outputs: The component of each output channel; None where no output is gated.
        inputs: The component of each input feature of a linear layer; None where no input is gated.
        norm: The batch norm that alone follows the layer.
        dtype: Type of the gated weight where the layer's own is float32, such as the type that autocast converts it to
            on every forward; by default float32.

    Raises:
        AblationError: When the layer has no weight of its own.
    """

    layer: nn.Module

    def __init__(
        self,
        layer: nn.Module,
        outputs: Channels | None,
        inputs: Channels | None,
        norm: nn.Module | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.layer, self._skipped = layer, SkippedNorm(norm) if norm is not None else None
        self._outputs, self._inputs = outputs, inputs
        self._originals = {name: layer._parameters[name] for name in ("weight", "bias")}
        weight, bias = self._originals["weight"], self._originals["bias"]
        if weight is None:
            raise AblationError(f"{type(layer).__name__} has no weight of its own to gate; give use_hooks=True")
        axis = output_axis(layer)
        plain = weight.new_zeros(weight.shape[axis]) if bias is None else bias.detach()
        scale, shift = _scale_and_shift(norm) if norm is not None else (torch.ones_like(plain), torch.zeros_like(plain))
        exact = weight.detach() if norm is None else weight.detach() * scale.view(along(axis, weight))
        self._weight = exact.to(dtype) if dtype is not None and exact.dtype == torch.float32 else exact
        self.kept = self.ablated = plain * scale + shift
        if outputs is not None:
            self.ablated = torch.where(outputs.taken, outputs.replacement.to(plain) * scale + shift, self.kept)
        sides = ((outputs, axis), (inputs, input_axis(layer)))
        self.channels = tuple(channels for channels, _ in sides if channels is not None)
        self._shapes = [along(side, weight) for channels, side in sides if channels is not None]
        self._buffers = {"weight": self._weight.clone()}
        moved = inputs is not None and bool(inputs.replacement.any())
        self._moving = exact if moved else None  # in full precision, because it enters a sum over all inputs
        if norm is not None or moved or not torch.equal(self.ablated, self.kept):  # else the bias stays as it is
            self._buffers["bias"] = self.kept.clone()

    def buffers(self) -> list[Tensor]:
        """Return the tensors that replace weight and bias, the same ones for all masks."""
        return list(self._buffers.values())

    def install(self) -> None:
        """Replace weight and bias by the buffers, with everything kept."""
        self._buffers["weight"].copy_(self._weight)
        if "bias" in self._buffers:
            self._buffers["bias"].copy_(self.kept)
        self.layer._parameters.update(self._buffers)  # type: ignore[arg-type]
        if self._skipped is not None:
            self._skipped.install()

    def restore(self) -> None:
        """Put weight, bias and the batch norm's forward back."""
        self.layer._parameters.update(self._originals)
        if self._skipped is not None:
            self._skipped.restore()

    def set(self, keeps: Sequence[Tensor]) -> None:
        """Write weight and bias under (channels,) masks of the outputs and inputs into the buffers."""
        if any(keep.ndim != 1 for keep in keeps):
            raise AblationError("one mask per row needs Gates(..., use_hooks=True); give one mask instead")
        source, weight = self._weight, self._buffers["weight"]
        for keep, shape in zip(keeps, self._shapes, strict=True):
            source = torch.mul(source, keep.to(weight).view(shape), out=weight)
        if "bias" in self._buffers:
            self._set_bias(self._buffers["bias"].copy_(self.kept), keeps)

    def _set_bias(self, bias: Tensor, keeps: Sequence[Tensor]) -> None:
        if self._moving is not None and self._inputs is not None:
            constants = (1 - keeps[-1].to(bias)) * self._inputs.replacement.to(bias)
            bias.addmv_(self._moving.T if is_conv1d(self.layer) else self._moving, constants)
        if self._outputs is not None:
            keep = keeps[0].to(bias)
            bias.mul_(keep).addcmul_(self.ablated, 1 - keep)

    def confirm(self) -> None:
        """Nothing to confirm: the layer cannot run without reading its weight."""


class FoldedNorm(Gate):
    """Multiplies a layer's weight by the scale of the batch norm that follows it, and removes both biases.

    A `HookGate` on the layer's output adds the constants and applies the mask.

    Attributes:
        layer: The layer.
        kept: (channels,) constants that the batch norm and the layer's bias add to the output of the layer.
        ablated: (channels,) the replacements after the batch norm.

    Args:
        layer: A layer of which `reads_own_weight` is true.
        outputs: The component of each output channel.
        norm: The batch norm that alone follows the layer.
        dtype: As in `LayerGate`.
    """

    layer: nn.Module

    def __init__(self, layer: nn.Module, outputs: Channels, norm: nn.Module, dtype: torch.dtype | None = None) -> None:
        self._gate, self.layer = LayerGate(layer, outputs, None, norm, dtype), layer
        self.kept, self.ablated = self._gate.kept, self._gate.ablated

    def install(self) -> None:
        """Put the scaled weight in place, without a bias, and skip the batch norm."""
        self._gate.install()
        self.layer._parameters["bias"] = None

    def restore(self) -> None:
        """Put weight, bias and the batch norm's forward back."""
        self._gate.restore()

    def set(self, keeps: Sequence[Tensor]) -> None:
        """Nothing to set: the hook on the layer's output applies the mask."""

    def confirm(self) -> None:
        """Nothing to confirm: the layer cannot run without reading its weight."""


class SkippedNorm:
    """Removes a batch norm's effect.

    The forward of torch's own batch norms is replaced. Other classes may do more in their forward, as timm's do with an
    activation, so these get statistics, scales and shifts that change nothing.

    Args:
        norm: The batch norm.
    """

    def __init__(self, norm: nn.Module) -> None:
        self._norm, self._plain = norm, type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        self._forward = {name: value for name, value in vars(norm).items() if name == "forward"}
        mean: Tensor = norm.running_mean  # type: ignore[assignment]
        zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
        variance = ones - _epsilon(norm)
        self._neutral = {"running_mean": zeros, "running_var": variance, "weight": ones, "bias": zeros}
        tables: tuple[dict[str, Any], ...] = (norm._buffers, norm._parameters)
        self._own = [(table, dict(table)) for table in tables]

    def install(self) -> None:
        """Remove the effect."""
        if self._plain:
            self._norm.forward = _unchanged
            return
        for table, own in self._own:
            table.update({name: self._neutral[name] for name in own if name in self._neutral and own[name] is not None})

    def restore(self) -> None:
        """Put forward, statistics, scales and shifts back."""
        for table, own in self._own:
            table.update(own)
        vars(self._norm).pop("forward", None)
        vars(self._norm).update(self._forward)  # some libraries keep a wrapper there


def _epsilon(norm: nn.Module) -> float:
    """Return what a batch norm adds to its variances; frozen ones of transformers do not keep it."""
    return float(getattr(norm, "eps", 1e-5))


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return (channels,) scale and shift of a batch norm in evaluation mode."""
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    variance: Tensor = norm.running_var  # type: ignore[assignment]
    scale = (variance + _epsilon(norm)).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach()  # type: ignore[operator]
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()  # type: ignore[operator]


def _unchanged(x: Tensor) -> Tensor:
    return x


def _accepts(request: GateRequest, gated: GatedSite) -> bool:
    """Return whether a layer's weights can be gated: no hooks are requested and its output is not one component."""
    if request.use_hooks or "module" in gated.sides:
        return False
    return reads_own_weight(request.model.get_submodule(gated.site))


def _build(request: GateRequest, sites: Sequence[GatedSite]) -> list[LayerGate]:
    """Return one gate for each layer, for its outputs and inputs together."""
    gates = []
    for gated in sites:
        outputs, inputs = (
            request.channels(gated, side) if side in gated.sides else None for side in ("output", "input")
        )
        layer, norm = request.model.get_submodule(gated.site), request.batch_norm(gated)
        gates.append(LayerGate(layer, outputs, inputs, norm, request.weight_dtype))
    return gates


WEIGHT_GATES = GateKind(_accepts, _build)
