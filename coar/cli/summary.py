"""Short tables of scores and edits for a terminal."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from coar.editing.result import TaskResult
    from coar.evaluation import Evaluation


def scores(evaluation: "Evaluation") -> str:
    """Return an evaluation at the ablated fraction of the training masks: a row per fit, the best first."""
    import pandas as pd

    table = evaluation.table
    nearest = (table["ablated_fraction"] - evaluation.ablated_fraction).abs()
    rows = table[nearest == nearest.min()].sort_values("pearson", ascending=False)
    shown = pd.DataFrame(
        {
            "": rows["fit"],
            "masks": rows["masks"].map("{:,}".format),
            "gradients": rows["gradients"].map("{:,}".format),
            "correlation": rows["pearson"].map("{:.3f}".format),
            "95 % interval": [f"{low:.3f} to {high:.3f}" for low, high in zip(rows["low"], rows["high"], strict=True)],
            "worst tenth": rows["tenth_percentile"].map("{:.3f}".format),
            "slope": rows["slope"].map("{:.2f}".format),
        }
    )
    return _indented(shown)


def changes(result: "TaskResult") -> str:
    """Return the effect of a task: accuracy by group before and after, or a row per error."""
    return _groups(result.table) if "group" in result.table else _errors(result.table)


def heading(result: "TaskResult", components: int) -> str:
    """Return one line: the result of a task, and the passes of one example that its choice took."""
    passes = f"{sum(chosen.passes for chosen in result.selections):,} passes of one example"
    if "group" in result.table:
        return f"{result.name}: {len(result.edits[0])} of {components} components ablated ({passes})"
    return f"{result.name}: {len(result.edits)} of {len(result.table)} errors corrected ({passes})"


def _groups(table: "pd.DataFrame") -> str:
    """Return accuracies by group, with intervals for those after the edit."""
    import pandas as pd

    counted = table[table["group"].str.match("(?:targets|references)$|most harmed: ")]
    shown = pd.DataFrame(
        {
            "": counted["group"],
            "examples": counted["examples"].map("{:,.0f}".format),
            "right before": counted["accuracy_before"].map("{:.1%}".format),
            "right after": counted["accuracy_after"].map("{:.1%}".format),
            "95 % interval": [
                f"{100 * low:.1f} to {100 * high:.1f} %"
                for low, high in zip(counted["low"], counted["high"], strict=True)
            ],
            "change": counted["points"].map("{:+.1f} points".format),
        }
    )
    return _indented(shown)


def _errors(table: "pd.DataFrame") -> str:
    """Return a row per error: whether it is corrected, and accuracy on the judging examples before and after."""
    import pandas as pd

    shown = pd.DataFrame(
        {
            "error": [f"id {name}" for name in table["id"]],
            "label": table["label"],
            "corrected": table["corrected"].map({True: "yes", False: "no"}),
            "ablated": table["components"],
            "strength": table["strength"].map("{:.2f}".format),
            "its margin": [
                f"{before:+.2f} to {after:+.2f}"
                for before, after in zip(table["margin_before"], table["margin_after"], strict=True)
            ],
            "others right": [
                f"{before:.1%} to {after:.1%}"
                for before, after in zip(table["judge_before"], table["judge_after"], strict=True)
            ],
        }
    )
    return _indented(shown)


def _indented(table: "pd.DataFrame") -> str:
    """Return a table with its first column on the left, indented by two columns."""
    first = table.columns[0]
    width = table[first].str.len().max()
    left = table.assign(**{first: table[first].str.ljust(width)})
    return "\n".join(f"  {line}" for line in str(left.to_string(index=False)).splitlines())
