"""The selection context: choosing examples on the device, and their margins under the unablated model."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from coar.attributions import Attributions
from coar.editing.evaluator import GatedEvaluator
from coar.editing.goal import EditGoal
from coar.errors import GoalError
from coar.examples import Examples
from coar.forward.execution_plan import Precision
from coar.inputs import Inputs
from coar.outputs.base import Output


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
