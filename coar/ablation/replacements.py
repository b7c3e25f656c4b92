"""What replaces an ablated component: one constant each, computed once per run, or another example's activations."""

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from coar.components import Components, Side, stack_of
from coar.errors import AblationError, ExamplesError
from coar.examples import Examples, Inputs
from coar.settings import Settings

DONORS = 2**32  # second word of the key of donors' random numbers, which no masks' have


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

    def donors(self, examples: int) -> np.ndarray | None:  # noqa: ARG002
        """Return (examples,) positions of those whose activations replace each example's; None for constants."""
        return None

    def settings(self) -> dict[str, Any]:
        """Return the name and settings that identify this ablation in a run's fingerprint."""
        return {"name": type(self).__name__, **self.model_dump(mode="json")}


class ZeroWeight(Ablation):
    """Zero a component's weights and keep its bias, as published (Shah et al. 2024).

    An output becomes the bias, and an expert that of its last projection; an input counts as 0.
    """

    label: ClassVar[str] = "zero"

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:  # noqa: ARG002
        """Return each channel's bias, 0 where it has none; raise `AblationError` for a whole module."""
        values = torch.zeros(components.width)
        for (site, side, _), indices in components.sites().items():
            if side == "module":
                raise AblationError(
                    f"{components[indices[0]].name!r} is a whole module, whose weights and biases are many layers'; "
                    f"use ZeroActivation() or Resample()"
                )
            bias = _bias(model.get_submodule(site), side) if side in ("output", "expert") else None
            if bias is not None:
                flat = bias.detach().float().cpu().flatten()
                values[components.channels_of(indices)] = flat[components.positions_of(indices)]
        return values


def _bias(module: nn.Module, side: Side) -> Tensor | None:
    """Return the bias of a layer's outputs, or (experts, features) those of experts; None where there is none."""
    stack = stack_of(module) if side == "expert" else None
    bias = stack.bias if stack else module.bias
    return bias if isinstance(bias, Tensor) else None


class ZeroActivation(Ablation):
    """Replace what a component computes by 0, its bias included; a slice of a parameter is zeroed."""

    label: ClassVar[str] = "zero_activation"

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:  # noqa: ARG002
        """Return zeros."""
        return torch.zeros(components.width)


class Resample(Ablation):
    """Replace what a component computes for an example by what it computes for another one of the study.

    The other one, the donor, is drawn uniformly once and for all: its position depends on the seed, the example's
    position and their number alone. Its activations are those of the unablated model, position by position.

    Attributes:
        seed: Seed of the draw, 0 to 2**63 - 1.
    """

    label: ClassVar[str] = "resample"

    seed: int = Field(default=0, ge=0, lt=2**63)

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:  # noqa: ARG002
        """Return NaN, since no constant stands for a donor; raise `AblationError` where there is nothing to resample.

        That is so for slices of parameters, and for experts in a stack.
        """
        for row in components:
            if row.side == "parameter":
                raise AblationError(
                    f"{row.name!r} is a slice of a parameter, which is the same for all examples, so there is nothing "
                    f"to resample; use ZeroWeight()"
                )
            if row.side == "expert":
                raise AblationError(
                    f"{row.name!r} is an expert, and other examples' tokens are sent to other experts, so there is "
                    f"nothing to resample; use ZeroActivation() or Mean(calibration=...)"
                )
        return torch.full((components.width,), torch.nan)

    def donors(self, examples: int) -> np.ndarray:
        """Return (examples,) positions, each another one than the example's own.

        Raises:
            ExamplesError: When there is one example only.
        """
        if examples < 2:
            raise ExamplesError("there is one example, and resampling takes activations from another; give two or more")
        key = np.array([self.seed, DONORS], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(examples)  # the n-th does not depend on how many follow
        shifts = 1 + ((words >> np.uint64(32)) * np.uint64(examples - 1) >> np.uint64(32)).astype(np.int64)
        donors: np.ndarray = (np.arange(examples) + shifts) % examples
        return donors


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


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run the model on inputs moved to its device: a tensor as the first argument, a dict by name."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(inputs, dict):
        return model(**{name: value.to(device) for name, value in inputs.items()})
    return model(inputs.to(device))
