"""What replaces an ablated component: one constant each, computed once per run, or another example's activations."""

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from coar.components.table import Components
from coar.examples import Examples
from coar.settings import Settings


class Ablation(Settings):
    """Base of all ablations.

    Attributes:
        label: The word for this ablation in commands and file names.
    """

    label: ClassVar[str]

    @abstractmethod
    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:
        """Return (components.width,) float32 constants on the CPU, one per channel of every component in table order.

        They are NaN where no constant replaces the component.

        Args:
            model: The model in evaluation mode; its device is used.
            components: The components to replace.
            batch_size: Most examples per forward pass, where passes are needed.
        """

    def sources(self, examples: int) -> np.ndarray | None:  # noqa: ARG002
        """Return (examples,) positions of those whose activations replace each example's; None for constants."""
        return None

    def settings(self) -> dict[str, Any]:
        """Return the name and settings that identify this ablation in a run's fingerprint."""
        return {"name": type(self).__name__, **self.model_dump(mode="json")}


class Calibrated(Ablation):
    """Base of the ablations whose constants are computed from calibration examples.

    Attributes:
        calibration: The examples to compute them from; apart from those used to test, so that nothing leaks.
    """

    calibration: Examples

    def settings(self) -> dict[str, Any]:
        """Return the name, the calibration examples' fingerprint and the other settings."""
        others = self.model_dump(mode="json", exclude={"calibration"})
        examples = {"calibration": self.calibration.fingerprint(), "examples": len(self.calibration)}
        return {"name": type(self).__name__, **examples, **others}
