"""Ablation by another example's activations."""

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from coar.ablation.base import Ablation
from coar.components.table import Components
from coar.errors import AblationError, ExamplesError

SOURCES = 2**32  # second word of the Philox key; no mask's key has it


class Resample(Ablation):
    """Replace what a component computes for an example by what it computes for another example of the study.

    r_j = h_j(x'), where x', the resample source of x, is drawn once, uniformly from the other examples: it depends only
    on the seed, the position of x and the number of examples. Its activations are those of the unablated model,
    position by position (Chan et al. 2022, "Causal scrubbing", call this resampling ablation).

    Attributes:
        seed: Seed of the draw, 0 to 2**63 - 1.
    """

    label: ClassVar[str] = "resample"

    seed: int = Field(default=0, ge=0, lt=2**63)

    def replacements(self, model: nn.Module, components: Components, *, batch_size: int) -> Tensor:  # noqa: ARG002
        """Return NaN, since no constant replaces a component.

        Raises:
            AblationError: For a slice of a parameter or an expert in a stack, where there is nothing to resample.
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
        """Return the (examples,) position of each example's resample source, never its own.

        Raises:
            ExamplesError: When there is only one example.
        """
        if examples < 2:
            raise ExamplesError("there is one example, and resampling takes activations from another; give two or more")
        key = np.array([self.seed, SOURCES], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(examples)  # the n-th word does not depend on how many follow
        shifts = 1 + ((words >> np.uint64(32)) * np.uint64(examples - 1) >> np.uint64(32)).astype(np.int64)
        sources: np.ndarray = (np.arange(examples) + shifts) % examples
        return sources
