"""Tables and figures of accuracy_per_pass.py, from its curves alone.

python benchmarks/passes_report.py reports/benchmarks            # reads tables and writes figures in the folder
python benchmarks/passes_report.py one other reports/benchmarks  # reads tables of two folders, writes to the third
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

CURVES = {
    "informed": "#ee6677",
    "learned ends": "#aa3377",
    "trapezoid": "#bb8844",
    "mean gradient": "#ccbb44",
    "ols": "#4477aa",
    "ridge": "#66ccee",
    "lasso": "#228833",
}
POINTS = {
    "mask gradient": "#000000",
    "leave-one-out": "#777777",
    "conductance": "#993311",
    "internal influence": "#332288",
}


def frontier(curve: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a curve, averaged over seeds, that no cheaper row beats, sorted by passes."""
    mean = curve.groupby(["gradients", "masks"], as_index=False)[["r", "passes", "nominal", "seconds"]].mean()
    mean = mean.sort_values("passes")
    return mean[mean["r"] > mean["r"].cummax().shift(fill_value=-1.0)]


def passes_for(curve: pd.DataFrame, target: float, cost: str = "passes") -> float:
    """Return the cost at which a frontier reaches a correlation, linear in the logarithm between its points."""
    found = frontier(curve)
    if found["r"].max() < target:
        return float("nan")
    return float(np.exp(np.interp(target, found["r"], np.log(found[cost]))))


def savings(curves: pd.DataFrame) -> pd.DataFrame:
    """Return, per model and number of masks, the correlation of regression and the passes of informed fits for it."""
    rows = []
    for model, table in curves.groupby("model", sort=False):
        plain, quick = table[table["method"].isin(["ols", "ridge"])], table[table["method"] == "informed"]
        for (method, masks), part in plain.groupby(["method", "masks"]):
            target = float(part["r"].mean())
            row = {"model": model, "components": int(table["components"].iloc[0]), "method": method, "masks": masks}
            row |= {"r": target, "spread": float(part["r"].std())}
            row |= {
                "informed passes": passes_for(quick, target),
                "at 2.5 a mask gradient": passes_for(quick, target, "nominal"),
            }
            row["times fewer"] = masks / row["informed passes"]
            rows.append(row)
    return pd.DataFrame(rows)


def curve_figure(curves: pd.DataFrame) -> Figure:
    """Draw held-out correlation against passes, one panel a model."""
    models = list(dict.fromkeys(curves["model"]))
    figure = Figure(figsize=(5.2 * len(models), 4.2), layout="constrained")
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        table = curves[curves["model"] == model]
        for method, colour in (CURVES | POINTS).items():
            part = table[table["method"] == method]
            if len(part) and method in CURVES:
                line = frontier(part)
                axis.plot(line["passes"], line["r"], "o-", color=colour, ms=4, label=method)
                axis.plot(part["passes"], part["r"], ".", color=colour, ms=3, alpha=0.4)
            elif len(part):
                axis.plot(part["passes"], part["r"], "D", color=colour, ms=6, label=method)
        axis.set(
            xscale="log", xlabel="forward passes over the examples", title=f"{model}, {table['components'].iloc[0]:,}"
        )
        axis.set_ylim(bottom=max(0.0, float(table["r"].min()) - 0.03))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("held-out correlation, mean over examples")
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def ratio_figure(table: pd.DataFrame) -> Figure:
    """Draw the factor by which informed fits need fewer passes, against the number of components."""
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axis = figure.subplots()
    best = table.loc[table.groupby(["model", "masks"])["r"].idxmax()].dropna(subset=["times fewer"])
    for colour, (masks, part) in zip(CURVES.values(), best[best["masks"] >= 1000].groupby("masks"), strict=False):
        line = part.sort_values("components")
        axis.plot(line["components"], line["times fewer"], "o-", color=colour, label=f"{masks:,} masks")
        for _, row in line.iterrows():
            place = (row["components"], row["times fewer"])
            axis.annotate(row["model"], place, fontsize=8, xytext=(4, 4), textcoords="offset points")
    axis.set(xscale="log", yscale="log", xlabel="components", ylabel="times fewer passes at the same correlation")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False, title="regression's masks")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def write(curves: pd.DataFrame, shares: pd.DataFrame, folder: Path) -> None:
    """Print markdown tables and write figures."""
    columns = ["model", "method", "gradients", "masks"]
    mean = curves.groupby(columns, sort=False, as_index=False).agg(
        r=("r", "mean"),
        spread=("r", "std"),
        passes=("passes", "mean"),
        nominal=("nominal", "mean"),
        seconds=("seconds", "mean"),
    )
    table = savings(curves)
    formats = {"float_format": lambda value: f"{value:.4g}", "index": False}
    for heading, frame in (("Correlation", mean), ("Same accuracy", table), ("Coverage of 95 % intervals", shares)):
        print(f"\n## {heading}\n\n{frame.to_string(**formats)}", flush=True)
    curve_figure(curves).savefig(folder / "accuracy_per_pass.png", dpi=130)
    ratio_figure(table).savefig(folder / "ratio.png", dpi=130)


def read(folders: list[Path], name: str) -> pd.DataFrame:
    """Join the tables of several folders."""
    files = [folder / name for folder in folders]
    return pd.concat([pd.read_csv(file) for file in files if file.stat().st_size > 1], ignore_index=True)


if __name__ == "__main__":
    *given, out = [Path(name) for name in sys.argv[1:]]
    given = given or [out]
    out.mkdir(parents=True, exist_ok=True)
    write(read(given, "accuracy_per_pass.csv"), read(given, "coverage.csv"), out)
