"""A circuit: the kept edges of one model and the constants of its writers; it is stored, applied and compared."""

import base64
import binascii
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn

from coar.charts import html_facts
from coar.circuits.figures import DRAWN, draw_circuit
from coar.components.edges import ARROW, edges, nodes
from coar.components.layers import unwrapped
from coar.components.table import Components
from coar.errors import CircuitError, ComponentError, StorageError
from coar.examples import device_of
from coar.gates.gates import Gates
from coar.weights import weights_fingerprint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = 1
HTML_ROWS = 12  # edges that a notebook shows
TABLES: dict[str, Callable[[nn.Module], Components]] = {  # by name: the finder of a model's whole table
    "edges": lambda model: edges(model, causal=False),  # of a causal model, the same as with causal=True
    "edges without ports": lambda model: edges(model, ports=False, causal=False),
    "nodes": lambda model: nodes(model, causal=False),
}


@dataclass(frozen=True)
class Comparison:
    """What two circuits have in common.

    Attributes:
        shared: Edges in both.
        only_first: Edges in the first only.
        only_second: Edges in the second only.
        shared_nodes: Writers that write along an edge of both.
        overlap: Shared edges, as a share of the edges in either (Jaccard index).
        node_overlap: Shared nodes, as a share of the nodes in either.
    """

    shared: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    shared_nodes: tuple[str, ...]
    overlap: float
    node_overlap: float


