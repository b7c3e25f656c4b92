"""Gates in forward hooks that replace what is ablated by the activations of resample sources."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coar.errors import AblationError
from coar.gates.building import GatedSite, GateKind, GateRequest
from coar.gates.gate import Gate
from coar.gates.hook import Hooked, HookPoint, hook_points
from coar.gates.layouts import USUAL
from coar.gates.weight import LayerGate


class ResampleGate(Hooked):
    """Turns what passes, y, into keep * y + (1 - keep) * the source's activations at the same call.

    Args:
        point: Where to hook.
    """

    def __init__(self, point: HookPoint) -> None:
        super().__init__(point)
        self._sources: list[Tensor] = []  # (rows, ...), one for every call of the module in a forward pass
        self._recording = False
        self._calls = 0

    def install(self) -> None:
        """Register the hook; nothing is recorded yet."""
        self._sources = []
        super().install()

    def restore(self) -> None:
        """Remove the hook and free the recorded activations."""
        self._sources = []
        super().restore()

    def set(self, keeps: Sequence[Tensor]) -> None:
        """Take the (channels,) mask, or the (rows, channels) masks, of the next forward."""
        self._calls = 0
        super().set(keeps)

    def record(self, on: bool) -> None:
        """Start to record the activations that pass, in place of those recorded before; or stop."""
        if on:
            self._sources = []
        self._recording = on

    def _pass(self, y: Tensor) -> Tensor:
        if not self._recording:
            return super()._pass(y)
        self._sources.append(y.detach().clone())  # a layer that follows may write into y
        return y

    def _change(self, y: Tensor, keep: Tensor) -> Tensor:
        site, side = self.point.site, self.point.side
        if not self._sources:
            raise AblationError(
                f"no resample sources were recorded at {site!r}; call Gates.record before a forward pass"
            )
        source = self._sources[self._calls % len(self._sources)]
        self._calls += 1
        layout = self.point.layout
        if layout != USUAL and self._keep is not None and keep.ndim > 1:  # y is arranged then
            source = layout.arranged(source, max(1, len(y) // len(self._keep)))
        if len(source) and len(y) != len(source) and len(y) % len(source) == 0:  # several masks share a forward
            source = source.repeat(len(y) // len(source), *[1] * (y.ndim - 1))
        if source.shape != y.shape:
            raise AblationError(
                f"the {side} of {site!r} has shape {tuple(y.shape)} for the examples and {tuple(source.shape)} for "
                f"their resample sources; resampling needs activations of one shape: pad all examples alike, or "
                f"exclude that module from the components"
            )
        return torch.lerp(source, y, self._broadcast(keep, y), out=self._result_memory(y))


def _build(request: GateRequest, sites: Sequence[GatedSite]) -> list[Gate]:
    """Return a hook for each gated side; a batch norm that follows is folded first, so hooks see what it returns."""
    gates: list[Gate] = []
    for gated in sites:
        norm = request.batch_norm(gated)
        if norm is not None:
            gates.append(LayerGate(request.model.get_submodule(gated.site), None, None, norm))
        gates += [ResampleGate(point) for point in hook_points(request, gated)]
    return gates


RESAMPLE_GATES = GateKind(lambda request, _site: request.resample, _build)
