"""Forget every class and fix every error, on digits and cifar10, under both ablations: one table, one figure.

    COAR_DATA=/path/to/folder python benchmarks/edits.py
    python benchmarks/edits.py --pipelines digits

Components are chosen on the studied examples and judged on others. Runs and fits are made when they are missing.
Results go to reports/edits.
"""

import argparse
from pathlib import Path
from types import ModuleType

import pandas as pd
from matplotlib.figure import Figure

import coar
from pipelines import cifar10, digits

PIPELINES: dict[str, ModuleType] = {"digits": digits, "cifar10": cifar10}
CLASSES = range(10)


def run_tasks(name: str, ablation: str) -> tuple[list[dict[str, object]], pd.DataFrame]:
    """Run both tasks on one pipeline under one ablation; return rows of the table and the averaged curves."""
    pipeline = PIPELINES[name]
    study = pipeline.study(ablation=ablation)
    run = coar.collect(
        study,
        f"runs/{name}-{ablation}.zarr",
        masks=pipeline.MASKS,
        test_masks=pipeline.TEST_MASKS,
        test_fractions=pipeline.TEST_FRACTIONS,
    )
    common = (coar.fit(run), study.model, study.examples, pipeline.judge())
    rows: list[dict[str, object]] = []
    curves = []
    for label in CLASSES:
        result = coar.forget_class(*common, label=label)
        targets, references = (result.table.iloc[i] for i in range(2))
        rows.append(
            {
                "task": "forget",
                "target": str(label),
                "components": targets["components"],
                "target_before": targets["accuracy_before"],
                "target_after": targets["accuracy_after"],
                "others_before": references["accuracy_before"],
                "others_points": references["points"],
            }
        )
        curves.append(result.curve)
    forget = pd.concat(curves).groupby(["group", "components"], as_index=False)["accuracy"].mean()
    fixed = coar.fix_errors(*common)
    rows += [
        {
            "task": "fix",
            "target": f"id {row['id']}",
            "components": row["components"],
            "target_before": 0.0,
            "target_after": float(row["corrected"]),
            "others_before": row["judge_before"],
            "others_points": row["points"],
        }
        for _, row in fixed.table.iterrows()
    ]
    both = pd.concat([forget.assign(task="forget a class"), fixed.curve.assign(task="fix an error")])
    about = {"pipeline": name, "ablation": ablation}
    return [{**about, **row} for row in rows], both.assign(**about)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Average over classes, and over errors, per pipeline and ablation."""
    groups = rows.groupby(["pipeline", "task", "ablation"], sort=False)
    return groups.agg(
        edits=("target", "size"),
        components=("components", "mean"),
        target_before=("target_before", "mean"),
        target_after=("target_after", "mean"),
        others_points=("others_points", "mean"),
        worst_points=("others_points", "min"),
    ).reset_index()


def figure(curves: pd.DataFrame) -> Figure:
    """Draw accuracy of targets and others against the number of ablated components."""
    names, tasks = list(dict.fromkeys(curves["pipeline"])), list(dict.fromkeys(curves["task"]))
    drawing = Figure(figsize=(5 * len(tasks), 3.6 * len(names)), layout="constrained")
    grid = drawing.subplots(len(names), len(tasks), squeeze=False, sharex=True, sharey=True)
    colours = {"mean": "#4477aa", "zero": "#ee6677"}
    for (name, task, ablation, group), rows in curves.groupby(["pipeline", "task", "ablation", "group"]):
        axes = grid[names.index(name)][tasks.index(task)]
        line = "-" if group in ("targets", "errors") else "--"
        axes.plot(
            rows["components"], 100 * rows["accuracy"], line, color=colours[ablation], label=f"{group}, {ablation}"
        )
        axes.set_title(f"{name}: {task}", fontsize=10)
        axes.grid(alpha=0.25)
    for axes in grid[-1]:
        axes.set_xlabel("components ablated")
    for row in grid:
        row[0].set_ylabel("accuracy (%)")
        for axes in row:
            axes.legend(frameon=False, fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    return drawing


def main() -> None:
    """Run everything, print the summary, write tables and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipelines", choices=PIPELINES, nargs="+", default=list(PIPELINES))
    parser.add_argument("--ablations", choices=("mean", "zero"), nargs="+", default=["mean", "zero"])
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    curves = []
    for name in arguments.pipelines:
        for ablation in arguments.ablations:
            more, curve = run_tasks(name, ablation)
            rows += more
            curves.append(curve)
    folder = Path("reports/edits")
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(folder / "edits.csv", index=False)
    short = summary(table)
    short.to_csv(folder / "summary.csv", index=False)
    figure(pd.concat(curves)).savefig(folder / "edits.png", dpi=130)
    print(short.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(f"wrote {folder}/edits.csv, {folder}/summary.csv, {folder}/edits.png")


if __name__ == "__main__":
    main()
