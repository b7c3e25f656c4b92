"""Figures of circuits: divergence by the number of edges, and a drawing of a small circuit, layer by layer."""

import re
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from torch import nn

from coar.circuits.circuit import Circuit
from coar.components.decoder import find_decoder
from coar.components.edges import ARROW
from coar.errors import CircuitError

if TYPE_CHECKING:
    import pandas as pd

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")  # Paul Tol's bright scheme
PORTS = {"q": "#4477aa", "k": "#ee6677", "v": "#228833"}  # colours of edges into queries, keys and values
OTHER = "#777777"
DRAWN = 150  # most edges of a drawing


def sizes_figure(table: "pd.DataFrame") -> Figure:
    """Draw the KL divergence on held-out examples against the number of edges, one line per method.

    Args:
        table: Columns `method`, `edges` and `kl`.
    """
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (method, rows) in enumerate(table.groupby("method", sort=False)):
        ordered = rows.sort_values("edges")
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(ordered["edges"], ordered["kl"], marker="o", color=colour, label=str(method))
    axes.set(xlabel="edges of the circuit", ylabel="held-out KL divergence (nats)", xscale="log", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure


def circuit_figure(circuit: Circuit, model: nn.Module) -> Figure:
    """Draw a circuit from the embedding below to the output above, one row for heads and one for the MLP of a layer.

    Edges into queries, keys and values have different colours. Keys and values of a group are drawn into all of its
    heads that the circuit has.

    Args:
        circuit: The circuit.
        model: Its model, which says which heads a reader belongs to.

    Raises:
        CircuitError: When the circuit has too many edges to be seen, or consists of nodes.
    """
    if len(circuit) > DRAWN or circuit.table == "nodes":
        raise CircuitError(
            f"a drawing shows at most {DRAWN} edges, and this circuit has {len(circuit)} {circuit.table}; draw a "
            f"smaller circuit of edges"
        )
    pairs = [tuple(name.split(ARROW)) for name in circuit.edges]
    ends = _ends(circuit, model)
    labels = dict.fromkeys([writer for writer, _ in pairs] + [end for _, reader in pairs for end in ends[reader]])
    places = _places(list(labels))
    rows = len({y for _, y in places.values()})
    figure = Figure(figsize=(9, max(3.0, 0.55 * rows)), layout="constrained")
    axes = figure.subplots()
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
    return figure


def _ends(circuit: Circuit, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, for each reader, the writers of the circuit that compute from it; the last reader stands for itself."""
    own, found = set(circuit.nodes()), {}
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
