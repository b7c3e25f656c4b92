"""Tables and figures of the results that edits.py kept in reports/edits/done/*.json.

python benchmarks/edits_report.py                # reports/edits
python benchmarks/edits_report.py another/folder
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

RULES = ("verified", "welch", "mask_gradient", "leave_one_out", "random")
COLOURS = dict(zip(RULES, ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#777777"), strict=True))
KEYS = ["task", "pipeline", "seed", "target"]
SPREAD = ("targets", "others_points", "worst_points")  # columns shown with their spread over seeds
ACCURACIES = {  # before and after, for tasks that have them
    "lowest": "worst group",
    "average": "average of groups",
    "clean": "clean references",
    "partners": "those of them that are targets too",
}
COSTS = np.linspace(0, 10, 401)  # allowed loss of others in figures, in points
PLAIN = ("components", "targets_at_same_harm", "reached", "passes", "cpu_seconds")


def compared(points: dict[str, dict[str, Any]]) -> Iterator[dict[str, object]]:
    """Yield a row per rule: the verified choice, and each other rule at its effect and at its harm."""
    mine = points["verified"]
    effect, harm, sign = mine["targets"][-1], mine["others_points"][-1], 1 if mine["increase"] else -1
    if mine["task"] == "fix":
        effect = 100.0  # other rules must correct an error even if the verified choice does not
    for rule in (rule for rule in RULES if rule in points):
        found = points[rule]
        targets, others = np.array(found["targets"]), np.array(found["others_points"])
        row: dict[str, object] = {**{key: found[key] for key in KEYS}, "rule": rule, "before": targets[0]}
        if rule == "verified":
            same, best = len(targets) - 1, len(targets) - 1
        else:
            reached = np.flatnonzero(sign * targets >= sign * effect)
            same = int(reached[0]) if len(reached) else -1
            harmless = np.flatnonzero(others >= min(harm, 0.0))
            best = int(harmless[np.argmax(sign * targets[harmless])])
        row["reached"] = same >= 0
        if same >= 0:
            row |= {"components": found["components"][same], "targets": targets[same], "others_points": others[same]}
            row["worst_points"] = found["worst_points"][same]
            for name in ACCURACIES.keys() & found.keys():
                row |= {f"{name}_before": found[name][0], name: found[name][same]}
        row["targets_at_same_harm"] = targets[best]
        yield row | {name: found[name] for name in ("passes", "seconds", "cpu_seconds")}


def pieces(folder: Path) -> list[dict[str, Any]]:
    """Return the kept results, one per target and rule."""
    return [json.loads(file.read_text()) for file in sorted((folder / "done").glob("*.json"))]


def read(folder: Path) -> pd.DataFrame:
    """Return a row per target and rule, for all targets with a verified choice."""
    by_target: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for found in pieces(folder):
        by_target.setdefault(tuple(found[key] for key in KEYS), {})[found["rule"]] = found
    return pd.DataFrame(row for points in by_target.values() if "verified" in points for row in compared(points))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Average over targets within seeds, then return the mean over seeds and the standard deviation between them."""
    keys = ["task", "pipeline", "rule"]
    columns = ["before", *SPREAD, *PLAIN]
    by_seed = rows.groupby([*keys, "seed"], sort=False)[columns].mean().groupby(keys, sort=False)
    sizes = rows.groupby(keys, sort=False).agg(seeds=("seed", "nunique"), edits=("seed", "size"))
    spread = by_seed[list(SPREAD)].std().add_suffix("_sd")
    return sizes.join(by_seed.mean()).join(spread).reset_index()


