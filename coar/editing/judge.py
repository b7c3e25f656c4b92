"""The effect of an edit on examples: before and after, and as components are ablated one after another."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from coar.attributions import Attributions
from coar.editing.edit import Edit, applied
from coar.editing.evaluate import columns
from coar.editing.goal import Columns, EditGoal
from coar.editing.intervals import change_interval, mean_interval, share_interval
from coar.errors import GoalError
from coar.examples import Examples
from coar.forward.copies import device_copy
from coar.forward.model_runner import ModelRunner
from coar.forward.runner import FastRunner
from coar.outputs.base import Output
from coar.outputs.classification import CorrectClassMargin, margin_pair

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (  # columns of a judgement
    *("group", "examples", "components", "accuracy_before", "accuracy_after", "points"),
    *("margin_before", "margin_after", "low", "high", "points_low", "points_high"),
)


def effect_curve(
    model: nn.Module,
    attributions: Attributions,
    order: Sequence[int] | np.ndarray,
    examples: Examples,
    *,
    counts: Sequence[int],
    constants: np.ndarray | None = None,
    strengths: Sequence[float] | None = None,
    device: str = "auto",
    output: Output | None = None,
) -> np.ndarray:
    """Return (counts, examples) margins against the runner-up logit as components are ablated in an order.

    A margin above zero is a correct prediction. The model is gated, not edited, once per count.

    Args:
        model: The model that the attributions were collected from.
        attributions: Give the components and their constants.
        order: Component indices, the first to ablate in front.
        examples: The examples to run.
        counts: How many of them to ablate, 0 for none.
        constants: (components.width,) constants that replace them, such as `edit.constants(attributions)`; by default
            those of the attributions.
        strengths: How far each component of `order` goes towards its constants, such as `edit.strengths`; by default 1.
        device: Where to compute.
        output: The margin; by default that of classes.
    """
    rows, kept = np.asarray(order), 0.0 if strengths is None else 1 - np.asarray(strengths)
    gates = np.ones((len(counts), len(attributions.components)), dtype=np.float32)
    for row, count in enumerate(counts):
        gates[row, rows[:count]] = np.broadcast_to(kept, rows.shape)[:count]
    replacements = torch.tensor(attributions.origin.constants if constants is None else constants, dtype=torch.float32)
    copy = device_copy(model, device, examples)
    largest, _ = margin_pair(output or CorrectClassMargin())
    runner = FastRunner(
        copy, attributions.components, replacements, largest, batch_norms=attributions.origin.batch_norms
    )
    return runner.outputs(runner.load(examples, 0, len(examples)), gates)


def judge_edit(
    edit: Edit,
    model: nn.Module,
    examples: Examples,
    *,
    goal: EditGoal | None = None,
    device: str = "auto",
    output: Output | None = None,
) -> "pd.DataFrame":
    """Compare the model with its edited copy on targets, references, and groups of references.

    Args:
        edit: The edit to judge.
        model: The model it was made for.
        examples: The examples to judge on, preferably ones that no choice has seen.
        goal: Which of these are targets and references; by default the edit's goal, which must then consist of
            conditions, not of positions.
        device: Where to compute.
        output: The margin by which correctness is judged; by default that of classes.

    Raises:
        GoalError: When the edit's goal names examples by position, or it has none, and no other is given.

    Returns:
        See `judgement`.
    """
    if goal is None:
        goal = edit.goal
        if goal is None or not goal.general:
            raise GoalError(
                "the edit has no goal, or its goal names examples by position, which may be others here; give goal= "
                "with conditions, or with positions of these examples"
            )
    before, after = (margins(net, examples, device=device, output=output) for net in (model, applied(edit, model)))
    return judgement(goal, columns(examples), before, after).assign(components=len(edit))[list(COLUMNS)]


def judgement(goal: EditGoal, metadata: Columns, before: np.ndarray, after: np.ndarray) -> "pd.DataFrame":
    """Compare margins of the same examples before and after, on targets, references, and groups of both.

    Args:
        goal: Which of the examples are targets and references, and their groups and clusters.
        metadata: (examples,) columns.
        before: (examples,) margins of the model.
        after: (examples,) margins of the changed model.

    Returns:
        A row for targets and one for references: number of examples, accuracy and mean margin (against the runner-up
        logit) before and after, and the change of accuracy in points. `low` and `high` are Wilson's 95 % interval of
        the accuracy after, `points_low` and `points_high` Newcombe's of the change, see `coar.editing.intervals`. Where
        references have several groups, a row for the average over these, and one for each group, the one whose accuracy
        fell most first; where targets have several, one for each of them.
    """
    import pandas as pd

    targets, references = goal.resolve(metadata)
    clusters = goal.clusters_of(metadata)

    def row(name: str, chosen: np.ndarray) -> dict[str, object]:
        old, new, cluster = before[chosen] > 0, after[chosen] > 0, clusters[chosen]
        low, high = share_interval(new, cluster)
        least, most = change_interval(old, new, cluster)
        return {
            "group": name,
            "examples": len(chosen),
            "accuracy_before": float(old.mean()),
            "accuracy_after": float(new.mean()),
            "points": 100 * float(new.mean() - old.mean()),
            "margin_before": float(before[chosen].mean()),
            "margin_after": float(after[chosen].mean()),
            "low": low,
            "high": high,
            "points_low": 100 * least,
            "points_high": 100 * most,
        }

    def by_group(role: str, chosen: np.ndarray) -> "pd.DataFrame":
        own = goal.groups_of(metadata, chosen)
        names = np.unique(own)
        found = pd.DataFrame([row(f"{role}: {name}", chosen[own == name]) for name in names])
        return found.sort_values("points", kind="stable") if len(names) > 1 else found[:0]

    table = pd.DataFrame([row("targets", targets), row("references", references)])
    groups = by_group("references", references)
    parts = [table]
    if len(groups):
        average = groups.drop(columns="group").mean()
        for mean, ends in (("accuracy_after", ["low", "high"]), ("points", ["points_low", "points_high"])):
            average[ends] = mean_interval(groups[mean].to_numpy(), groups[ends].to_numpy())
        first = groups.index[0]
        groups.loc[first, "group"] = groups.loc[first, "group"].replace("references", "most harmed", 1)
        parts += [average.to_frame().T.assign(group="average of groups", examples=len(references)), groups]
    parts += [more for more in [by_group("targets", targets)] if len(more)]
    return pd.concat(parts, ignore_index=True).astype(dict(table.dtypes))


def margins(model: nn.Module, examples: Examples, *, device: str = "auto", output: Output | None = None) -> np.ndarray:
    """Return (examples,) margins of the correct answer, by default the class, against the runner-up logit."""
    runner = ModelRunner(device_copy(model, device, examples), margin_pair(output or CorrectClassMargin())[0])
    step = runner.batch_size
    blocks = (runner.load(examples, start, start + step) for start in range(0, len(examples), step))
    return np.concatenate([runner.base_output(block) for block in blocks])
