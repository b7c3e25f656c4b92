"""The result of a task: edits with their tables, a page about them, and a comparison with a retrained last layer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from coar.attributions import Attributions
from coar.charts import accuracy_curves, html_table
from coar.editing.edit import Edit
from coar.editing.evaluate import columns, joined
from coar.editing.handout import write_handout
from coar.editing.judge import margins
from coar.editing.last_layer import LastLayerComparison, compared, retrain_last_layer
from coar.editing.select import Selection
from coar.errors import EditError, GoalError
from coar.examples import Examples
from coar.outputs.base import Output

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Judging:
    """What a task was chosen and judged on.

    Attributes:
        attributions: Attributions of the studied examples.
        model: The model before the edit.
        studied: The studied examples.
        more: Further choosing examples.
        examples: The judging examples.
        output: The margin by which correctness is judged; None for that of classes.
        device: Where to compute.
    """

    attributions: Attributions
    model: nn.Module
    studied: Examples
    more: Examples | None
    examples: Examples
    output: Output | None
    device: str

    def choosing(self) -> Examples:
        """Return the examples that components were chosen on, in memory."""
        return joined(self.attributions, self.studied, self.more)

    def right(self, model: nn.Module) -> np.ndarray:
        """Return (examples,) booleans: which judging examples a model gets right."""
        return margins(model, self.examples, device=self.device, output=self.output) > 0


@dataclass(frozen=True)
class TaskResult:
    """What a task did.

    Attributes:
        name: Name of the task, such as `forget-3`.
        edits: The edits it chose; one per corrected example for `fix`.
        table: Before and after, on examples that no choice has seen.
        curve: Accuracy of each group (`group`, `accuracy`) against the number of ablated components (`components`).
        selections: How the edits were chosen, one each.
        judging: What it was chosen and judged on; None for a result made from tables alone.
    """

    name: str
    edits: tuple[Edit, ...]
    table: "pd.DataFrame"
    curve: "pd.DataFrame"
    selections: tuple[Selection, ...] = ()
    judging: Judging | None = field(default=None, repr=False, compare=False)

    def report(self, path: str | Path, *, versus: LastLayerComparison | None = None) -> Path:
        """Write one self-contained HTML page about the edit, for people who decide about it; return its path.

        It has gain, cost and risk in words, a figure and a table of all groups, and what was changed.

        Args:
            path: The file to write.
            versus: A result of `versus_last_layer` to show beside the edit.

        Raises:
            EditError: When no task returned this result.
            StorageError: When the file cannot be written.
        """
        return write_handout(
            path,
            name=self.name,
            edits=self.edits,
            table=self.table,
            components=len(self._judged().attributions.components),
            chosen_on=max((chosen.examples for chosen in self.selections), default=0),
            passes=sum(chosen.passes for chosen in self.selections),
            versus=versus,
        )

    def versus_last_layer(
        self, train: Examples | None = None, *, group: str | None = None, seed: int = 0
    ) -> LastLayerComparison:
        """Compare the edit with the usual alternative: the last layer trained anew on groups of equal size.

        Both are judged on the judging examples of the task by the same margin; see `coar.editing.last_layer`.

        Args:
            train: Examples to retrain on; by default those that the edit was chosen on.
            group: Metadata column of the groups; by default the goal's groups, or else `label`.
            seed: Seed of the balanced subsets.

        Raises:
            EditError: When the task made no edit or several, or the model has no linear last layer.
            ExamplesError: When a class is missing among the examples, or a group has fewer than four of them.
            GoalError: When there is no such column.
        """
        goal = self.edits[0].goal if len(self.edits) == 1 else None
        if goal is None:
            raise EditError(
                f"{self.name} made {len(self.edits)} edits, and one is compared with a retrained last layer; use a "
                f"task with one edit, such as strengthen_group or reach_goal"
            )
        (edit,), judging = self.edits, self._judged()
        column = group or goal.groups or "label"
        if column not in judging.examples.metadata:
            raise GoalError(f"the judging examples have no metadata column {column!r}; add it, or give group=")
        examples = judging.choosing() if train is None else train
        retrained = retrain_last_layer(judging.model, examples, column, seed=seed, device=judging.device)
        nets = {"before": judging.model, "edit": edit.apply(judging.model), "last_layer": retrained.model}
        right = {name: judging.right(net) for name, net in nets.items()}
        table = compared(goal, columns(judging.examples), column, right)
        return LastLayerComparison(table, **vars(retrained))

    def _judged(self) -> Judging:
        """Return what the task was judged on; raise `EditError` for a result made by hand from tables."""
        if self.judging is None:
            raise EditError(
                f"the result {self.name!r} has tables only; use one that a task such as reach_goal returned"
            )
        return self.judging

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw accuracy per group against the number of ablated components, the edits' numbers marked; return the axes.

        Args:
            ax: Matplotlib axes; by default those of a new figure.
        """
        return accuracy_curves(ax, self.curve, title=self.name, counts=[len(edit) for edit in self.edits])

    def _repr_html_(self) -> str:
        return html_table(self.table)
