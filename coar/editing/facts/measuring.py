"""Log-odds of answers and losses of texts under strengths of ablation, with gradients by the strengths."""

import numpy as np
import torch
from torch import Tensor, nn

from coar.components.table import Components
from coar.examples import Examples
from coar.forward.execution_plan import ExecutionPlan
from coar.forward.runner import FastRunner
from coar.outputs.base import Output

GRADIENT_COST = 3  # a forward and a backward pass, in forward passes


class Measured:
    """Examples of a language model whose components are ablated by strengths between 0 and 1.

    Args:
        model: A copy made by `device_copy`.
        components: The components.
        constants: (components.width,) constants that replace them.
        examples: The examples.
        output: The number read per example.
        batch_size: Most examples per forward pass.

    Attributes:
        passes: Forward passes of one example so far; a gradient counts as 3.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Components,
        constants: Tensor,
        examples: Examples,
        output: Output,
        batch_size: int,
    ) -> None:
        self._runner = FastRunner(model, components, constants, output, ExecutionPlan(batch_size=batch_size))
        self._examples = examples
        self.passes = 0

    def __len__(self) -> int:
        return len(self._examples)

    def outputs(self, strengths: Tensor) -> Tensor:
        """Return (examples,) outputs at (components,) strengths."""
        self.passes += len(self)
        block = self._runner.load(self._examples, 0, len(self))
        return torch.from_numpy(self._runner.outputs(block, _gates(strengths)[None])[0])

    def gradients(self, strengths: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return (rows,) outputs of some examples, and their (rows, components) gradients by the strengths."""
        self.passes += GRADIENT_COST * len(rows)
        part, gates = self._examples.subset(rows.numpy()), _gates(strengths)
        block = self._runner.load(part, 0, len(part))
        groups = np.zeros(len(part), dtype=np.int64)
        kept, ablated, outputs = self._runner.mask_gradients(block, gates[None, None], groups)
        return torch.from_numpy(outputs[0]), -torch.from_numpy(np.where(gates > 0, kept, ablated))


def _gates(strengths: Tensor) -> np.ndarray:
    found: np.ndarray = 1 - strengths.numpy()
    return found.astype(np.float32)
