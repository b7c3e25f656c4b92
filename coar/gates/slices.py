"""Gates on slices of a parameter, which they zero in place."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coar.components.layers import is_dense
from coar.errors import AblationError
from coar.gates.building import GatedSite, GateKind, GateRequest
from coar.gates.channels import Channels, along
from coar.gates.gate import Gate


class SliceGate(Gate):
    """Zeroes slices of a parameter in place and puts their values back.

    The parameter is changed in place because a model may read a bare parameter in any way.

    Attributes:
        channels: The component of each position along the axis.

    Args:
        parameter: The parameter.
        axis: Its axis along which the slices lie.
        channels: The component of each position along the axis.
    """

    def __init__(self, parameter: nn.Parameter, axis: int, channels: Channels) -> None:
        self._live = parameter.detach()
        self._kept = self._live.clone()
        self._shape = along(axis, self._live)
        self.channels = (channels,)

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
        torch.mul(self._kept, keep.to(self._kept).view(self._shape), out=self._live)

    def confirm(self) -> None:
        """Nothing to confirm: whatever reads the parameter reads the zeros."""


def _build(request: GateRequest, sites: Sequence[GatedSite]) -> list[SliceGate]:
    """Return one gate for each parameter; raise `AblationError` where the request needs hooks."""
    gates = []
    for gated in sites:
        rows = list(gated.sides["parameter"])
        first = request.components[rows[0]]
        if request.use_hooks or request.resample or request.by_position:
            raise AblationError(
                f"{first.name!r} is a parameter slice: it has no output to gate per row, to resample or to take "
                f"gradients through; use conv_filters, neurons, input_features or attention_heads"
            )
        parameter = request.model.get_parameter(gated.site)
        if not is_dense(parameter):
            raise AblationError(
                f"the parameter {gated.site!r} is a {type(parameter).__name__} of {parameter.dtype}, and slices of a "
                f"quantised weight cannot be zeroed; use neurons or input_features"
            )
        length = parameter.shape[first.axis]
        channels = Channels.of(length, request.components, rows, request.replacements)
        gates.append(SliceGate(parameter, first.axis, channels))
    return gates


SLICE_GATES = GateKind(lambda _request, gated: "parameter" in gated.sides, _build)
