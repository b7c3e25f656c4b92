"""Layers: which modules count as one, their inputs and outputs, and the stacked layers of a mixture of experts."""

import inspect
import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAST_PROJECTIONS = ("down_proj", "w2", "wo", "fc2", "output_linear", "c_proj")  # names of an expert's last projection


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    dynamo = sys.modules.get("torch._dynamo")  # imported by `torch.compile`, in seconds; without it nothing is compiled
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif dynamo is not None and isinstance(model, dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' `Conv1D`: a linear layer whose weight is (inputs, outputs)."""
    named = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
    weight = getattr(module, "weight", None)
    return named and isinstance(weight, Tensor) and tuple(weight.shape[1:]) == (getattr(module, "nf", None),)


def in_vmap(value: Tensor) -> bool:
    """Return whether a tensor is one of torch.func, inside of vmap, which nothing outside may keep."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def is_dense(weight: object) -> bool:
    """Return whether a weight is an ordinary tensor of numbers, which can be read and changed.

    Weights that quantisation packs into bytes or into floats of 8 bits are not, nor are those of a class of parameters
    of its own, as in bitsandbytes, or of a class of tensors that consist of others, as in torchao.
    """
    kind = type(weight)
    of_its_own = issubclass(kind, nn.Parameter) and kind is not nn.Parameter
    return (
        isinstance(weight, Tensor)
        and not of_its_own
        and not hasattr(kind, "__tensor_flatten__")
        and weight.layout is torch.strided
        and not weight.is_quantized
        and (weight.is_complex() or (weight.is_floating_point() and torch.finfo(weight.dtype).bits >= 16))
    )


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a matrix over the last axis of its input.

    That is an `nn.Linear`, transformers' `Conv1D`, or a quantised layer with the attributes of an `nn.Linear`.
    """
    return isinstance(module, nn.Linear) or is_conv1d(module) or _is_packed_linear(module)


def _is_packed_linear(module: nn.Module) -> bool:
    """Return whether a module has a linear layer's name and sizes, and a weight that is no ordinary tensor."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (
        "linear" in type(module).__name__.lower()
        and all(type(size) is int for size in sizes)
        and not is_dense(module._parameters.get("weight"))
        and not any(hasattr(child, "out_features") for child in module.children())  # else a wrapper of a layer
    )


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is a convolution or a linear layer."""
    return isinstance(module, CONVOLUTIONS) or is_linear(module)


def output_channels(module: nn.Module) -> int:
    """Return the number of outputs of a convolution or linear layer, 0 for any other module."""
    if is_conv1d(module):
        return int(module.nf)  # type: ignore[arg-type]
    return int(getattr(module, "out_channels", 0) or getattr(module, "out_features", 0))


def output_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's weight along which its outputs lie; for grouped transposed ones, within a group."""
    return 1 if isinstance(layer, TRANSPOSED_CONVOLUTIONS) or is_conv1d(layer) else 0


def input_channels(module: nn.Module) -> int:
    """Return the number of input features of a linear layer, 0 for any other module."""
    if is_conv1d(module):
        return int(module.weight.shape[0])  # type: ignore[index]
    return int(module.in_features) if is_linear(module) else 0  # type: ignore[arg-type]


def input_axis(layer: nn.Module) -> int:
    """Return the axis of a linear layer's weight along which its input features lie."""
    return 0 if is_conv1d(layer) else 1


class ExpertStack(NamedTuple):
    """The last projections of all experts of a mixture, kept in one parameter.

    Attributes:
        name: Name of the parameter.
        weight: The parameter, (experts, ..., ...).
        bias: (experts, features) biases; None where there are none.
        features: Number of features that an expert returns.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    features: int


def expert_stack_of(mixture: nn.Module) -> ExpertStack | None:
    """Return the stacked last projections of a mixture; None where there are none or the mixture gets no weights.

    A mixture that weights its experts has the signature of those of transformers: the states of tokens, the experts
    that each token is sent to, and their weights.
    """
    names = [name for name in LAST_PROJECTIONS if (p := mixture._parameters.get(name)) is not None and p.ndim == 3]
    if len(names) != 1 or len(inspect.signature(type(mixture).forward).parameters) != 4:
        return None
    (name,) = names
    weight, bias = mixture.get_parameter(name), mixture._parameters.get(f"{name}_bias")
    features = weight.shape[2 if getattr(mixture, "is_transposed", False) else 1] if bias is None else bias.shape[1]
    return ExpertStack(name, weight, bias, features)
