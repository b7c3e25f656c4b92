"""Tables and figures of evaluations and edits, as files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from coar.charts import colours, tidy
from coar.editing.edit import Edit
from coar.editing.facts.editor import FactEdit
from coar.editing.result import TaskResult
from coar.errors import StorageError
from coar.evaluation import Evaluation
from coar.examples import Examples
from coar.lenses.reading import LensReading
from coar.tracing.trace import Trace

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def write_evaluation(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write an evaluation's tables and figure into a folder; return the files."""
    files = [folder / "evaluation.csv", folder / "evaluation_per_example.csv", folder / "evaluation.png"]
    with _writing(folder):
        evaluation.table.to_csv(files[0], index=False)
        evaluation.per_example.to_csv(files[1], index=False)
        evaluation_figure(evaluation).savefig(files[2], dpi=130)
    return files


def write_task(result: TaskResult, model: nn.Module, folder: Path, examples: Examples) -> list[Path]:
    """Write a task's edits, edited weights, tables and figure into a folder; return the files."""
    files = [folder / "table.csv", folder / "curve.csv", folder / "curve.png"]
    with _writing(folder):
        result.table.to_csv(files[0], index=False)
        result.curve.to_csv(files[1], index=False)
        figure = Figure(figsize=(6, 4), layout="constrained")
        result.plot(figure.subplots())
        figure.savefig(files[2], dpi=130)
    for number, edit in enumerate(result.edits):
        files += write_edit(edit, model, folder, examples, stem="edit" if len(result.edits) == 1 else f"edit-{number}")
    return files


def write_edit(edit: Edit, model: nn.Module, folder: Path, examples: Examples, *, stem: str = "edit") -> list[Path]:
    """Write an edit as JSON and the edited model's weights as safetensors; return the files.

    Where the edit gives layers a bias, a third file has the code that loads the weights into the model.

    Args:
        edit: The edit.
        model: The model it was made for.
        folder: Where to write.
        examples: Examples of the model's inputs, by which the weights are checked, see `Edit.save_state_dict`.
        stem: Start of the files' names.
    """
    files = [folder / f"{stem}.json", folder / f"{stem}.safetensors"]
    edit.save(files[0])
    saved = edit.save_state_dict(model, files[1], examples)
    if saved.new_parameters:
        files.append(folder / f"{stem}-loading.py")
        files[2].write_text(saved.loading + "\n")
    return files


def write_fact_edit(result: FactEdit, model: nn.Module, folder: Path, examples: Examples) -> list[Path]:
    """Write an edit of facts, the edited model as transformers loads it, and the tables; return the files."""
    files = [folder / "table.csv", folder / "rounds.csv", folder / "edit.json"]
    with _writing(folder):
        result.table.to_csv(files[0], index=False)
        result.rounds.to_csv(files[1], index=False)
    result.edit.save(files[2])
    return [*files, result.edit.save_pretrained(model, folder / "model", examples).path]


def write_trace(trace: Trace, folder: Path) -> list[Path]:
    """Write a trace's tables and heat maps into a folder; return the files."""
    stem = folder / f"trace-{trace.corruption}"
    files = [stem.with_suffix(".csv"), folder / f"{stem.name}-per-fact.csv", stem.with_suffix(".png")]
    with _writing(folder):
        trace.table.to_csv(files[0], index=False)
        trace.per_fact.to_csv(files[1], index=False)
        save_figure(trace.plot(), files[2])
    return files


def write_lenses(table: "pd.DataFrame", readings: Mapping[str, LensReading], folder: Path) -> list[Path]:
    """Write the divergences of lenses as a table and a figure, and what they read as heat maps; return the files."""
    files = [folder / "lens.csv", folder / "lens.png"]
    with _writing(folder):
        table.to_csv(files[0], index=False)
        lens_figure(table).savefig(files[1], dpi=130)
        for kind, reading in readings.items():
            files += [folder / f"lens-{kind}.csv", folder / f"lens-{kind}.png"]
            reading.table.to_csv(files[-2], index=False)
            save_figure(reading.plot(), files[-1])
    return files


def lens_figure(table: "pd.DataFrame") -> Figure:
    """Return the divergence of each kind of lens before each layer, with its interval; see `Lens.summary`."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(table["kind"]))
    for colour, kind in zip(colours(len(kinds)), kinds, strict=True):
        own = table[table["kind"] == kind]
        axes.plot(own["layer"], own["kl"], color=colour, marker="o", markersize=3, label=kind)
        axes.fill_between(own["layer"], own["low"], own["high"], color=colour, alpha=0.2, linewidth=0)
    axes.set(yscale="log", xlabel="before layer", ylabel="KL(model || lens) in nats, on held-out texts")
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False)
    tidy(axes)
    return figure


def save_figure(axes: "Axes", file: Path) -> None:
    """Write the figure of some axes that pyplot made, and close it."""
    import matplotlib.pyplot as plt

    figure = cast("Figure", axes.get_figure(root=True))  # None only for axes that were removed
    figure.savefig(file, dpi=130)
    plt.close(figure)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise StorageError(f"cannot write into {folder}: {error}; free space or choose another folder") from error


def evaluation_figure(evaluation: Evaluation) -> Figure:
    """Draw the distribution of held-out correlations over examples, and their mean with its interval.

    The mean is drawn against the ablated fraction, or fit by fit where there is only one fraction.
    """
    table = evaluation.table
    names = list(dict.fromkeys(table["fit"]))
    fractions = sorted(set(table["ablated_fraction"]))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    evaluation.plot(left)
    for colour, name in zip(colours(len(names)), names, strict=True):
        rows = table[table["fit"] == name].sort_values("ablated_fraction")
        error = np.abs(rows[["low", "high"]].to_numpy().T - rows["pearson"].to_numpy())
        style = {"marker": "o", "capsize": 3, "label": name, "color": colour}
        if len(fractions) == 1:
            right.errorbar(rows["pearson"], [name], xerr=error, **style)
        else:
            right.errorbar(rows["ablated_fraction"], rows["pearson"], error, **style)
    mean = "mean held-out correlation"
    if len(fractions) == 1:
        right.set(xlabel=mean)
        right.margins(y=0.2)
        right.invert_yaxis()  # the first fit on top
    else:
        right.set(xlabel="ablated fraction", ylabel=mean, xticks=fractions)
    tidy(right)
    return figure


def compact(table: "pd.DataFrame") -> "pd.DataFrame":
    """Return an evaluation's table without the columns that need width; `undefined` is kept if any is above 0."""
    short = {"ablated_fraction": "fraction", "tenth_percentile": "p10", "explained_variance": "R2"}
    shown = table.drop(columns=["test_masks", "median"]).rename(columns=short)
    return shown if shown["undefined"].any() else shown.drop(columns="undefined")
