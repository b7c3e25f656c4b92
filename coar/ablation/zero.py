"""Ablation by zeros: of weights, as published, or of activations."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from coar.ablation.base import Ablation
from coar.components.layers import expert_stack_of
from coar.components.table import Components, Side
from coar.errors import AblationError


class ZeroWeight(Ablation):
    """Zero a component's weights and keep its bias, the ablation of Shah et al. (2024).

    r_j = b_j, the bias of the layer, for an output and for an expert, whose bias is that of its last projection;
    r_j = 0 for an output without a bias and for an input.
    """

    label: ClassVar[str] = "zero"

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:  # noqa: ARG002
        """Return each channel's bias, 0 where it has none.

        Raises:
            AblationError: For a whole module.
        """
        values = torch.zeros(components.width)
        for (site, side, _), indices in components.sites().items():
            if side == "module":
                raise AblationError(
                    f"{components[indices[0]].name!r} is a whole module, whose weights and biases belong to many "
                    f"layers; use ZeroActivation() or Resample()"
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
    """Return the (outputs,) bias of a layer or the (experts, features) biases of experts; None without one."""
    stack = expert_stack_of(module) if side == "expert" else None
    bias = stack.bias if stack else module.bias
    return bias if isinstance(bias, Tensor) else None


class ZeroActivation(Ablation):
    """Replace what a component computes by zero, its bias included: r_j = 0. A slice of a parameter is zeroed."""

    label: ClassVar[str] = "zero_activation"

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:  # noqa: ARG002
        """Return zeros."""
        return torch.zeros(components.width)
