"""The table of components: immutable, ordered and named."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args, overload

import numpy as np

from coar.errors import ComponentError

if TYPE_CHECKING:
    import pandas as pd

Side = Literal["output", "input", "module", "expert", "parameter", "edge"]


class Component(NamedTuple):
    """One part of a model that is ablated as a whole.

    Attributes:
        name: Unique name, such as `layer1.0.conv1[17]`.
        kind: `conv filter`, `neuron`, `input feature`, `attention head`, `expert`, `module`, `parameter slice`, `edge`
            or `node`.
        site: Path of the module, or of the parameter for a slice of one; of the module that reads, for an edge.
        side: The part of the site that is ablated: channels of the module's `output` or `input`, all that the `module`
            returns, all that one `expert` of the module returns, the `parameter` itself, or an `edge` between two
            modules.
        axis: Axis of the module's output or input, or of the parameter, along which the component lies; 0 for a whole
            module whose feature axis is unknown. The features of a mixture's experts are numbered consecutively.
        position: First index of the component along that axis; for an edge, the first index of its writer's constants,
            which all edges of the writer share, among the constants of all writers.
        size: Number of indices along that axis; each is one channel.
    """

    name: str
    kind: str
    site: str
    side: Side
    axis: int
    position: int
    size: int


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the concatenation of the ranges of the given sizes, each from its start."""
    before = sizes.cumsum() - sizes
    numbers: np.ndarray = np.repeat(starts - before, sizes) + np.arange(sizes.sum())
    return numbers


def read_component(values: Sequence[object]) -> Component:
    """Return a component from a row of plain values; raise `ValueError` unless each has a valid type and value."""
    types = (str, str, str, str, int, int, int)
    if len(values) != len(types) or any(type(v) is not kind for v, kind in zip(values, types, strict=True)):
        raise ValueError(f"{values!r} is not a row of a component table")
    component = Component(*values)  # type: ignore[arg-type]
    if component.side not in get_args(Side) or component.position < 0 or component.size < 1:
        raise ValueError(f"{values!r} is not a row of a component table")
    return component


class Components(Sequence[Component]):
    """The ordered table of all components; a row number is the component's index everywhere."""

    def __init__(self, rows: Iterable[Component]) -> None:
        self._rows = tuple(rows)
        self._index = {row.name: i for i, row in enumerate(self._rows)}
        if not self._rows:
            raise ComponentError("a component table needs at least one component, but none was given")
        if len(self._index) != len(self._rows):
            names = [row.name for row in self._rows]
            twice = next(name for name in names if names.count(name) > 1)
            raise ComponentError(f"component {twice!r} is in the table twice; leave one of the two out")
        if len({row.side == "edge" for row in self._rows}) > 1:
            raise ComponentError(
                "edges and other components cannot be in one table, since both would gate what a module computes; "
                "collect a run of each"
            )

    @overload
    def __getitem__(self, index: int) -> Component: ...
    @overload
    def __getitem__(self, index: slice) -> "Components": ...
    def __getitem__(self, index: int | slice) -> "Component | Components":
        return Components(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Component]:
        return iter(self._rows)

    def __add__(self, other: "Components") -> "Components":
        return Components(self._rows + other._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Components) and self._rows == other._rows

    def __hash__(self) -> int:
        return hash(self._rows)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{sum(row.kind == kind for row in self)} {kind}s" for kind in dict.fromkeys(self.kinds))
        return f"Components({kinds}, from {self[0].name} to {self[-1].name})"

    @property
    def names(self) -> tuple[str, ...]:
        """Names in table order."""
        return tuple(row.name for row in self._rows)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds in table order."""
        return tuple(row.kind for row in self._rows)

    @property
    def of_edges(self) -> bool:
        """Whether the components are edges, or writers for all their edges; a table has nothing else then."""
        return self._rows[0].side == "edge"

    @property
    def width(self) -> int:
        """Number of channels of all components together; edges of one writer share its channels."""
        return int((self._starts + self._sizes).max())

    def channels_of(self, rows: Sequence[int]) -> np.ndarray:
        """Return the numbers of the channels of some components, counted over all components in table order.

        The channels of edges are counted in the order of their writers.
        """
        index = np.asarray(rows, dtype=np.int64)
        return _ranges(self._starts[index], self._sizes[index])

    def positions_of(self, rows: Sequence[int]) -> np.ndarray:
        """Return the positions of the channels of some components along their axis, in the order of `channels_of`."""
        index = np.asarray(rows, dtype=np.int64)
        return _ranges(self._positions[index], self._sizes[index])

    def sizes_of(self, rows: Sequence[int]) -> np.ndarray:
        """Return the numbers of channels of some components."""
        sizes: np.ndarray = self._sizes[np.asarray(rows, dtype=np.int64)]
        return sizes

    def per_channel(self, constants: np.ndarray) -> np.ndarray:
        """Return (width,) constants, one per channel.

        Args:
            constants: (width,) constants, which are returned as they are; (components,) constants, each for all
                channels of a component; or constants for several positions, one position after another, which are
                returned as (positions, width).

        Raises:
            ValueError: When there is any other number of constants.
        """
        if constants.shape == (self.width,):
            return constants
        if constants.size and constants.size % self.width == 0:
            return constants.reshape(-1, self.width)
        if constants.shape != (len(self),):
            raise ValueError(
                f"constants of shape {constants.shape} for {len(self)} components with {self.width} channels"
            )
        spread: np.ndarray = np.repeat(constants, self._sizes)
        return spread

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.array([row.size for row in self._rows])

    @cached_property
    def _positions(self) -> np.ndarray:
        return np.array([row.position for row in self._rows])

    @cached_property
    def _starts(self) -> np.ndarray:
        if self.of_edges:
            return self._positions
        starts: np.ndarray = self._sizes.cumsum() - self._sizes
        return starts

    def index(self, name: str, *_: int) -> int:
        """Return the row number of a component by its name; raise `ComponentError` for an unknown name."""
        if name not in self._index:
            near = ", ".join(list(self._index)[:3])
            raise ComponentError(f"no component has the name {name!r}; this table has {len(self)}, such as {near}")
        return self._index[name]

    def sites(self) -> dict[tuple[str, Side, int], list[int]]:
        """Group row numbers by (site, side, axis), in table order."""
        return {place: list(rows) for place, rows in self._sites.items()}

    @cached_property
    def _sites(self) -> dict[tuple[str, Side, int], list[int]]:
        groups: dict[tuple[str, Side, int], list[int]] = {}
        for i, row in enumerate(self._rows):
            groups.setdefault((row.site, row.side, row.axis), []).append(i)
        return groups

    def fingerprint(self) -> str:
        """Return the SHA-256 of the whole table, in hexadecimal."""
        return hashlib.sha256(json.dumps(self._rows).encode()).hexdigest()

    def to_pandas(self) -> "pd.DataFrame":
        """Return the table as a frame, one row per component, its index the component's index."""
        import pandas as pd

        return pd.DataFrame(self._rows, columns=list(Component._fields)).rename_axis("component")
