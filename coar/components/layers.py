"""What counts as a layer, and how many inputs and outputs it has; layers that all experts of a mixture stack."""

import inspect
import sys
from typing import NamedTuple

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAST = ("down_proj", "w2", "wo", "fc2", "output_linear", "c_proj")  # what an expert's last projection is called


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside what `torch.compile`, `DataParallel` and `DistributedDataParallel` return."""
    dynamo = sys.modules.get("torch._dynamo")  # imported by `torch.compile`, in seconds; without it nothing is compiled
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif dynamo is not None and isinstance(model, dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def is_conv1d(module: nn.Module) -> bool:
    """Say whether a module is transformers' `Conv1D`: a linear layer whose weight is (inputs, outputs)."""
    named = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
    weight = getattr(module, "weight", None)
    return named and isinstance(weight, Tensor) and tuple(weight.shape[1:]) == (getattr(module, "nf", None),)


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is a matrix over the last axis of its input: an `nn.Linear` or transformers' `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_layer(module: nn.Module) -> bool:
    """Say whether a module is a convolution or a linear layer."""
    return isinstance(module, CONVOLUTIONS) or is_linear(module)


def output_channels(module: nn.Module) -> int:
    """Return how many output rows a convolution or linear layer has, 0 for any other module."""
    if is_conv1d(module):
        return int(module.nf)  # type: ignore[arg-type]
    return int(getattr(module, "out_channels", 0) or getattr(module, "out_features", 0))


def output_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's weight along which its outputs lie; for grouped transposed ones, within a group."""
    return 1 if isinstance(layer, TRANSPOSED_CONVOLUTIONS) or is_conv1d(layer) else 0


def input_channels(module: nn.Module) -> int:
    """Return how many input features an `nn.Linear` or `Conv1D` reads, 0 for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.weight.shape[0] if is_conv1d(module) else 0  # type: ignore[return-value, index]


def input_axis(layer: nn.Module) -> int:
    """Return the axis of a linear layer's weight along which its input features lie."""
    return 0 if is_conv1d(layer) else 1


class Stack(NamedTuple):
    """The last projections of all experts of a mixture, kept in one parameter.

    Attributes:
        name: What the parameter is called.
        weight: It itself, (experts, ..., ...).
        bias: (experts, features) biases; None where there are none.
        features: How many features an expert returns.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    features: int


def stack_of(mixture: nn.Module) -> Stack | None:
    """Return the last projections that a mixture stacks; None where it does not, or does not weigh its experts.

    A mixture that weighs them is called as those of transformers are: with the states of tokens, the experts that each
    token is sent to, and their weights.
    """
    names = [name for name in LAST if (p := mixture._parameters.get(name)) is not None and p.ndim == 3]
    if len(names) != 1 or len(inspect.signature(type(mixture).forward).parameters) != 4:
        return None
    (name,) = names
    weight, bias = mixture.get_parameter(name), mixture._parameters.get(f"{name}_bias")
    features = weight.shape[2 if getattr(mixture, "is_transposed", False) else 1] if bias is None else bias.shape[1]
    return Stack(name, weight, bias, features)
