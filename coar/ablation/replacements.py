"""What replaces an ablated component: one constant each, computed once per run."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from coar.components import Components
from coar.errors import AblationError, SettingsError
from coar.examples import Examples, Inputs
from coar.settings import Settings


class Ablation(Settings):
    """Base of all ablations that replace a component's output by a constant.

    Attributes:
        label: The word for this ablation in commands and file names.
    """

    label: ClassVar[str]

    @abstractmethod
    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:
        """Return (components,) float32 constants on the CPU.

        Args:
            model: The model in evaluation mode; its device is used.
            components: The components to replace.
            batch_size: Most examples per forward pass, where passes are needed.
        """

    def settings(self) -> dict[str, Any]:
        """Return the name and settings that identify this ablation in a run's fingerprint."""
        return {"name": type(self).__name__}


class ZeroWeight(Ablation):
    """Zero a component's weights and keep its bias, as published (Shah et al. 2024): the output becomes the bias."""

    label: ClassVar[str] = "zero"

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:  # noqa: ARG002
        """Return each component's bias, 0 where it has none."""
        values = torch.zeros(len(components))
        for (site, side, _), indices in components.sites().items():
            bias = None if side == "parameter" else model.get_submodule(site).bias
            if isinstance(bias, Tensor):
                positions = [components[i].position for i in indices]
                values[indices] = bias.detach().float().cpu()[positions]
        return values


class Mean(Ablation):
    """Replace a component's output by its mean over calibration examples and, for convolutions, positions.

    Attributes:
        calibration: The examples to average over; apart from those used to test, so that nothing leaks.
    """

    label: ClassVar[str] = "mean"

    calibration: Examples

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:
        """Return each component's mean output; raise `AblationError` where a component has no output."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        sites = components.sites()

        def recorder(site: str, axis: int) -> Callable[[nn.Module, Any, Tensor], None]:
            def record(_module: nn.Module, _args: Any, y: Tensor) -> None:
                columns = y.detach().movedim(axis, -1).reshape(-1, y.shape[axis])  # (values, channels)
                sums[site] = sums.get(site, 0) + columns.sum(0, dtype=torch.float64)
                counts[site] = counts.get(site, 0) + len(columns)

            return record

        with ExitStack() as stack, torch.inference_mode():
            for (site, side, axis), indices in sites.items():
                if side == "parameter":
                    raise AblationError(
                        f"{components[indices[0]].name!r} is a parameter slice and has no output whose mean could "
                        f"replace it; use ZeroWeight() or components found by conv_filters or neurons"
                    )
                handle = model.get_submodule(site).register_forward_hook(recorder(site, axis))
                stack.callback(handle.remove)
            for start in range(0, len(self.calibration), batch_size):
                call(model, self.calibration.block(start, start + batch_size)[0])
        values = torch.zeros(len(components))
        for (site, _, _), indices in sites.items():
            if site not in sums:
                raise AblationError(
                    f"module {site!r} was never called while the calibration examples passed through the model, so "
                    f"its outputs have no mean; exclude it from the components"
                )
            positions = [components[i].position for i in indices]
            values[indices] = (sums[site] / counts[site]).float().cpu()[positions]
        return values

    def settings(self) -> dict[str, Any]:
        """Return the name and the calibration examples' fingerprint."""
        return {"name": "Mean", "calibration": self.calibration.fingerprint(), "examples": len(self.calibration)}


def choose_ablation(label: str, *, calibration: Examples) -> Ablation:
    """Return the ablation that a label stands for: `zero`, or `mean` over the calibration examples.

    Raises:
        SettingsError: When there is no such ablation.
    """
    choices: dict[str, Ablation] = {"zero": ZeroWeight(), "mean": Mean(calibration=calibration)}
    if label not in choices:
        raise SettingsError(f"unknown ablation {label!r}; choose one of {', '.join(choices)}")
    return choices[label]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run the model on inputs moved to its device: a tensor as the first argument, a dict by name."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(inputs, dict):
        return model(**{name: value.to(device) for name, value in inputs.items()})
    return model(inputs.to(device))