@dataclass(frozen=True, eq=False)
class Circuit:
    """Edges of a decoder that are kept, while all others carry replacements.

    Attributes:
        edges: Names of the kept edges, in table order.
        table: The table they are of: `edges`, `edges without ports`, or `nodes`.
        size: Number of components of that table.
        weights: SHA-256 of the model's weights.
        ablation: Name of the ablation of all other edges.
        method: Label of the method that scored the edges.
        constants: (components.width,) float32 constants of the writers; None where activations of other examples
            replace what is ablated.
    """

    edges: tuple[str, ...]
    table: str
    size: int
    weights: str
    ablation: str
    method: str
    constants: np.ndarray | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.edges)

    def __repr__(self) -> str:
        return f"Circuit({len(self)} of {self.size} {self.table} by {self.method}, {self.ablation} ablation)"

    def nodes(self) -> tuple[str, ...]:
        """Return the writers that write along a kept edge, in the order of their first edge."""
        return tuple(dict.fromkeys(name.partition(ARROW)[0] for name in self.edges))

    def components(self, model: nn.Module) -> Components:
        """Return the table of this circuit's model.

        Raises:
            CircuitError: When the circuit was made for other weights.
        """
        model = unwrapped(model)
        found = weights_fingerprint(model)
        if found != self.weights:
            raise CircuitError(
                f"this circuit was made for weights {self.weights[:12]}..., and this {type(model).__name__} has "
                f"{found[:12]}...; load the model that the circuit was found in, or find a circuit of this one"
            )
        return TABLES[self.table](model)

    def mask(self, components: Components) -> np.ndarray:
        """Return the (components,) mask that keeps this circuit's edges of its table.

        Raises:
            CircuitError: When the table is another one.
        """
        try:
            rows = [components.index(name) for name in self.edges]
        except ComponentError as error:
            raise CircuitError(f"this circuit is of another table of components: {error}") from None
        if len(components) != self.size:
            raise CircuitError(
                f"this circuit is one of {self.size} components, and the table has {len(components)}; use "
                f"circuit.components(model)"
            )
        found = np.zeros(self.size, dtype=bool)
        found[rows] = True
        return found

    def plot(self, model: nn.Module | None = None, ax: "Axes | None" = None) -> "Axes":
        """Draw the circuit from the embedding below to the output above; return the axes.

        Edges into queries, keys and values have different colours.

        Args:
            model: Its model, to draw keys and values that several heads share into these heads. Without it, groups of
                heads that share them are nodes of their own, such as `L0.G0`.
            ax: Matplotlib axes; by default those of a new figure.

        Raises:
            CircuitError: When the circuit has too many edges to be seen, or consists of nodes.
        """
        if not self.is_drawable:
            raise CircuitError(
                f"a drawing shows at most {DRAWN} edges, and this circuit has {len(self)} {self.table}; draw a "
                f"smaller circuit of edges"
            )
        return draw_circuit(ax, self.edges, model)

    @property
    def is_drawable(self) -> bool:
        """Whether `plot` can draw the circuit."""
        return len(self) <= DRAWN and self.table != "nodes"

    def _repr_html_(self) -> str:
        more = f", and {len(self) - HTML_ROWS} more" if len(self) > HTML_ROWS else ""
        names = ", ".join(self.edges[:HTML_ROWS])
        facts = {"nodes": len(self.nodes()), "ablation": self.ablation, "edges": names + more}
        return html_facts(f"Circuit of {len(self)} of {self.size} {self.table}, by {self.method}", facts)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[Gates]:
        """Run this circuit instead of the model inside the context: all other edges carry replacements.

        Where activations of other examples are the replacements, `gates.record(lambda: model(partners))` records them
        before a forward pass.

        Raises:
            CircuitError: When the circuit was made for other weights.
        """
        table = self.components(model)
        device = device_of(model)
        constants = torch.zeros(table.width) if self.constants is None else torch.from_numpy(self.constants)
        with Gates(unwrapped(model), table, constants, use_hooks=True, resample=self.constants is None) as gates:
            gates.set(torch.from_numpy(self.mask(table)).to(device))
            yield gates

    def compare(self, other: "Circuit") -> Comparison:
        """Return what this circuit and another one of the same model and table have in common.

        Raises:
            CircuitError: When the other circuit is of another model or table.
        """
        if (self.weights, self.table) != (other.weights, other.table):
            raise CircuitError(
                f"the circuits are of weights {self.weights[:12]}... ({self.table}) and {other.weights[:12]}... "
                f"({other.table}); compare circuits of one model and one table"
            )
        first, second = set(self.edges), set(other.edges)
        own, others = set(self.nodes()), set(other.nodes())
        return Comparison(
            shared=tuple(name for name in self.edges if name in second),
            only_first=tuple(name for name in self.edges if name not in second),
            only_second=tuple(name for name in other.edges if name not in first),
            shared_nodes=tuple(name for name in self.nodes() if name in others),
            overlap=len(first & second) / len(first | second),
            node_overlap=len(own & others) / len(own | others),
        )

    def save(self, path: str | Path) -> None:
        """Write the circuit atomically as one JSON file, its constants as base64 of little-endian float32 numbers.

        Raises:
            StorageError: When the disk refuses the write.
        """
        file = Path(path)
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        content = {"format": FORMAT, **{name: getattr(self, name) for name in _FIELDS}, "edges": list(self.edges)}
        if self.constants is not None:
            content["constants"] = base64.b64encode(self.constants.astype("<f4").tobytes()).decode()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content, indent=1) + "\n")
            partial.replace(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StorageError(f"cannot write {file}: {error}; free space or choose another path") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a circuit that `save` wrote.

        Raises:
            CircuitError: When the file is missing, damaged, or of another version.
        """
        file = Path(path)
        try:
            content = json.loads(file.read_text())
            if content["format"] != FORMAT:
                raise CircuitError(
                    f"{file} has format {content['format']!r}, and this version reads format {FORMAT}; read it with "
                    f"the version that wrote it"
                )
            return cls(**_read(content))
        except (OSError, KeyError, TypeError, ValueError, binascii.Error) as error:
            if isinstance(error, CircuitError):
                raise
            raise CircuitError(f"{file} does not hold a circuit ({error!r}); save it again") from None


_FIELDS = ("table", "size", "weights", "ablation", "method")


def _read(content: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a circuit from JSON; raise `ValueError` or `TypeError` for a wrong one."""
    found = {name: content[name] for name in _FIELDS}
    kept = content["edges"]
    texts = [*kept, *(found[name] for name in _FIELDS if name != "size")]
    if not isinstance(kept, list) or not kept or not all(isinstance(text, str) for text in texts):
        raise TypeError("a name is no string")
    if type(found["size"]) is not int or found["size"] < len(kept) or found["table"] not in TABLES:
        raise ValueError(f"{found['size']!r} components of the table {found['table']!r}")
    constants = content.get("constants")
    if constants is not None:
        constants = np.frombuffer(base64.b64decode(constants, validate=True), dtype="<f4").astype(np.float32)
        if not np.isfinite(constants).all():
            raise ValueError("a constant is not finite")
    return {**found, "edges": tuple(kept), "constants": constants}


def table_name(model: nn.Module, components: Components) -> str:
    """Return the name of a model's table of components.

    Raises:
        CircuitError: When the components are not a whole table.
    """
    for name, find in TABLES.items():
        if find(model) == components:
            return name
    raise CircuitError(
        f"{components!r} is not the whole table of this model, and a circuit is a part of a whole one; use "
        f"coar.edges(model), coar.edges(model, ports=False) or coar.nodes(model)"
    )
