"""Shapes, chunks and types of a run's arrays, and the check of an opened array."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import zarr

from coar.errors import CorruptRunError

ROUND = 32  # mask gradients per round at most
PANEL = 256  # examples whose sums a fit makes at once
GROWING = ("mask", "round", "worker", "panel", "channel")  # axes whose lengths `Sizes` does not fix
SUMS = "sums"  # the group of workers' sums for a fit
COLUMNS = {"split": "string", "ablated_fraction": "float64", "component/replacement": "float32"}
COLUMNS |= {f"component/{name}": "string" for name in ("name", "kind", "site", "side")}
COLUMNS |= {f"component/{name}": "int64" for name in ("axis", "position", "size")}


class ArraySpec(NamedTuple):
    """The layout of an array.

    Attributes:
        dimensions: Names of its axes.
        chunks: Entries of a chunk along each axis: a number, `all` of them, or `some`, from one to all.
        dtype: Type of its entries; empty when any type is allowed.
    """

    dimensions: tuple[str, ...]
    chunks: tuple[int | Literal["all", "some"], ...]
    dtype: str


@dataclass(frozen=True)
class Sizes:
    """Lengths of a run's axes and blocks.

    Attributes:
        components: Number of components.
        examples: Number of examples.
        blocks: Masks and examples per unit of work.
    """

    components: int
    examples: int
    blocks: tuple[int, int]

    @property
    def bytes(self) -> int:
        """Bytes of a packed mask."""
        return -(-self.components // 8)

    def lengths(self) -> dict[str, int]:
        """Return the length of every axis that does not grow."""
        d = self.components
        lengths = {"example": self.examples, "component": d, "byte": self.bytes, "gradient": ROUND}
        return lengths | {"mask or sum": d + 1, "sum": d + 3, "place": PANEL}


def unit_specs(sizes: Sizes) -> dict[str, ArraySpec]:
    """Return the layouts of the arrays of units, by name."""
    masks, examples = sizes.blocks
    gradients = ArraySpec(("round", "example", "component"), (1, "some", sizes.components), "float32")
    return {
        "outputs": ArraySpec(("mask", "example"), (masks, examples), "float32"),
        "masks": ArraySpec(("mask", "byte"), (masks, sizes.bytes), "uint8"),
        "base_output": ArraySpec(("example",), (examples,), "float32"),
        "gradient_kept": gradients,
        "gradient_ablated": gradients,
        "gradient_outputs": ArraySpec(("round", "gradient", "example"), (1, ROUND, "some"), "float32"),
    }


def is_group(name: str) -> bool:
    """Return whether a path in a run is the path of a group."""
    first, *rest = name.split("/")
    return (first in ("component", "example") and not rest) or (first in ("attributions", SUMS) and len(rest) < 2)


def spec_of(name: str, sizes: Sizes) -> ArraySpec | None:
    """Return the layout of an array by name; None for a name that no array of a run has."""
    d, parts = sizes.components, name.split("/")
    wide = ArraySpec(("example", "component"), ("some", d), "float32")
    narrow = ArraySpec(("example",), ("some",), "float32")
    forms = unit_specs(sizes) | {
        "example/*": ArraySpec(("example",), ("all",), ""),
        "attributions/*/weight": wide,
        "attributions/*/standard_error": wide,
        "attributions/*/intercept": narrow,
        "attributions/*/penalty": narrow,
        f"{SUMS}/*/gram": ArraySpec(("worker", "mask or sum", "component"), (1, "some", d), "float64"),
        f"{SUMS}/*/moments": ArraySpec(("panel", "sum", "place"), (1, d + 3, PANEL), "float64"),
    }
    for column, dtype in COLUMNS.items():
        forms[column] = ArraySpec(("component" if "/" in column else "mask",), ("all",), dtype)
    forms["component/replacement"] = ArraySpec(("channel",), ("all",), COLUMNS["component/replacement"])
    if len(parts) == 3 or parts[0] == "example":
        parts[1] = "*"
    return forms.get("/".join(parts))


def sizes_of(
    components: zarr.Array[Any], masks: zarr.Array[Any], base_output: zarr.Array[Any], outputs: zarr.Array[Any]
) -> Sizes:
    """Read the sizes of a run from some of its arrays; raise `CorruptRunError` when these contradict each other."""
    for array, axes in ((components, 1), (masks, 2), (base_output, 1), (outputs, 2)):
        if array.ndim != axes or not all(chunk >= 1 for chunk in chunks_in(array)):
            raise _damaged(array, f"{axes} axes and chunks of at least 1")
    sizes = Sizes(components.shape[0], base_output.shape[0], (chunks_in(outputs)[0], chunks_in(outputs)[1]))
    if sizes.components < 1 or masks.shape[1] != sizes.bytes:
        raise _damaged(components, f"as many as fill the {masks.shape[1]} bytes of 'masks'")
    if sizes.examples < 1 or outputs.shape[1] != sizes.examples:
        raise _damaged(base_output, f"the {outputs.shape[1]} examples of 'outputs'")
    return sizes


def laid_out(form: ArraySpec, sizes: Sizes, *, growing: int, some: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape and the chunks of an array, for a length of its growing axis and a number for `some`."""
    lengths = sizes.lengths()
    shape = tuple(lengths.get(axis, growing) for axis in form.dimensions)
    free = {"some": (some,) * len(shape), "all": shape}
    return shape, tuple(c if isinstance(c, int) else free[c][i] for i, c in enumerate(form.chunks))


def check(array: zarr.Array[Any], name: str, sizes: Sizes, *, least: dict[str, int]) -> None:
    """Raise `CorruptRunError` unless an array has the layout that the rest of its run requires.

    Args:
        array: The array.
        name: Its path inside the run.
        sizes: Sizes of the run.
        least: Least lengths of growing axes.
    """
    form = spec_of(name, sizes)
    if form is None:
        raise CorruptRunError(f"{name!r} of {array.store} is no array of a run; remove it, or restore a copy")
    if len(form.dimensions) != array.ndim:
        raise _damaged(array, f"the axes {', '.join(form.dimensions)}")
    lengths = sizes.lengths()
    for axis, have, chunk, expected in zip(form.dimensions, array.shape, chunks_in(array), form.chunks, strict=True):
        long_enough = have >= least.get(axis, 0) if axis in GROWING else have == lengths[axis]
        allowed = {"all": chunk == max(1, have), "some": 1 <= chunk <= have}
        if not long_enough or not (allowed[expected] if isinstance(expected, str) else chunk == expected):
            length = lengths.get(axis, f"{least.get(axis, 0)} or more")
            raise _damaged(array, f"a {axis} axis of {length} with {expected} in a chunk")
    kind = "string" if isinstance(array.dtype, np.dtypes.StringDType) or array.dtype.kind in "OT" else array.dtype.name
    if form.dtype not in ("", kind):
        raise _damaged(array, form.dtype)
    if array.dtype.kind == "f" and not np.isnan(array.fill_value):
        raise _damaged(array, "the fill value NaN")


def chunks_in(array: zarr.Array[Any]) -> tuple[int, ...]:
    """Return the lengths of an array's chunks; raise `CorruptRunError` when chunks differ in size."""
    try:
        return array.chunks
    except NotImplementedError as error:
        raise _damaged(array, "chunks of one size") from error


def _damaged(array: zarr.Array[Any], expected: str) -> CorruptRunError:
    return CorruptRunError(
        f"the description of array {array.path!r} of {array.store} does not fit the run: it has shape {array.shape} "
        f"of {array.dtype}, and {expected} was expected; restore its zarr.json from a copy"
    )
