"""One self-contained page about an edit, for people who decide whether to use it."""

import base64
import html
import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coar.charts import accuracy_changes, html_table
from coar.editing.edit import Edit
from coar.editing.last_layer import LastLayerComparison
from coar.errors import StorageError

if TYPE_CHECKING:
    import pandas as pd

GROUPS = 30  # in the figure, at most
LAYERS = 12  # listed, at most
HARMED = "most harmed: "  # start of a group's name in a judgement
METHODS = (("before", "before"), ("edit", "by the edit"), ("last_layer", "by retraining"))
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 0.85rem; } th, td { padding: 0.2rem 0.6rem; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) { background: #8881; }
.wide { overflow-x: auto; } img { max-width: 100%; background: white; } dt { font-weight: 600; }
:root { color-scheme: light dark; }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write_handout(
    path: str | Path,
    *,
    name: str,
    edits: Sequence[Edit],
    table: "pd.DataFrame",
    components: int,
    chosen_on: int,
    passes: int,
    versus: LastLayerComparison | None,
) -> Path:
    """Write the page, and return its path.

    Args:
        path: The file to write.
        name: Name of the task.
        edits: The edits that it made.
        table: The judgement, see `coar.editing.judge.judgement`, or a row per error.
        components: Number of components of the model.
        chosen_on: Number of examples that the components were chosen on.
        passes: Forward passes of one example that the choice took.
        versus: The same task by retraining the last layer.

    Raises:
        StorageError: When the file cannot be written.
    """
    grouped = "group" in table
    sections = [f"<h1>{html.escape(name)}</h1>"]
    if grouped:
        sections += [_summary(table, edits), _figure(table)]
    sections += ["<h2>Judged examples</h2>", _table(table), "<p>" + _explanation(grouped) + "</p>"]
    if versus is not None:
        sections += ["<h2>The alternative: retraining the last layer</h2>", _alternative(versus), _table(versus.table)]
    sections += ["<h2>What was changed</h2>", _changes(edits, components, chosen_on, passes)]
    page = PAGE.format(title=html.escape(name), style=STYLE, body="\n".join(sections))
    file = Path(os.path.expanduser(path))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write the page to {file}: {error}; choose another path") from error
    return file


def _summary(table: "pd.DataFrame", edits: Sequence[Edit]) -> str:
    """Return gain, cost and risk in words."""
    rows = _by_group(table)
    targets, references = rows["targets"], rows["references"]
    goal = edits[0].goal if edits else None
    wanted = "" if goal is None else f" The goal was to {goal.direction} the output of {goal.targets!r}."
    lines = [
        f"Of {targets['examples']:.0f} target examples the model got {targets['accuracy_before']:.1%} right before the "
        f"edit and {targets['accuracy_after']:.1%} after it, a change of {_points(targets)}.{wanted}",
        f"Of {references['examples']:.0f} other examples it got {references['accuracy_before']:.1%} right before and "
        f"{references['accuracy_after']:.1%} after, a change of {_points(references)}.",
    ]
    for name, row in rows.items():
        if name.startswith(HARMED):
            lines.append(
                f"Of these, the group with the worst change is {name.removeprefix(HARMED)!r}, {row['examples']:.0f} "
                f"examples: {_points(row)}."
            )
    lines.append(
        f"Risk: intervals have 95 % coverage for examples like the judged ones. At the unfavourable end, other "
        f"examples change by {references['points_low']:+.1f} points. Examples of another kind may change more."
    )
    return "\n".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _by_group(table: "pd.DataFrame") -> dict[str, dict[str, float]]:
    return table.set_index("group").to_dict("index")  # type: ignore[return-value]


def _points(row: dict[str, float]) -> str:
    return f"{row['points']:+.1f} points (95 % interval {row['points_low']:+.1f} to {row['points_high']:+.1f})"


def _figure(table: "pd.DataFrame") -> str:
    """Return the accuracies before and after as a picture in the page."""
    from matplotlib.figure import Figure

    shown = table.head(GROUPS)
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(shown)), layout="constrained")
    accuracy_changes(figure.subplots(), shown)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    picture = base64.b64encode(file.getvalue()).decode()
    note = f" The first {GROUPS} of {len(table)} rows." if len(table) > GROUPS else ""
    return (
        f'<figure><img src="data:image/png;base64,{picture}" alt="Accuracy of every group before and after the edit; '
        f'the table below has the numbers"><figcaption>Accuracy before (open) and after (filled), with 95 % intervals.'
        f"{note}</figcaption></figure>"
    )


def _table(table: "pd.DataFrame") -> str:
    return f'<div class="wide" tabindex="0" role="region" aria-label="table">{html_table(table)}</div>'


def _explanation(grouped: bool) -> str:
    if not grouped:
        return "A row per error; judge_before and judge_after are accuracies on the judging examples."
    return (
        "low and high are Wilson's 95 % interval of the accuracy after; points is the change, and points_low and "
        "points_high are Newcombe's 95 % interval of it, for the same examples before and after."
    )


def _alternative(versus: LastLayerComparison) -> str:
    rows = _by_group(versus.table)
    worst, everything = (
        ", ".join(f"{rows[name][method]:.1%} {words}" for method, words in METHODS) for name in ("worst group", "all")
    )
    lines = [
        f"The layer {versus.layer!r} was trained anew on groups of equal size (deep feature reweighting, Kirichenko et "
        f"al. 2022), by a logistic regression on {versus.examples} examples at a time. Both were judged on the same "
        f"examples.",
        f"Worst group: {worst}. All examples: {everything}. On all examples the accuracy of the edit less that of the "
        f"retrained layer is {_points(rows['all'])}.",
    ]
    return "\n".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _changes(edits: Sequence[Edit], components: int, chosen_on: int, passes: int) -> str:
    """Return what the edits change, where, and how they are undone."""
    sizes = ", ".join(str(len(edit)) for edit in edits) or "none"
    layers = Counter(component.site for edit in edits for component in edit.components)
    listed = ", ".join(f"{site} ({count})" for site, count in layers.most_common(LAYERS))
    more = f" and {len(layers) - LAYERS} more layers" if len(layers) > LAYERS else ""
    strengths = [strength for edit in edits for strength in edit.strengths]
    part = f"from {min(strengths):.2f} to {max(strengths):.2f}" if strengths else "none"
    kept = bool(edits) and all(edit.originals is not None for edit in edits)
    rows = {
        "Components changed": f"{sizes} of {components}",
        "Layers": f"{listed}{more}" or "none",
        "Strength": f"{part}; 1 replaces a component by constants, less than 1 does so in part",
        "Chosen on": f"{chosen_on:,} examples, by {passes:,} forward passes of one example",
        "Undo": "restores the original weights bit for bit: edit.undo(model), or coar undo on the files"
        if kept
        else "not possible from the edit alone; keep the original weights",
    }
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in rows.items()) + "</dl>"
