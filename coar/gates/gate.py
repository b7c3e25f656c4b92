"""The base of every gate: an object that applies the current mask to components during forward passes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from coar.errors import AblationError
from coar.gates.channels import Channels


class Gate(ABC):
    """Applies masks to some components of a model from `install` to `restore`.

    Attributes:
        channels: The channels that `set` takes masks for: one entry for each side of the site that is gated.
        hooked_sites: Paths of the modules that the model must call for the gate to act.
        layer: The layer whose weight the gate replaces while it is installed; None where it replaces none.
    """

    channels: tuple[Channels, ...] = ()
    hooked_sites: tuple[str, ...] = ()
    layer: nn.Module | None = None

    @abstractmethod
    def install(self) -> None:
        """Change the model so that it runs with every component kept."""

    @abstractmethod
    def restore(self) -> None:
        """Leave the model as it was before `install`."""

    @abstractmethod
    def set(self, keeps: Sequence[Tensor]) -> None:
        """Take the masks of the forwards that follow, one (channels,) or (rows, channels) mask per entry of `channels`.

        Raises:
            AblationError: When the gate cannot apply one mask per row.
        """

    @abstractmethod
    def confirm(self) -> None:
        """Raise `AblationError` when forward passes ran since `install` and none passed the gate."""

    def replace(self, constants: Sequence[Tensor]) -> None:  # noqa: ARG002
        """Take other (channels,) constants, one tensor per entry of `channels`; gradients reach them.

        Raises:
            AblationError: When the gate's constants are part of a weight, or belong to positions or examples.
        """
        raise AblationError("only hooks can take other constants; give Gates(..., use_hooks=True)")

    def record(self, on: bool) -> None:  # noqa: B027 - only gates that resample record
        """Start to record the activations that pass, in place of those recorded before; or stop."""

    def buffers(self) -> list[Tensor]:
        """Return the tensors that replace parameters while the gate is installed; masks are written into them."""
        return []
