"""The execution plan: an immutable record of how a fast runner runs its passes."""

from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch

from coar.errors import SettingsError
from coar.forward.devices import batch_size_on

Precision = Literal["float32", "bf16"]
PRECISIONS = (*get_args(Precision), "auto")  # values that a user may give


@dataclass(frozen=True)
class ExecutionPlan:
    """How a fast runner runs its passes.

    A plan allows shortcuts; a runner checks each of them before use and falls back if the check fails. A plan
    changes results by rounding only, so it is not part of a run.

    Attributes:
        precision: `float32`, or `bf16` for automatic mixed precision.
        batch_size: Most rows per forward pass: examples, times the masks that share the pass. None stands for 128 on a
            CPU, 512 on CUDA and 256 elsewhere.
        masks_per_forward: Most masks that share a forward pass, each with its own copy of the block's examples, gated
            by hooks. 1 gates the weights.
        compiled: Run batches of the size of a block's first one through a compiled model.
        low_weights: With `bf16`, hold weights in bfloat16 instead of converting them on every forward pass.
        prefix_cache: Run what masks have in common at the start of a pass once.
        length_bucketing: Put texts of similar length into one batch, without needless padding.
        logit_positions: Compute logits of language models only at the positions that the output reads.

    Raises:
        SettingsError: When a size is below 1, the precision is unknown, or a compiled model would run several masks.
    """

    precision: Precision = "float32"
    batch_size: int | None = None
    masks_per_forward: int = 1
    compiled: bool = False
    low_weights: bool = True
    prefix_cache: bool = True
    length_bucketing: bool = True
    logit_positions: bool = True

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise SettingsError(f"precision {self.precision!r} cannot be run; use {' or '.join(get_args(Precision))}")
        for name, size in (("batch size", self.batch_size), ("masks per forward pass", self.masks_per_forward)):
            if size is not None and size < 1:
                raise SettingsError(f"{name} {size} is below 1; use a whole number above 0")
        if self.compiled and self.masks_per_forward > 1:
            raise SettingsError(
                f"a compiled model reads one mask from its weights, and {self.masks_per_forward} masks per forward "
                f"pass were given; use masks_per_forward=1"
            )

    def on(self, device: torch.device) -> Self:
        """Return the plan with the batch size that suits a device, unless it has one."""
        return replace(self, batch_size=self.batch_size or batch_size_on(device))
