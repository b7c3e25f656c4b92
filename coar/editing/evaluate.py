"""Evaluation of sets of components on choosing examples: margins and gradients of the gated model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from coar.ablation.calibration import activation_moments
from coar.attributions import Attributions
from coar.components.layers import unwrapped
from coar.editing.edit import check_model
from coar.editing.goal import EditGoal
from coar.errors import AblationError, GoalError
from coar.examples import Examples
from coar.forward.batches import ExampleBlock
from coar.forward.copies import device_copy
from coar.forward.execution_plan import ExecutionPlan, Precision
from coar.forward.runner import FastRunner, ReferenceRunner
from coar.inputs import Inputs
from coar.outputs.base import Output
from coar.outputs.classification import CorrectClassMargin, margin_pair
from coar.preflight.gradients import FEW, wrong_gradients

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
        self._accepted = attributions.origin.accepted_checks
        self._gradients_checked = False
        self._model = device_copy(model, device, examples)
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
        self._check_gradients()
        runner, part = self._runner(self._smooth, constants), self._examples.subset(rows)
        self.passes += GRADIENT_COST * len(part)
        return runner, runner.load(part, 0, len(part))

    def _check_gradients(self) -> None:
        """Raise `AblationError`, once, if gradients by gates are not the margins', unless the run accepted that."""
        if self._gradients_checked or "gradients" in self._accepted:
            return
        self._gradients_checked = True
        zeros = torch.zeros(self.table.width)
        reference = ReferenceRunner(self._model, self.table, zeros, self._smooth, batch_size=self._plan.batch_size)
        problem = wrong_gradients(reference, reference.load(self._examples, 0, FEW))
        if problem:
            raise AblationError(
                f"{problem}; choose components by the rule 'welch' or 'predicted', which need no gradients, or collect "
                f"with coar.Study(..., accept=('gradients',))"
            )

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


@dataclass(frozen=True)
class SelectionContext:
    """Choosing examples that stay on the device, with evaluators; choices for several goals can share it.

    Attributes:
        attributions: Attributions of the studied examples, which come first.
        model: The model they were collected from.
        examples: The choosing examples.
        exact: Evaluates in float32.
        evaluator: Evaluates in the precision of the search.
        base: (examples,) margins of the unablated model.
    """

    attributions: Attributions
    model: nn.Module
    examples: Examples
    exact: GatedEvaluator
    evaluator: GatedEvaluator
    base: np.ndarray

    @classmethod
    def of(
        cls,
        attributions: Attributions,
        model: nn.Module,
        studied: Examples,
        *,
        choosing: Examples | None = None,
        device: str = "auto",
        precision: Precision = "float32",
        output: Output | None = None,
    ) -> Self:
        """Move the examples to the device and run the model on them; for arguments and errors see `select`."""
        check_model(
            unwrapped(model),
            weights=attributions.origin.weights,
            codes=attributions.origin.codes,
            owner="these attributions were collected from",
            accept="coar.Run.open(path).accept_code(model), and load the attributions again",
        )
        examples = joined(attributions, studied, choosing)
        exact = GatedEvaluator(attributions, model, examples, device=device, output=output)
        evaluator = exact
        if precision != "float32":
            evaluator = GatedEvaluator(attributions, model, examples, device=device, precision=precision, output=output)
        return cls(attributions, model, examples, exact, evaluator, exact.margins(exact.gates([])[None])[0])

    @property
    def passes(self) -> int:
        """Passes of one example so far."""
        return self.evaluator.passes + (self.exact.passes if self.exact is not self.evaluator else 0)


def joined(attributions: Attributions, studied: Examples, more: Examples | None) -> Examples:
    """Join the studied examples and further ones, in memory, with the columns that both have.

    Args:
        attributions: Attributions of the studied examples.
        studied: The study's examples.
        more: Further examples, with the columns that goals read.

    Raises:
        GoalError: When the studied examples are not those with attributions, or the others have other inputs.
    """
    if not np.array_equal(attributions.metadata["id"], np.asarray(studied.metadata["id"])):
        raise GoalError(
            f"the {len(studied)} studied examples are not the {len(attributions)} that have attributions by their ids; "
            f"give the examples of the study"
        )
    inputs, targets = studied.block(0, len(studied))
    if more is None:
        return Examples(inputs=inputs, targets=targets, metadata=studied.metadata)
    further, labels = more.block(0, len(more))
    shared = [name for name in studied.metadata if name in more.metadata]
    metadata = {name: np.concatenate([studied.metadata[name], more.metadata[name]]) for name in shared}
    return Examples(inputs=_stacked(inputs, further), targets=torch.cat([targets, labels]), metadata=metadata)


def for_all_examples(goal: EditGoal, attributions: Attributions, examples: int) -> EditGoal:
    """Return a goal for the studied examples and the further ones that follow them.

    A goal by conditions applies to all of them as it is. The positions of any other goal are those of studied examples,
    and the further examples become references.
    """
    if goal.general or examples == len(attributions):
        return goal
    targets, references = goal.resolve(attributions.metadata)
    both = (*references.tolist(), *range(len(attributions), examples))
    return goal.model_copy(update={"targets": tuple(targets.tolist()), "references": both})


def columns(examples: Examples) -> dict[str, np.ndarray]:
    """Return the metadata columns as arrays."""
    return {name: np.asarray(column) for name, column in examples.metadata.items()}


def _stacked(first: Inputs, second: Inputs) -> Inputs:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {name: torch.cat([value, second[name]]) for name, value in first.items()}
    raise GoalError("the further examples have other inputs than the studied ones; make them in the same way")
