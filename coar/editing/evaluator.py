"""The gated evaluator: margins and gradients of the gated model on choosing examples."""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import nn

from coar.ablation.calibration import activation_moments
from coar.attributions import Attributions
from coar.examples import Examples
from coar.forward.batches import ExampleBlock
from coar.forward.copies import device_copy
from coar.forward.devices import choose_device
from coar.forward.execution_plan import ExecutionPlan, Precision
from coar.forward.runner import FastRunner
from coar.outputs.base import Output
from coar.outputs.classification import CorrectClassMargin, margin_pair

GRADIENT_COST = 3  # a mask gradient's forward and backward pass, in forward passes
SPREAD_EXAMPLES = 500  # from which standard deviations of channels are computed


class GatedEvaluator:
    """Runs the gated model on examples that stay on the device, and counts passes.

    Args:
        attributions: Give the components and the constants that replace them.
        model: The model they were collected from.
        examples: The examples to choose on.
        device: Where to compute.
        precision: `float32`, or `bf16` for automatic mixed precision.
        batch_size: Most examples per forward pass; by default what suits the device.
        output: The margin by which correctness is judged; by default that of classes.

    Attributes:
        constants: (components.width,) constants of the attributions, one per channel.
        passes: Forward passes of one example so far. A mask gradient counts as 3, a pass with a cached prefix as 1.
    """

    def __init__(
        self,
        attributions: Attributions,
        model: nn.Module,
        examples: Examples,
        *,
        device: str = "auto",
        precision: Precision = "float32",
        batch_size: int | None = None,
        output: Output | None = None,
    ) -> None:
        self.table, self.constants = attributions.components, attributions.origin.constants
        self._batch_norms = attributions.origin.batch_norms
        self._model = device_copy(model, choose_device(device), examples)
        self._plan = ExecutionPlan(precision=precision, batch_size=batch_size)
        self._largest, self._smooth = margin_pair(output or CorrectClassMargin())
        self._runners: dict[tuple[Output, bytes], FastRunner] = {}
        inputs, targets = examples.block(0, len(examples))
        self._examples = Examples(inputs=inputs, targets=targets)
        self._blocks: dict[bytes, ExampleBlock] = {}
        self.components = len(self.table)
        self.passes = 0

    def __len__(self) -> int:
        return len(self._examples)

    def margins(
        self, keeps: np.ndarray, rows: np.ndarray | None = None, *, constants: np.ndarray | None = None
    ) -> np.ndarray:
        """Return (masks, examples) margins against the runner-up logit under (masks, components) masks or gates."""
        block = self._block(np.arange(len(self)) if rows is None else rows)
        self.passes += block.size * len(keeps)
        return self._runner(self._largest, constants).outputs(block, keeps)

    def smooth_margins(self) -> np.ndarray:
        """Return (examples,) smooth margins, see `slopes`, with nothing ablated."""
        everything = np.arange(len(self))
        self.passes += len(self)
        found = self._runner(self._smooth, None).outputs(self._block(everything), self.gates([])[None])
        return np.asarray(found[0])

    def slopes(
        self, gates: np.ndarray, rows: np.ndarray, *, constants: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (examples,) smooth margins and their (examples, components) gradients by gates set between 0 and 1.

        Smooth margins are against the log-sum-exp of the other logits, which has a gradient everywhere.
        """
        runner, block = self._gradient_setup(rows, constants)
        mask = gates.astype(np.float32)[None, None]
        kept, ablated, outputs = runner.mask_gradients(block, mask, np.zeros(block.size, dtype=np.int64))
        return outputs[0], np.where(gates > 0, kept, ablated)

    def weighted_gradients(
        self, gates: np.ndarray, rows: np.ndarray, *, constants: np.ndarray, slopes: Callable[..., np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradients of a sum over examples, (components.width,) by constants and (components,) by gates.

        Args:
            gates: (components,) gates between 0, ablated, and 1, kept.
            rows: The examples.
            constants: (components.width,) constants that replace what is ablated.
            slopes: Returns (examples,) weights of the sum from (examples,) smooth margins.
        """
        runner, block = self._gradient_setup(rows, None)
        return runner.weighted_gradients(block, gates, constants, slopes)[1:]

    @cached_property
    def spread(self) -> np.ndarray:
        """(components.width,) standard deviations of all channels over some of the examples, in float32."""
        rows = np.unique(np.linspace(0, len(self) - 1, SPREAD_EXAMPLES).round().astype(int))
        self.passes += len(rows)
        size = self._runner(self._smooth, None).batch_size
        return (
            activation_moments(self._model, self.table, self._examples.subset(rows), batch_size=size)[1].cpu().numpy()
        )

    def gates(self, ablated: Sequence[int] | np.ndarray, strength: float | np.ndarray = 1.0) -> np.ndarray:
        """Return the (components,) gates that ablate these components, fully or at one strength or one each."""
        found = np.ones(self.components, dtype=np.float32)
        found[np.asarray(ablated, dtype=np.int64)] = 1 - strength
        return found

    def _gradient_setup(self, rows: np.ndarray, constants: np.ndarray | None) -> tuple[FastRunner, ExampleBlock]:
        """Return a runner for smooth margins and these examples on the device, and count the passes of a gradient."""
        runner, part = self._runner(self._smooth, constants), self._examples.subset(rows)
        self.passes += GRADIENT_COST * len(part)
        return runner, runner.load(part, 0, len(part))

    def _runner(self, output: Output, constants: np.ndarray | None) -> FastRunner:
        """Return the runner that reads an output; of those with other constants than the run's, the last is kept."""
        constants = self.constants if constants is None else constants
        key = (output, constants.tobytes())
        if key not in self._runners:
            usual = self.constants.tobytes()
            for other in [one for one in self._runners if one[0] is output and one[1] != usual]:
                del self._runners[other]
            self._runners[key] = FastRunner(
                self._model,
                self.table,
                torch.from_numpy(constants),
                output,
                self._plan,
                batch_norms=self._batch_norms,
            )
        return self._runners[key]

    def _block(self, rows: np.ndarray) -> ExampleBlock:
        """Return these examples on the device, moved there once."""
        key = rows.tobytes()
        if key not in self._blocks:
            part = self._examples.subset(rows)
            self._blocks[key] = self._runner(self._largest, None).load(part, 0, len(part))
        return self._blocks[key]
