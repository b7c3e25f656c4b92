"""A model of the table: how to make it, its inputs, and how its library saves and loads it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import coar

ROWS = 4  # examples of a study
SETTLING = range(7, 15)  # seeds of the inputs that batch norms take their statistics from
LEAST_VARIANCE = 0.25  # of a channel in a batch norm, relative to the mean of all channels
LEAST = 0.5  # a weight whose deviation is a smaller multiple of 1 / sqrt(inputs) is drawn again


@dataclass(frozen=True)
class Subject:
    """A small model with random weights.

    Attributes:
        name: Its name, unique within the library.
        library: The library that defines it.
        make: Makes it, with random weights.
        inputs: Makes (ROWS, ...) inputs from a seed: a tensor, or tensors by the name of an argument.
        saved: Saves an edited model for the library to load, and returns code that loads it without this package.
    """

    name: str
    library: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    saved: Callable[[coar.Edit, nn.Module, coar.Examples, Path], str]

    def model(self) -> nn.Module:
        """Make the model in evaluation mode, with weights, scales and statistics of which none is trivially 0 or 1."""
        torch.manual_seed(0)
        model = self.make().eval().requires_grad_(False)
        lively(model)
        settle(model, joined([self.inputs(seed) for seed in SETTLING]))
        return model.eval()


def by_state_dict(edit: coar.Edit, model: nn.Module, examples: coar.Examples, path: Path) -> str:
    """Save a state dict; return the code that loads it into a new model."""
    return edit.save_state_dict(model, path.with_suffix(".safetensors"), examples).loading


def by_pretrained(edit: coar.Edit, model: nn.Module, examples: coar.Examples, path: Path) -> str:
    """Save a folder as transformers and diffusers do; return the code that loads it."""
    return edit.save_pretrained(model, path, examples).loading


def numbers(*shape: int) -> Callable[[int], Tensor]:
    """Return a maker of normal numbers, (ROWS, *shape)."""
    return lambda seed: torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(seed))


def joined(inputs: list[Any]) -> Any:
    """Return several inputs as one batch."""
    if isinstance(inputs[0], dict):
        return {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
    return torch.cat(inputs)


def lively(model: nn.Module) -> None:
    """Draw weights again that are zero, constant or very small, so that every layer has an effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim >= 2:
                fan = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
                if float(parameter.std()) * math.sqrt(fan) < LEAST:
                    drawn = torch.randn(parameter.shape, generator=generator) / math.sqrt(fan)
                    parameter.copy_(drawn)
            elif parameter.numel() > 1 and float(parameter.std()) < 0.05:
                drawn = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(drawn * 0.6 - 0.3 if float(parameter.mean().abs()) < 1e-9 else drawn + 0.5)


def settle(model: nn.Module, inputs: Any) -> None:
    """Take the running statistics of batch norms from a pass."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_var is not None]
    if not norms:
        return

    def measured(norm: Any, args: tuple[Tensor, ...]) -> None:
        values = args[0].transpose(0, 1).flatten(1)
        norm.running_mean.copy_(values.mean(1))
        norm.running_var.copy_(values.var(1).clamp_min(LEAST_VARIANCE * float(values.var(1).mean())))

    handles = [norm.register_forward_pre_hook(measured) for norm in norms]
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    for handle in handles:
        handle.remove()
