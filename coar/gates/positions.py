"""Gates in forward hooks that replace what is ablated by constants of each position of a sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coar.errors import AblationError
from coar.gates.building import GatedSite, GateKind, GateRequest
from coar.gates.hook import Hooked, HookPoint, check_features, hook_points


class PositionGate(Hooked):
    """Turns what passes, y, into keep * y + (1 - keep) * constants, one for each channel at each position.

    Args:
        point: Where to hook, with (positions, channels) constants.
    """

    always_arranged = True  # the second axis then holds the positions

    def __init__(self, point: HookPoint) -> None:
        super().__init__(point)
        self._constants = point.channels.replacement  # (positions, channels)
        self._known = (~self._constants.isnan().any(-1)).tolist()  # read at every call, so not on the device

    def _change(self, y: Tensor, keep: Tensor) -> Tensor:
        if y.ndim != 3:
            raise no_positions(self.point.site, f"{tuple(y.shape)} entries")
        if self.point.side == "module":
            check_features(y, self.point.site, self.point.axis, self._constants.shape[-1])
        positions_axis = 3 - self.point.axis % 3
        length = y.shape[positions_axis]
        known = sum(self._known[:length])
        if known < length:
            raise AblationError(
                f"{self.point.site!r} works on sequences of {length} positions, and the calibration examples have "
                f"tokens at {known} of these; give calibration examples that are as long, or cut positions that are "
                f"padding everywhere"
            )
        constants = self._constants[:length] if positions_axis == 1 else self._constants[:length].T
        return torch.lerp(constants.to(y)[None], y, self._broadcast(keep, y), out=self._result_memory(y))


def no_positions(site: str, seen: str) -> AblationError:
    """Return the error for a module whose tensors are not (texts, positions, features)."""
    return AblationError(
        f"{site!r} works on tensors of {seen}; a mean for each position needs (texts, positions, features), with as "
        f"many positions in all batches: exclude it, pad all texts alike, or use Mean(calibration=...)"
    )


def _build(request: GateRequest, sites: Sequence[GatedSite]) -> list[PositionGate]:
    return [PositionGate(point) for gated in sites for point in hook_points(request, gated)]


POSITION_GATES = GateKind(lambda request, _site: request.by_position, _build)
