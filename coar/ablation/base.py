"""The base of every ablation: constants that replace an ablated component, or another example's activations.

In the formulas of the classes, h_j(x) is what channel j of a component computes for example x in the unablated model,
and r_j is the constant that replaces it when the component is ablated.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from coar.components.table import Components
from coar.examples import Examples
from coar.settings import Settings


class Ablation(Settings):
    """Base of all ablations, whose settings are fields.

    Attributes:
        label: The name of this ablation in commands and file names.
    """

    label: ClassVar[str]

    @abstractmethod
    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:
        """Return (components.width,) float32 constants on the CPU, one per channel of every component in table order.

        They are NaN where no constant replaces the component. An ablation by position returns (positions,
        components.width) constants.

        Args:
            model: The model in evaluation mode; its device is used.
            components: The components to replace.
            batch_size: Largest number of examples per forward pass, where passes are needed.

        Raises:
            AblationError: When the ablation does not apply to a component.
        """

    def sources(self, examples: Examples) -> np.ndarray | None:  # noqa: ARG002
        """Return the (examples,) position of each example's resample source; None for ablations by constants."""
        return None

    @property
    def needs_gradients(self) -> bool:
        """Whether the constants are trained by gradients."""
        return False

    def calibrations(self) -> list[Examples]:
        """Return the examples that constants are computed from, if any."""
        return []

    def settings(self) -> dict[str, Any]:
        """Return the name and settings that identify this ablation in a run's fingerprint."""
        return {"name": type(self).__name__, **self.model_dump(mode="json")}


class Calibrated(Ablation):
    """Base of the ablations whose constants are computed from calibration examples.

    Attributes:
        calibration: The examples to compute them from; use others than those of the study, so that nothing leaks.
    """

    calibration: Examples

    def calibrations(self) -> list[Examples]:
        """Return the calibration examples."""
        return [self.calibration]

    def settings(self) -> dict[str, Any]:
        """Return the name, the calibration examples' fingerprint and the other settings."""
        others = self.model_dump(mode="json", exclude={"calibration"})
        examples = {"calibration": self.calibration.fingerprint(), "examples": len(self.calibration)}
        return {"name": type(self).__name__, **examples, **others}
