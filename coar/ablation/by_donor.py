"""Gates that put another example's activations in the place of what is ablated."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coar.ablation.by_hook import Hooked
from coar.errors import AblationError


class DonorGate(Hooked):
    """Turns what passes, y, into keep * y + (1 - keep) * what the donors' plain pass held at the same call."""

    _recording = False
    _calls = 0

    def install(self) -> None:
        """Register the hook; nothing is recorded yet."""
        self._donors: list[Tensor] = []  # (rows, ...), one for every call of the module in a forward pass
        super().install()

    def restore(self) -> None:
        """Remove the hook and forget the donors."""
        self._donors = []
        super().restore()

    def set(self, keeps: Sequence[Tensor]) -> None:
        """Take the (channels,) mask, or the (rows, channels) masks, of the next forward."""
        self._calls = 0
        super().set(keeps)

    def record(self, on: bool) -> None:
        """Begin to keep what passes, in the place of what was kept before; or stop."""
        if on:
            self._donors = []
        self._recording = on

    def _pass(self, y: Tensor) -> Tensor:
        if not self._recording:
            return super()._pass(y)
        self._donors.append(y.detach().clone())  # a layer that follows may write into y
        return y

    def _change(self, y: Tensor, keep: Tensor) -> Tensor:
        if not self._donors:
            raise AblationError(f"no donors were recorded at {self.site!r}; call Gates.record before a forward pass")
        donor = self._donors[self._calls % len(self._donors)]
        self._calls += 1
        if len(donor) and len(y) != len(donor) and len(y) % len(donor) == 0:  # several masks share a forward
            donor = donor.repeat(len(y) // len(donor), *[1] * (y.ndim - 1))
        if donor.shape != y.shape:
            raise AblationError(
                f"the {self._side} of {self.site!r} has shape {tuple(y.shape)} for the examples and "
                f"{tuple(donor.shape)} for their donors; resampling needs activations of one shape: pad all examples "
                f"alike, or exclude that module from the components"
            )
        return torch.lerp(donor, y, self._laid(y, keep), out=self._room(y))
