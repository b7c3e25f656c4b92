"""Gates in the weights: one mask for a whole batch, at no cost per example."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coar.components.layers import TRANSPOSED_CONVOLUTIONS, input_axis, is_conv1d, is_layer, output_axis
from coar.errors import AblationError
from coar.gates.channels import Channels, along


def reads_own_weight(layer: nn.Module) -> bool:
    """Say whether swapping the layer's weight and bias gates it: plain convolutions and linear layers.

    A weight that is offloaded, as accelerate does it, stands on the meta device but while its layer runs.
    """
    if not is_layer(layer) or "bias" not in layer._parameters:
        return False
    weight = layer._parameters.get("weight")
    grouped = isinstance(layer, TRANSPOSED_CONVOLUTIONS) and layer.groups > 1
    return weight is not None and not weight.is_meta and not grouped


class LayerGate:
    """Swaps a layer's weight and bias for gated buffers, with the batch norm that follows folded in if one is given.

    Output channel c then computes keep_c * (scale_c w_c (k x + (1 - k) r) + kept_c) + (1 - keep_c) * ablated_c, where
    k and r are mask and replacements of the input features, and scale and both constants hold what the batch norm
    does, which itself steps aside.

    Attributes:
        layer: The layer.
        channels: Those of the outputs and of the inputs, where there are any, in this order; with neither, the batch
            norm is folded and nothing else.

    Args:
        layer: A layer of which `reads_own_weight` is true.
        outputs: Which component each output channel belongs to; None where none does.
        inputs: Which component each input feature of a linear layer belongs to; None where none does.
        norm: The batch norm that alone follows the layer.
        dtype: Type of the gated weight where the layer's own is float32, such as the one that autocast would turn it
            into on every forward; by default float32.
    """

    def __init__(
        self,
        layer: nn.Module,
        outputs: Channels | None,
        inputs: Channels | None,
        norm: nn.Module | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.layer, self._norm = layer, norm
        self._forward = {name: value for name, value in vars(norm).items() if name == "forward"} if norm else {}
        self._outputs, self._inputs = outputs, inputs
        self._originals = {name: layer._parameters[name] for name in ("weight", "bias")}
        weight, bias = self._originals["weight"], self._originals["bias"]
        if weight is None:
            raise AblationError(f"{type(layer).__name__} has no weight of its own to gate; use through_outputs")
        axis = output_axis(layer)
        plain = weight.new_zeros(weight.shape[axis]) if bias is None else bias.detach()
        scale, shift = _affine(norm) if norm is not None else (torch.ones_like(plain), torch.zeros_like(plain))
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
        self._moving = exact if moved else None  # in full precision, since a sum over all inputs is taken of it
        if norm is not None or moved or not torch.equal(self.ablated, self.kept):  # else the bias stays as it is
            self._buffers["bias"] = self.kept.clone()

    @property
    def buffers(self) -> list[Tensor]:
        """The tensors that stand in the place of weight and bias, the same ones for all masks."""
        return list(self._buffers.values())

    def install(self) -> None:
        """Put the buffers in the place of weight and bias, with everything kept."""
        self._buffers["weight"].copy_(self._weight)
        if "bias" in self._buffers:
            self._buffers["bias"].copy_(self.kept)
        self.layer._parameters.update(self._buffers)  # type: ignore[arg-type]
        if self._norm is not None:
            self._norm.forward = _unchanged

    def restore(self) -> None:
        """Put weight and bias back, and the batch norm to work."""
        self.layer._parameters.update(self._originals)
        if self._norm is not None:
            vars(self._norm).pop("forward", None)
            vars(self._norm).update(self._forward)  # some libraries keep a wrapper there

    def set(self, keeps: Sequence[Tensor]) -> None:
        """Write into the buffers what (channels,) masks of the outputs and inputs make of weight and bias."""
        if any(keep.ndim != 1 for keep in keeps):
            raise AblationError("one mask per row needs Gates(..., through_outputs=True); give one mask instead")
        source, weight = self._weight, self._buffers["weight"]
        for keep, shape in zip(keeps, self._shapes, strict=True):
            source = torch.mul(source, keep.to(weight.dtype).view(shape), out=weight)
        if "bias" in self._buffers:
            self._set_bias(self._buffers["bias"].copy_(self.kept), keeps)

    def _set_bias(self, bias: Tensor, keeps: Sequence[Tensor]) -> None:
        if self._moving is not None and self._inputs is not None:
            constants = (1 - keeps[-1].to(bias.dtype)) * self._inputs.replacement.to(bias.dtype)
            bias.addmv_(self._moving.T if is_conv1d(self.layer) else self._moving, constants)
        if self._outputs is not None:
            keep = keeps[0].to(bias.dtype)
            bias.mul_(keep).addcmul_(self.ablated, 1 - keep)

    def confirm(self) -> None:
        """Nothing to confirm: the layer cannot run without reading its weight."""


class FoldedNorm:
    """Multiplies a layer's weight by what a batch norm that follows it scales by, and takes both biases away.

    Attributes:
        layer: The layer.
        channels: None, since the hook on the layer's output applies the mask.
        kept: (channels,) constants that the batch norm and the layer's bias add to what the layer then returns.
        ablated: (channels,) what the batch norm makes of the replacements.

    Args:
        layer: A layer of which `reads_own_weight` is true.
        outputs: Which component each output channel belongs to.
        norm: The batch norm that alone follows the layer.
        dtype: As in `LayerGate`.
    """

    channels: tuple[Channels, ...] = ()

    def __init__(self, layer: nn.Module, outputs: Channels, norm: nn.Module, dtype: torch.dtype | None = None) -> None:
        self._gate, self.layer = LayerGate(layer, outputs, None, norm, dtype), layer
        self.kept, self.ablated = self._gate.kept, self._gate.ablated

    def install(self) -> None:
        """Put the scaled weight in place, without a bias, and let the batch norm step aside."""
        self._gate.install()
        self.layer._parameters["bias"] = None

    def restore(self) -> None:
        """Put weight and bias back, and the batch norm to work."""
        self._gate.restore()

    def set(self, keeps: Sequence[Tensor]) -> None:
        """Nothing to set: the hook on the layer's output applies the mask."""

    def confirm(self) -> None:
        """Nothing to confirm: the layer cannot run without reading its weight."""


