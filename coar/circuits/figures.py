"""Figures of circuits: divergence by the number of edges, and a drawing of a small circuit, layer by layer."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from coar.charts import axes_or_new, colours, tidy
from coar.components.decoder import find_decoder
from coar.components.edges import ARROW

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

PORTS = {"q": "#4477aa", "k": "#ee6677", "v": "#228833"}  # colours of edges into queries, keys and values
OTHER = "#777777"
DRAWN = 150  # most edges of a drawing


def draw_sizes(ax: "Axes | None", table: "pd.DataFrame") -> "Axes":
    """Draw the KL divergence on held-out examples against the number of edges, one line per method.

    Args:
        ax: Where to draw; None for a new figure.
        table: Columns `method`, `edges` and `kl`.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    axes = axes_or_new(ax, width=6.5, height=4.5)
    methods = list(dict.fromkeys(table["method"]))
    for colour, method in zip(colours(len(methods)), methods, strict=True):
        ordered = table[table["method"] == method].sort_values("edges")
        axes.plot(ordered["edges"], ordered["kl"], marker="o", color=colour, label=str(method))
    axes.set(xlabel="edges of the circuit", ylabel="held-out KL divergence (nats)", xscale="log", yscale="log")
    sizes = sorted(set(table["edges"]))
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)
    return tidy(axes)


def draw_circuit(ax: "Axes | None", edges: Sequence[str], model: nn.Module | None) -> "Axes":
    """Draw edges from the embedding below to the output above, one row for heads and one for the MLP of a layer.

    Edges into queries, keys and values have different colours.

    Args:
        ax: Where to draw; None for a new figure.
        edges: Labels of edges, such as `L0.H1 -> L1.mlp`.
        model: The model of the edges: keys and values that several heads share are drawn into all of these heads that
            write along an edge. Without it they are nodes of their own, such as `L0.G0`.
    """
    pairs = [(name.partition(ARROW)[0], name.partition(ARROW)[2]) for name in edges]
    ends = _own_ends(pairs) if model is None else _ends({writer for writer, _ in pairs}, model)
    labels = dict.fromkeys([writer for writer, _ in pairs] + [end for _, reader in pairs for end in ends[reader]])
    places = _places(list(labels))
    rows = len({y for _, y in places.values()})
    axes = axes_or_new(ax, width=9, height=max(3.0, 0.55 * rows))
    for writer, reader in pairs:
        colour = PORTS.get(reader.rpartition(".")[2], OTHER)
        for end in ends[reader]:
            style = {"arrowstyle": "-|>", "color": colour, "alpha": 0.6, "shrinkA": 9, "shrinkB": 9}
            axes.annotate("", xy=places[end], xytext=places[writer], arrowprops=style)
    box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "#444444", "linewidth": 0.8}
    for label, (x, y) in places.items():
        axes.text(x, y, label, ha="center", va="center", fontsize=8, bbox=box)
    for port, colour in PORTS.items():
        axes.plot([], [], color=colour, label={"q": "queries", "k": "keys", "v": "values"}[port])
    axes.plot([], [], color=OTHER, label="MLP, output")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set(xlim=(-0.6, 0.6), ylim=(-0.6, rows - 0.4))
    axes.set_axis_off()
    return axes


def _own_ends(pairs: Sequence[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Return, for each reader, the node that it is a port of: `L1.H0` for `L1.H0.q`."""
    return {reader: (re.sub(r"\.[qkv]$", "", reader),) for _, reader in pairs}


def _ends(own: set[str], model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, for each reader, those of some writers that compute from it; the last reader stands for itself."""
    found: dict[str, tuple[str, ...]] = {}
    for reading in find_decoder(model, causal=False).readings:
        for label, feeds in zip(reading.labels, reading.feeds, strict=True):
            there = tuple(writer for writer in feeds if writer in own) or (feeds or (label,))
            found[label] = there
            found[reading.block] = tuple(dict.fromkeys([*found.get(reading.block, ()), *there]))
    return found


def _places(labels: list[str]) -> dict[str, tuple[float, float]]:
    """Return x and y of each label: a row for every layer's heads and one for its MLP, spread evenly."""
    rows: dict[tuple[int, int], list[str]] = {}
    for label in labels:
        rows.setdefault(_row(label), []).append(label)
    found = {}
    for y, key in enumerate(sorted(rows)):
        own = sorted(rows[key], key=lambda label: [int(n) for n in re.findall(r"\d+", label)])
        for i, label in enumerate(own):
            found[label] = ((i + 0.5) / len(own) - 0.5, float(y))
    return found


def _row(label: str) -> tuple[int, int]:
    """Return the layer, and within it 0 for attention and 1 for the MLP; the embedding is first, the output last."""
    layer = re.match(r"L(\d+)\.(\w)", label)
    if layer is None:
        return (-1, 0) if label == "embed" else (10**6, 0)
    return int(layer[1]), int(layer[2] == "m")
