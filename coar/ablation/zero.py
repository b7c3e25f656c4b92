"""Ablation by zeros: of weights, as published, or of activations."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from coar.ablation.base import Ablation
from coar.components.layers import stack_of
from coar.components.table import Components, Side
from coar.errors import AblationError


class ZeroWeight(Ablation):
    """Zero a component's weights and keep its bias, as published (Shah et al. 2024).

    An output becomes the bias, and an expert that of its last projection; an input counts as 0.
    """

    label: ClassVar[str] = "zero"

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:  # noqa: ARG002
        """Return each channel's bias, 0 where it has none; raise `AblationError` for a whole module."""
        values = torch.zeros(components.width)
        for (site, side, _), indices in components.sites().items():
            if side == "module":
                raise AblationError(
                    f"{components[indices[0]].name!r} is a whole module, whose weights and biases are many layers'; "
                    f"use ZeroActivation() or Resample()"
                )
            if side == "edge":
                raise AblationError(
                    f"{components[indices[0]].name!r} is an edge, or a writer of edges, and has no weights of its own "
                    f"to zero; use ZeroActivation(), Mean(calibration=...) or Resample()"
                )
            bias = _bias(model.get_submodule(site), side) if side in ("output", "expert") else None
            if bias is not None:
                flat = bias.detach().float().cpu().flatten()
                values[components.channels_of(indices)] = flat[components.positions_of(indices)]
        return values


def _bias(module: nn.Module, side: Side) -> Tensor | None:
    """Return the bias of a layer's outputs, or (experts, features) those of experts; None where there is none."""
    stack = stack_of(module) if side == "expert" else None
    bias = stack.bias if stack else module.bias
    return bias if isinstance(bias, Tensor) else None


class ZeroActivation(Ablation):
    """Replace what a component computes by 0, its bias included; a slice of a parameter is zeroed."""

    label: ClassVar[str] = "zero_activation"

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:  # noqa: ARG002
        """Return zeros."""
        return torch.zeros(components.width)
