"""The examples that a choice is made on: those of the study, and further ones without attributions."""

import numpy as np
import torch
from torch import Tensor

from coar.attributions import Attributions
from coar.editing.goals import EditGoal
from coar.errors import GoalError
from coar.examples import Examples, Inputs


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


def widened(goal: EditGoal, attributions: Attributions, examples: int) -> EditGoal:
    """Return what a goal means for the studied examples and the further ones that follow them.

    One by conditions speaks of all alike. For one by positions, which are those of studied examples, the further
    examples are references.
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
