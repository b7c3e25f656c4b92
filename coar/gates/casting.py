"""Weights without gates, held in the type that autocast would convert them to on every forward."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coar.components.table import Components
from coar.gates.gate import Gate
from coar.gates.weight import reads_own_weight

CASTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # only the layer itself reads its weight


class CastWeight(Gate):
    """Replaces the weight of a layer by the same weight in another type.

    Attributes:
        layer: The layer.

    Args:
        layer: A layer of which `reads_own_weight` is true.
        dtype: The type.
    """

    layer: nn.Module

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self.layer, self._original = layer, layer.get_parameter("weight")
        self._weight = self._original.detach().to(dtype)

    def buffers(self) -> list[Tensor]:
        """Return the weight in that type."""
        return [self._weight]

    def install(self) -> None:
        """Put the weight of that type in place."""
        self.layer._parameters["weight"] = self._weight  # type: ignore[assignment]

    def restore(self) -> None:
        """Put the original weight back."""
        self.layer._parameters["weight"] = self._original

    def set(self, keeps: Sequence[Tensor]) -> None:
        """Nothing to set: no component is in this weight."""

    def confirm(self) -> None:
        """Nothing to confirm: no component is in this weight."""


def cast_weights(
    model: nn.Module, components: Components, gates: Sequence[Gate], dtype: torch.dtype
) -> list[CastWeight]:
    """Return casts of the float32 weights of linear layers and convolutions.

    Weights that a gate replaces or that parameter slices cut are left out.

    Args:
        model: The model.
        components: The components that are gated.
        gates: Their gates.
        dtype: The type.
    """
    gated = {gate.layer for gate in gates}
    sliced = {id(model.get_parameter(site)) for site, side, _ in components.sites() if side == "parameter"}
    return [
        CastWeight(layer, dtype)
        for layer in model.modules()
        if type(layer) in CASTABLE and layer not in gated and reads_own_weight(layer)
        if layer.weight.dtype == torch.float32 and id(layer.weight) not in sliced
    ]
