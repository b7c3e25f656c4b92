"""What replaces an ablated component: one constant each, computed once per run."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from coar.ablation.by_hook import hook
from coar.components import Components
from coar.errors import AblationError, SettingsError
from coar.examples import Examples, Inputs
from coar.settings import Settings


class Ablation(Settings):
    """Base of all ablations that replace a component's output, or what it is of a layer's input, by a constant.

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
    """Zero a component's weights and keep its bias, as published (Shah et al. 2024).

    An output becomes the bias; an input counts as 0.
    """

    label: ClassVar[str] = "zero"

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:  # noqa: ARG002
        """Return each component's bias, 0 where it has none."""
        values = torch.zeros(len(components))
        for (site, side, _), indices in components.sites().items():
            bias = model.get_submodule(site).bias if side == "output" else None
            if isinstance(bias, Tensor):
                positions = [components[i].position for i in indices]
                values[indices] = bias.detach().float().cpu()[positions]
        return values


class Mean(Ablation):
    """Replace a component by its mean over calibration examples and positions, such as pixels or tokens.

    Attributes:
        calibration: The examples to average over; apart from those used to test, so that nothing leaks.
    """

    label: ClassVar[str] = "mean"

    calibration: Examples

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:
        """Return each component's mean; raise `AblationError` where no one constant is its mean."""
        sums: dict[tuple[str, str], Tensor] = {}
        counts: dict[tuple[str, str], int] = {}
        sites = components.sites()
        _check_means(components)

        def recorder(key: tuple[str, str], axis: int) -> Callable[[Tensor], Tensor]:
            def record(y: Tensor) -> Tensor:
                columns = y.detach().movedim(axis, -1).reshape(-1, y.shape[axis])  # (values, channels)
                sums[key] = sums.get(key, 0) + columns.sum(0, dtype=torch.float64)
                counts[key] = counts.get(key, 0) + len(columns)
                return y

            return record

        with ExitStack() as stack, torch.inference_mode():
            for site, side, axis in sites:
                if side != "parameter":
                    handle = hook(model.get_submodule(site), side, recorder((site, side), axis))
                    stack.callback(handle.remove)
            for start in range(0, len(self.calibration), batch_size):
                call(model, self.calibration.block(start, start + batch_size)[0])
        values = torch.zeros(len(components))
        for (site, side, _), indices in sites.items():
            if (site, side) not in sums:
                raise AblationError(
                    f"module {site!r} was never called while the calibration examples passed through the model, so "
                    f"its {side}s have no mean; exclude it from the components"
                )
            positions = [components[i].position for i in indices]
            values[indices] = (sums[site, side] / counts[site, side]).float().cpu()[positions]
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


def _check_means(components: Components) -> None:
    """Raise `AblationError` for the first component that no one constant could replace by its mean."""
    for row in components:
        if row.side == "parameter":
            raise AblationError(
                f"{row.name!r} is a parameter slice and has no output whose mean could replace it; use ZeroWeight() or "
                f"components found by conv_filters, neurons or input_features"
            )
        if row.size > 1:
            raise AblationError(
                f"{row.name!r} is {row.size} features, each with a mean of its own, and an ablation replaces a "
                f"component by one constant; use ZeroWeight() for attention heads"
            )
