"""Ablation by another example's activations."""

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from coar.ablation.base import Ablation
from coar.components.table import Components
from coar.errors import AblationError, ExamplesError

SOURCES = 2**32  # second word of the key of donors' random numbers, which no masks' have


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

    def sources(self, examples: int) -> np.ndarray:
        """Return (examples,) positions, each another one than the example's own.

        Raises:
            ExamplesError: When there is one example only.
        """
        if examples < 2:
            raise ExamplesError("there is one example, and resampling takes activations from another; give two or more")
        key = np.array([self.seed, SOURCES], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(examples)  # the n-th does not depend on how many follow
        shifts = 1 + ((words >> np.uint64(32)) * np.uint64(examples - 1) >> np.uint64(32)).astype(np.int64)
        sources: np.ndarray = (np.arange(examples) + shifts) % examples
        return sources