class LowWeight:
    """Holds a layer's weight that is not gated in the type that autocast would turn it into on every forward.

    Attributes:
        channels: None.
        weight: The weight in that type.

    Args:
        layer: A layer of which `reads_own_weight` is true.
        dtype: The type.
    """

    channels: tuple[Channels, ...] = ()

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self._layer, self._original = layer, layer.get_parameter("weight")
        self.weight = self._original.detach().to(dtype)

    def install(self) -> None:
        """Put the weight of that type in place."""
        self._layer._parameters["weight"] = self.weight  # type: ignore[assignment]

    def restore(self) -> None:
        """Put the weight back."""
        self._layer._parameters["weight"] = self._original

    def set(self, keeps: Sequence[Tensor]) -> None:
        """Nothing to set: no component is in this weight."""

    def confirm(self) -> None:
        """Nothing to confirm: no component is in this weight."""


class SliceGate:
    """Zeroes slices of a parameter in place, since a bare parameter may be read in any way, and puts them back.

    Attributes:
        channels: Which component each position along the axis belongs to.

    Args:
        parameter: The parameter.
        axis: Its axis along which the slices lie.
        channels: Which component each position along the axis belongs to.
    """

    def __init__(self, parameter: nn.Parameter, axis: int, channels: Channels) -> None:
        self._live = parameter.detach()
        self._kept = self._live.clone()
        self._shape = along(axis, self._live)
        self.channels: tuple[Channels, ...] = (channels,)

    def install(self) -> None:
        """Nothing to install before the first mask."""

    def restore(self) -> None:
        """Put the parameter's values back."""
        self._live.copy_(self._kept)

    def set(self, keeps: Sequence[Tensor]) -> None:
        """Zero what the (positions,) mask ablates."""
        (keep,) = keeps
        if keep.ndim != 1:
            raise AblationError("a parameter slice cannot have one mask per row of the batch; give one mask instead")
        torch.mul(self._kept, keep.to(self._kept.dtype).view(self._shape), out=self._live)

    def confirm(self) -> None:
        """Nothing to confirm: whatever reads the parameter reads it zeroed."""


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
