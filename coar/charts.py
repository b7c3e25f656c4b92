"""Charts on matplotlib axes and tables in HTML, for notebooks, from plain numbers."""

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")  # Paul Tol's bright scheme
FOR, AGAINST = "#0072b2", "#d55e00"  # Okabe and Ito (2008): above 0 and below
ROW = 0.26  # inches of height of a bar


def axes_or_new(ax: "Axes | None", *, width: float = 6.5, height: float = 4.0) -> "Axes":
    """Return the given axes, or those of a new figure of a size in inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    _, made = plt.subplots(figsize=(width, height), layout="constrained")
    return made


def signed_bars(
    ax: "Axes | None", names: Sequence[str], values: np.ndarray, half: np.ndarray | None = None, *, xlabel: str
) -> "Axes":
    """Draw a horizontal bar per name, the first on top, blue above 0 and orange below.

    Args:
        ax: The axes; None for a new figure.
        names: The names.
        values: (names,) lengths.
        half: (names,) half widths of intervals, drawn as lines; None for none.
        xlabel: What the lengths are.
    """
    axes = axes_or_new(ax, height=1.0 + ROW * len(names))
    places = np.arange(len(names))
    axes.barh(places, values, color=[AGAINST if value < 0 else FOR for value in values])
    if half is not None:
        axes.errorbar(values, places, xerr=half, fmt="none", ecolor="#444444", elinewidth=1, capsize=2)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_yticks(places, [plain_text(name) for name in names])
    axes.set(xlabel=xlabel)
    axes.invert_yaxis()
    return tidy(axes)


def split_bars(ax: "Axes | None", names: Sequence[str], above: np.ndarray, below: np.ndarray, *, xlabel: str) -> "Axes":
    """Draw, per name, a blue bar of (names,) numbers above 0 and an orange one of those below."""
    axes = axes_or_new(ax, height=1.0 + ROW * len(names))
    places = np.arange(len(names))
    axes.barh(places, above, color=FOR, label="for")
    axes.barh(places, below, color=AGAINST, label="against")
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_yticks(places, [plain_text(name) for name in names])
    axes.set(xlabel=xlabel)
    axes.invert_yaxis()
    axes.legend(frameon=False)
    return tidy(axes)


def signed_grid(ax: "Axes | None", names: Sequence[str], cells: np.ndarray, *, xlabel: str, title: str) -> "Axes":
    """Draw (names, columns) numbers as coloured cells, orange below 0 and blue above; NaN cells are empty."""
    from matplotlib.colors import LinearSegmentedColormap

    axes = axes_or_new(ax, width=1.5 + 0.3 * cells.shape[1], height=1.2 + 0.3 * len(names))
    largest = float(np.nanmax(np.abs(cells))) or 1.0
    palette = LinearSegmentedColormap.from_list("against to for", [AGAINST, "#f4f5f7", FOR])
    drawn = axes.imshow(cells, cmap=palette, vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    axes.set_yticks(np.arange(len(names)), [plain_text(name) for name in names])
    axes.set(xlabel=xlabel, title=title)
    axes.locator_params(axis="x", integer=True)
    axes.figure.colorbar(drawn, ax=axes)
    return axes


def share_grid(
    ax: "Axes | None",
    names: Sequence[str],
    columns: Sequence[str],
    cells: np.ndarray,
    *,
    most: float,
    xlabel: str,
    label: str,
) -> "Axes":
    """Draw (names, columns) numbers from 0 to `most` as coloured cells with a colour bar; NaN cells are empty."""
    axes = axes_or_new(ax, width=max(6.0, 0.3 * len(columns) + 3), height=max(2.0, 1.2 + 0.28 * len(names)))
    drawn = axes.imshow(cells, cmap="cividis", vmin=0, vmax=most, aspect="auto", interpolation="nearest")
    axes.set_yticks(np.arange(len(names)), [plain_text(name) for name in names])
    step = max(1, len(columns) // 15)
    axes.set_xticks(np.arange(0, len(columns), step), [plain_text(name) for name in columns[::step]])
    axes.set(xlabel=xlabel)
    axes.figure.colorbar(drawn, ax=axes, label=label)
    return axes


def distributions(ax: "Axes | None", values: Mapping[str, np.ndarray], *, xlabel: str) -> "Axes":
    """Draw the share of numbers up to each number, a line per name."""
    axes = axes_or_new(ax)
    for colour, (name, numbers) in zip(colours(len(values)), values.items(), strict=True):
        axes.ecdf(numbers, label=plain_text(name), color=colour)
    axes.set(xlabel=xlabel, ylabel="share of examples below")
    axes.legend(frameon=False)
    return tidy(axes)


def accuracy_curves(ax: "Axes | None", curve: "pd.DataFrame", *, title: str, counts: Sequence[int] = ()) -> "Axes":
    """Draw `accuracy` of each `group` against the number of ablated `components`, with some numbers marked."""
    axes = axes_or_new(ax)
    groups = list(dict.fromkeys(curve["group"]))
    for colour, group in zip(colours(len(groups)), groups, strict=True):
        rows = curve[curve["group"] == group]
        axes.plot(rows["components"], 100 * rows["accuracy"], label=plain_text(group), color=colour)
    for number, count in enumerate(sorted(set(counts))):
        axes.axvline(count, color="#bbbbbb", linewidth=1, zorder=0, label="chosen" if number == 0 else None)
    axes.set(xlabel="components ablated", ylabel="accuracy (%)", title=plain_text(title), ylim=(-3, 103))
    axes.legend(frameon=False)
    return tidy(axes)


def accuracy_changes(ax: "Axes | None", table: "pd.DataFrame") -> "Axes":
    """Draw accuracies of every `group` before (open) and after (filled), the latter with their intervals.

    Args:
        ax: The axes; None for new ones.
        table: Columns `group`, `accuracy_before`, `accuracy_after`, and `low` and `high`, the interval after.
    """
    axes = axes_or_new(ax, height=1.0 + ROW * len(table))
    places = np.arange(len(table))
    before, after, low, high = (
        100 * table[name].to_numpy() for name in ("accuracy_before", "accuracy_after", "low", "high")
    )
    axes.hlines(places, before, after, color="#bbbbbb", linewidth=2, zorder=1)
    axes.errorbar(after, places, xerr=[after - low, high - after], fmt="o", color=FOR, capsize=2, label="after")
    axes.plot(before, places, "o", markerfacecolor="white", markeredgecolor=AGAINST, label="before")
    axes.set_yticks(places, [plain_text(name) for name in table["group"]])
    axes.set(xlabel="accuracy (%)", xlim=(-3, 103))
    axes.invert_yaxis()
    axes.legend(frameon=False)
    return tidy(axes)


def colours(count: int) -> list[str]:
    """Return colours that colour-blind people can distinguish, repeated after the seventh."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def plain_text(text: object) -> str:
    """Return text in which a dollar sign starts no formula."""
    return str(text).replace("$", r"\$")


def tidy(axes: "Axes") -> "Axes":
    """Remove the frame's upper and right side, and add a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return axes


def html_table(table: "pd.DataFrame") -> str:
    """Return a table as HTML, with three decimals, and with its words escaped."""
    return str(table.to_html(index=False, escape=True, float_format=lambda value: f"{value:.3f}", border=0))


def html_facts(title: str, facts: Mapping[str, object]) -> str:
    """Return a title and named facts as HTML, with all words escaped."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in facts.items()
    )
    return f"<p>{html.escape(title)}</p><table>{rows}</table>"
