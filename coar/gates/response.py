"""How a layer responds to its weight and bias: as a convolution or linear layer does, by its type or by a measurement.

Some layers compute their weight anew in every forward pass, such as the weight-standardised convolutions of BiT and
NFNet: half a row of the parameter is then not half the output, so neither gates nor edits in part can use it. Others do
not read the parameter that a gate replaces, or have a hook of their owner that changes what they return.
"""

import math
from copy import deepcopy
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from coar.components.layers import CONVOLUTIONS, input_axis, input_channels, is_linear, output_axis, output_channels
from coar.gates.channels import along

PLAIN = {kind.forward for kind in (*CONVOLUTIONS, nn.Linear)} | {nn.modules.conv._ConvNd.forward}
PLAIN_STEPS = {kind._conv_forward for kind in CONVOLUTIONS if hasattr(kind, "_conv_forward")}
FACTORS = (0.5, 0.0)
ALLOWED = 1e-3  # difference of two responses, relative to the largest
Side = Literal["output", "input"]
_measured: WeakKeyDictionary[nn.Module, tuple[object, bool]] = WeakKeyDictionary()


def is_proportional(layer: nn.Module) -> bool:
    """Return whether a factor on rows of the weight is a factor on the output, less the bias; the same for columns.

    Layers with a forward pass of torch or transformers are; of others it is measured once, on random numbers. Layers
    with a hook of the model's owner, which may change what they return, count as if they were not.

    Args:
        layer: A convolution or linear layer with a weight and a bias or None among its parameters.
    """
    kind, own = type(layer), vars(layer).get("forward")
    usual = kind.forward in PLAIN or kind.__module__ == "transformers.pytorch_utils"
    hooks = [hook for table in _hooks(layer) for hook in table.values() if not _is_own(hook)]
    if hooks:
        return False
    if own is None and usual and getattr(kind, "_conv_forward", None) in PLAIN_STEPS | {None}:
        return True
    if layer not in _measured or _measured[layer][0] is not own:
        sides: tuple[Side, ...] = ("output", "input") if is_linear(layer) else ("output",)
        _measured[layer] = own, all(responds(layer, side, FACTORS) for side in sides)
    return _measured[layer][1]


def responds(layer: nn.Module, side: Side, factors: tuple[float, ...]) -> bool:
    """Return whether a layer's output follows factors on its weight, and a change of its bias.

    It is measured on a copy, with random numbers; a layer that fails on these does not follow.

    Args:
        layer: A convolution or linear layer with a weight and a bias or None among its parameters.
        side: Whether the factors are on the rows of the weight, or on the columns of a linear layer.
        factors: The factors.
    """
    try:
        return _follows(_without_own_hooks(deepcopy(layer)), side, factors)
    except Exception:  # whatever a layer may raise: it cannot be shown to follow
        return False


def _hooks(layer: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return layer._forward_pre_hooks, layer._forward_hooks


def _is_own(hook: Any) -> bool:
    """Return whether a hook is one of this package, which change nothing or are gates."""
    function = getattr(hook, "func", hook)  # of a partial
    return str(getattr(function, "__module__", "")).startswith("coar.")


def _without_own_hooks(layer: nn.Module) -> nn.Module:
    for table in _hooks(layer):
        for key in [key for key, hook in table.items() if _is_own(hook)]:
            del table[key]
    return layer


def _follows(layer: nn.Module, side: Side, factors: tuple[float, ...]) -> bool:
    weight, bias = layer.get_parameter("weight").detach(), layer._parameters["bias"]
    x, channels = _random_input(layer, weight), -1 if is_linear(layer) else 1
    plain = weight.new_zeros(output_channels(layer)) if bias is None else bias.detach()

    def run(of_weight: Tensor, of_bias: Tensor | None, given: Tensor = x) -> Tensor:
        layer._parameters.update({"weight": of_weight, "bias": of_bias})  # type: ignore[dict-item]
        with torch.inference_mode():
            y: Tensor = layer(given)
            return y.double().movedim(channels, -1)

    y = run(weight, bias if bias is None else plain)
    nothing = run(torch.zeros_like(weight), plain)
    size = float((y - nothing).abs().max())
    allowed = max(ALLOWED, 8 * torch.finfo(weight.dtype).eps) * size
    if not 0 < size < math.inf or (run(weight, plain + 1) - y - 1).abs().max() > allowed + ALLOWED:
        return False
    axis = output_axis(layer) if side == "output" else input_axis(layer)
    for factor in factors:
        of_channels = weight.new_ones(weight.shape[axis])
        of_channels[::2] = factor
        found = run(weight * of_channels.view(along(axis, weight)), plain)
        if side == "input":
            expected = run(weight, plain, x * of_channels)
        elif len(of_channels) == y.shape[-1]:
            expected = nothing + (y - nothing) * of_channels.double()
        else:  # the rows of grouped transposed convolutions lie within a group
            return False
        if (found - expected).abs().max() > allowed:
            return False
    return True


def _random_input(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return two random inputs, as small as the layer takes them."""
    if is_linear(layer):
        shape: tuple[int, ...] = (2, input_channels(layer))
    else:
        sizes = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)  # type: ignore[arg-type]
        shape = (2, int(layer.in_channels), *(int(d * (k - 1) + s + 1) for k, d, s in sizes))  # type: ignore[arg-type]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
