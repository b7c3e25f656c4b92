"""What counts as a layer, and how many inputs and outputs it has."""

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside what `torch.compile`, `DataParallel` and `DistributedDataParallel` return."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
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
