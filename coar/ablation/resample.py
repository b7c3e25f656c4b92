"""Ablation by another example's activations."""

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from coar.ablation.base import Ablation
from coar.components.table import Components
from coar.errors import AblationError, ExamplesError
from coar.examples import Examples

STREAM = 2**32  # second word of the Philox key; no mask's key has it


class FromExamples(Ablation):
    """Base of ablations that replace what a component computes by what it computes for another example of the study.

    r_j = h_j(x'), where x' is the resample source of x. Its activations are those of the unablated model, position by
    position.
    """

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

    @abstractmethod
    def sources(self, examples: Examples) -> np.ndarray:
        """Return the (examples,) position of each example's resample source."""


class Resample(FromExamples):
    """Replace what a component computes for an example by what it computes for another example, drawn at random.

    The source is drawn once, uniformly from the other examples: it depends only on the seed, the position of x and the
    number of examples (Chan et al. 2022, "Causal scrubbing", call this resampling ablation).

    Attributes:
        seed: Seed of the draw, 0 to 2**63 - 1.
    """

    label: ClassVar[str] = "resample"

    seed: int = Field(default=0, ge=0, lt=2**63)

    def sources(self, examples: Examples) -> np.ndarray:
        """Return the (examples,) position of each example's resample source, never its own.

        Raises:
            ExamplesError: When there is only one example.
        """
        n = len(examples)
        if n < 2:
            raise ExamplesError("there is one example, and resampling takes activations from another; give two or more")
        key = np.array([self.seed, STREAM], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(n)  # the n-th word does not depend on how many follow
        shifts = 1 + ((words >> np.uint64(32)) * np.uint64(n - 1) >> np.uint64(32)).astype(np.int64)
        sources: np.ndarray = (np.arange(n) + shifts) % n
        return sources


class Counterfactual(FromExamples):
    """Replace a component's activations for an example by its activations for the example's partner.

    Partners differ only in the studied property, such as the names in a sentence, and activations are replaced position
    by position, so texts of a pair need the same number of tokens.

    Attributes:
        pairs: Metadata column with the name of each example's pair; exactly two examples have each name, and each of
            them is the other's partner.
    """

    label: ClassVar[str] = "counterfactual"

    pairs: str = "pair"

    def sources(self, examples: Examples) -> np.ndarray:
        """Return (examples,) positions of the partners.

        Raises:
            ExamplesError: When the column is missing, or a name does not belong to exactly two examples.
        """
        if self.pairs not in examples.metadata:
            raise ExamplesError(
                f"there is no metadata column {self.pairs!r} with the pair of each example; there are "
                f"{', '.join(examples.metadata)}: add it, or give Counterfactual(pairs=...)"
            )
        column = np.asarray(examples.metadata[self.pairs])
        names, counts = np.unique(column, return_counts=True)
        if (counts != 2).any():
            odd = int(np.flatnonzero(counts != 2)[0])
            raise ExamplesError(
                f"{self.pairs} == {names[odd]!r} is the pair of {counts[odd]} examples; give every pair exactly two, "
                f"each the other's counterfactual"
            )
        both = column.argsort(kind="stable").reshape(-1, 2)
        sources = np.empty(len(column), dtype=np.int64)
        sources[both] = both[:, ::-1]
        return sources