def markdown(short: pd.DataFrame) -> str:
    """Return the summary as a Markdown table, with a dash if no number of components had the effect."""
    lines = [
        "| task | rule | edits, seeds | reached | components | targets before -> after (%) | others (points) | "
        "worst group (points) | targets at the same harm (%) | passes | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in short.to_dict("records"):
        cells = {name: _spread(row[name], row[f"{name}_sd"], sign="" if name == "targets" else "+") for name in SPREAD}
        count = "-" if np.isnan(row["components"]) else f"{row['components']:.0f}"
        lines.append(
            f"| {row['task']}, {row['pipeline']} | {row['rule']} | {row['edits']}, {row['seeds']} | "
            f"{row['reached']:.0%} | {count} | {row['before']:.1f} -> {cells['targets']} | {cells['others_points']} | "
            f"{cells['worst_points']} | {row['targets_at_same_harm']:.1f} | {row['passes']:,.0f} | "
            f"{row['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def corrections(rows: pd.DataFrame) -> str:
    """Return the number of errors that each rule corrects, and of those at a cost of at most half a point."""
    lines = []
    for (pipeline, rule), some in rows[rows["task"] == "fix"].groupby(["pipeline", "rule"], sort=False):
        right = some["targets"] == 100
        cheap = right & (some["others_points"] >= -0.5)
        lines.append(
            f"- {pipeline}, {rule}: {right.sum()} of {len(some)} errors corrected ({right.mean():.0%}), {cheap.sum()} "
            f"of them at a cost of at most 0.5 points ({cheap.mean():.0%} of all); the dearest "
            f"{some.loc[right, 'others_points'].min():+.2f}"
        )
    return "\n".join(lines) + "\n"


def accuracies(rows: pd.DataFrame) -> str:
    """Return accuracies before and after, by group and on clean partners of targets, for tasks that have them."""
    lines = []
    for (pipeline, rule), some in rows[rows["reached"]].groupby(["pipeline", "rule"], sort=False):
        parts = [
            f"{text} {some[f'{name}_before'].mean():.1f} -> {_spread(some[name].mean(), some[name].std(), sign='')} %"
            for name, text in ACCURACIES.items()
            if name in some and some[name].notna().any()
        ]
        lines += [f"- {pipeline}, {rule}: {', '.join(parts)}"] if parts else []
    return "\n".join(lines) + "\n"


def _spread(mean: float, spread: float, *, sign: str) -> str:
    if np.isnan(mean):
        return "-"
    return f"{mean:{sign}.2f}" if np.isnan(spread) else f"{mean:{sign}.2f} ± {spread:.2f}"


def best_within(found: dict[str, Any]) -> np.ndarray:
    """Return the (costs,) best accuracy on targets that a rule reaches at no more than each of `COSTS`."""
    targets, costs = np.array(found["targets"]), -np.array(found["others_points"])
    sign = 1 if found["increase"] else -1
    allowed = costs[:, None] <= COSTS  # (numbers of components, costs); zero components cost nothing
    return np.asarray(sign * np.where(allowed, sign * targets[:, None], -np.inf).max(0))


def figure(kept: list[dict[str, Any]], task: str) -> Figure:
    """Draw accuracy on targets, averaged over edits, or the share of errors corrected, against cost."""
    names = list(dict.fromkeys(found["pipeline"] for found in kept))
    drawing = Figure(figsize=(5 * len(names), 3.8), layout="constrained")
    for axes, name in zip(drawing.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for rule in RULES:
            some = [best_within(one) for one in kept if (one["pipeline"], one["rule"]) == (name, rule)]
            if some:
                share = np.mean([100.0 * (one == 100) for one in some] if task == "fix" else some, axis=0)
                axes.plot(COSTS, share, color=COLOURS[rule], label=rule)
        title = "errors corrected (%)" if task == "fix" else "accuracy on targets (%)"
        axes.set(xlabel="cost to others, at most (points)", ylabel=title, ylim=(-2, 102), title=f"{task}: {name}")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return drawing


def write(folder: Path) -> None:
    """Write the tables of all tasks, their figures and the summary, and print the summary."""
    rows, kept = read(folder), pieces(folder)
    for task, some in rows.groupby("task", sort=False):
        some.to_csv(folder / f"{task}.csv", index=False)
        figure([one for one in kept if one["task"] == task], str(task)).savefig(folder / f"{task}.png", dpi=130)
    table = markdown(summary(rows)) + "\n" + corrections(rows) + accuracies(rows)
    (folder / "summary.md").write_text(table)
    print(table)
    print(f"wrote tables and figures into {folder}")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "reports/edits"))
