"""The model's own numbers, in place of an output that compares with the unablated model."""

from typing import Any

import torch
from torch import Tensor

from coar.outputs.base import Output, RelativeOutput


def absolute(output: Output) -> Output:
    """Return an output of the model's own numbers: the output itself, unless it compares with the unablated model.

    Such an output is the same for every unablated model, and may have no gradient there.
    """
    return _Absolute(relative=output) if isinstance(output, RelativeOutput) else output


class _Absolute(Output):
    """A fixed combination of what an output that compares with the unablated model keeps of its result.

    Attributes:
        relative: The output.
    """

    relative: RelativeOutput

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) sums with alternating weights, without infinite numbers."""
        kept = self.relative.reference(result, targets)
        flat = kept.reshape(len(kept), -1).float()
        weights = torch.arange(flat.shape[1], device=flat.device).cos()
        return torch.where(flat.isfinite(), flat, 0) @ weights
