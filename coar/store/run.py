"""One run: a Zarr group that is created once, filled unit by unit, and read by fits and evaluation."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import zarr
from zarr.core.group import AsyncGroup, GroupMetadata
from zarr.storage import StorePath

from coar.charts import html_facts
from coar.components.table import Component, Components, read_component
from coar.errors import CorruptRunError, IncompleteRunError, MismatchError, RunError
from coar.sampling import Sampler, sampler_from_settings
from coar.store import arrays, layout
from coar.store.layout import Sizes
from coar.store.lock import Lock, write_lock
from coar.store.places import Address, locate, open_store
from coar.store.plan import Plan, Unit
from coar.store.records import PUBLISHED, PreflightRecord, PublishedRecord, RunRecord
from coar.store.sealed import RunStore
from coar.store.state import ATTRIBUTE, begin, describe, end, read_manifest, state_of

if TYPE_CHECKING:
    from torch import nn

FORMAT = 2
UNKNOWN = "unknown"  # what the fingerprint has for weights and examples that an imported file does not contain
ACCEPTED = "accepted_code"  # the manifest's entry for other code that the user declared equivalent
LISTED = 6  # changes of code in a message
COMPONENT_FIELDS = Component._fields
ROW_COLUMNS = ("split", "ablated_fraction")


class Run:
    """A run's Zarr group; make one with `Run.create` or `Run.open`.

    Attributes:
        path: Path of the run, or its address in an object store.
        group: The Zarr group itself.
        facts: What its creation measured: precision, batch norms that follow a site.
        plan: The rows of the mask axis.
    """

    def __init__(self, path: Path | Address, group: zarr.Group, manifest: dict[str, Any]) -> None:
        self.path = path
        self.group = group
        self._manifest = manifest
        self.facts = RunRecord.read(manifest["facts"])
        self.plan = Plan.from_json(manifest["plan"])

    @classmethod
    def create(
        cls,
        path: str | Path | Address,
        *,
        components: Components,
        metadata: Mapping[str, np.ndarray],
        replacements: np.ndarray,
        fingerprint: dict[str, Any],
        facts: RunRecord,
        blocks: tuple[int, int],
        plan: Plan | None = None,
    ) -> Self:
        """Create an empty run, or restart an interrupted creation.

        Nothing is replaced, and the description is written last. So when several processes create the same run at once
        in an object store, the first to write an object wins, and all processes continue with the same run.

        Args:
            path: A path that does not exist yet, an empty folder, or a run whose creation was interrupted.
            components: The component table.
            metadata: Columns over the examples.
            replacements: (components.width,) float32 constants of the ablation, one per channel; or (positions,
                components.width), one per position and channel.
            fingerprint: Fingerprint of the study; only a study with the same fingerprint can continue the run.
            facts: What its creation measured: precision, batch norms that follow a site.
            blocks: Masks and examples per unit of work.
            plan: The initial rows; by default none.

        Raises:
            RunError: When the path holds something else.
            MismatchError: When another study's run is being created there.
            StorageError: When the disk or the object store fails.
        """
        place, rows = locate(path), plan or Plan()
        state = state_of(place)
        if state not in ("nothing", "creating"):
            raise RunError(f"{place} already holds {'a run' if state == 'ready' else state}; choose another path")
        begin(place, fingerprint)
        if state_of(place) != "ready":
            store = RunStore(open_store(place), place=place, study=fingerprint, creating=True)
            group = zarr.Group(AsyncGroup(GroupMetadata(), StorePath(store)))
            _create_arrays(group, Sizes(len(components), len(next(iter(metadata.values()))), blocks), len(rows))
            for field, values in zip(COMPONENT_FIELDS, zip(*components, strict=True), strict=True):
                arrays.write_all(group, f"component/{field}", np.asarray(values), "component")
            constants = replacements.astype(np.float32).reshape(-1)
            along = "component" if len(constants) == len(components) else "channel"
            arrays.write_all(group, "component/replacement", constants, along)
            for name, column in metadata.items():
                arrays.write_all(group, f"example/{name}", np.asarray(column), "example")
            _write_row_columns(group, rows)
            manifest = {"format": FORMAT, "state": "ready", "fingerprint": fingerprint, "facts": facts.stored()}
            describe(place, {ATTRIBUTE: manifest | {"plan": rows.to_json()}})
        end(place)
        return cls.open(place)

    @classmethod
    def open(cls, path: str | Path | Address) -> Self:
        """Open an existing run.

        Raises:
            RunError: When the path holds no run, a run of another format, or one whose creation was interrupted.
            CorruptRunError: When the run's description is damaged.
            StorageError: When an object store cannot be reached, or fails.
        """
        place = locate(path)
        state = state_of(place)
        if state == "nothing":
            raise RunError(f"there is no run at {place}; check the path, or make one with 'coar collect'")
        if state == "creating":
            raise RunError(f"the creation of the run at {place} was interrupted; run 'coar collect' again on it")
        if state != "ready":
            raise RunError(f"{place} holds {state}, not a run; check the path")
        manifest = read_manifest(place)
        try:
            if int(manifest["format"]) < FORMAT:
                raise RunError(
                    f"the run at {place} has format {manifest['format']}, and this version reads format {FORMAT}; "
                    f"make a copy in format {FORMAT} with 'coar copy {place} NEW', which leaves the run as it is"
                )
            if int(manifest["format"]) > FORMAT:
                raise RunError(
                    f"the run at {place} has format {manifest['format']}, and this version reads up to {FORMAT}; "
                    f"update coar"
                )
            store = RunStore(open_store(place), place=place, study=manifest["fingerprint"])
            sampler_from_settings(manifest["fingerprint"]["sampler"])
            _check_study(manifest["fingerprint"])
            return cls(place, zarr.open_group(store, mode="r+"), manifest)
        except RunError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptRunError(
                f"the attributes of the run at {place} are damaged ({error!r}); restore its zarr.json from a copy"
            ) from error

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.n_components} components, {self.n_examples} examples)"

    def _repr_html_(self) -> str:
        rows = {
            f"{part.split} masks at {part.ablated_fraction:g}": self.plan.count(part.split, part.ablated_fraction)
            for part in self.plan.segments
        }
        kinds = dict.fromkeys(component.kind for component in self.components)
        facts = {
            "components": f"{self.n_components:,} ({', '.join(kinds)})",
            "examples": f"{self.n_examples:,}",
            "output": self.fingerprint["output"]["name"],
            "ablation": self.fingerprint["ablation"]["name"],
        }
        return html_facts(str(self.path), {**facts, **rows})

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the study that the run was made for."""
        return dict(self._manifest["fingerprint"])

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler that made the masks."""
        return sampler_from_settings(self._manifest["fingerprint"]["sampler"])

    @cached_property
    def components(self) -> Components:
        """The component table."""
        columns = [self.column(f"component/{field}").tolist() for field in COMPONENT_FIELDS]
        table = Components(read_component(row) for row in zip(*columns, strict=True))
        if table.fingerprint() != self._manifest["fingerprint"].get("components"):
            raise CorruptRunError(f"the component table of {self.path} is not the one it was made with; restore a copy")
        return table

    @cached_property
    def replacements(self) -> np.ndarray:
        """(components.width,) float32 constants of the ablation, or (positions, components.width).

        Runs of older versions have one per component.
        """
        try:
            return self.components.per_channel(self.column("component/replacement"))
        except ValueError as error:
            raise CorruptRunError(f"the constants of {self.path} are damaged ({error}); restore a copy") from None

    @cached_property
    def metadata(self) -> dict[str, np.ndarray]:
        """Columns over the examples."""
        names = arrays.array_names(self.group, "example/")
        return {name.removeprefix("example/"): self.column(name) for name in names}

    @cached_property
    def sizes(self) -> Sizes:
        """Numbers of components and examples, and the sizes of units."""
        named = ("component/name", "masks", "base_output", "outputs")
        return layout.sizes_of(*(arrays.open_array(self.group, name) for name in named))

    @property
    def n_components(self) -> int:
        """Number of components."""
        return self.sizes.components

    @property
    def n_examples(self) -> int:
        """Number of examples."""
        return self.sizes.examples

    @property
    def blocks(self) -> tuple[int, int]:
        """Masks and examples per unit of work."""
        return self.sizes.blocks

    def array(self, name: str, *, rounds: int = 0) -> zarr.Array[Any]:
        """Return one of the run's arrays; an axis of rounds must have at least `rounds` of them.

        Raises:
            CorruptRunError: When it is missing, or its description does not fit the rest of the run.
        """
        found = arrays.open_array(self.group, name)
        rows = 0 if name in ROW_COLUMNS else len(self.plan)  # these columns are rewritten when they are too short
        layout.check(found, name, self.sizes, least={"mask": rows, "round": rounds})
        return found

    def column(self, name: str) -> np.ndarray:
        """Read a whole one-dimensional array; raise `CorruptRunError` when a chunk of it is missing."""
        array = self.array(name)
        missing = set(arrays.all_chunks(array)) - arrays.stored_chunks(array)
        if missing:
            chunk = arrays.chunk_path(array, min(missing))
            raise CorruptRunError(
                f"chunk {chunk} of {self.path} is missing; 'coar verify --repair' reports whether it can be made "
                f"again; otherwise restore it from a copy"
            )
        values = arrays.read(array, slice(None))
        return np.array(values.tolist()) if values.dtype.kind in "OT" else values

    def check(self, fingerprint: dict[str, Any]) -> None:
        """Raise `MismatchError`, with both values of each difference, unless the fingerprints agree.

        Code that `accept_code` has accepted counts as the run's own.
        """
        from coar.model_code import differences  # imports torch, which `coar info` does without

        mine = self.fingerprint
        if fingerprint.get("code") in self.accepted_code:
            fingerprint = {**fingerprint, "code": mine.get("code")}
        differing = [key for key in sorted({*mine, *fingerprint}) if mine.get(key) != fingerprint.get(key)]
        if not differing:
            return
        lines = [
            f"  {key}: the run has {_short(mine.get(key))}, now {_short(fingerprint.get(key))}"
            for key in differing
            if key != "code"
        ]
        advice = "restore them to continue this run, or collect into a new path"
        if "code" in differing:
            changed = differences(mine.get("code", {}), fingerprint.get("code", {}))
            lines += [f"  {one}" for one in changed[:LISTED]]
            lines += [f"  and {len(changed) - LISTED} more of the model's code"] if len(changed) > LISTED else []
            advice += "; if the changed code computes the same, accept it with coar.Run.open(path).accept_code(model)"
        if mine.get("weights") == UNKNOWN:
            advice = "the run was imported without a model; import the file into a new path with --pipeline, or study="
        raise MismatchError(
            f"this study is not the one that {self.path} was made for; these differ:\n"
            + "\n".join(lines)
            + f"\n{advice}"
        )

    def accept_code(self, model: "nn.Module") -> None:
        """Accept this model's code as equivalent to the code of the run's model, and record that in the run.

        Use it for changed code that computes the same: a renamed class, a rewritten function, a library's new version.

        Args:
            model: The model of the study that continues this run; its weights are still checked.
        """
        from coar.components.layers import unwrapped
        from coar.model_code import model_code

        with self.lock():
            self.set_entry(ACCEPTED, [*self.accepted_code, model_code(unwrapped(model))])

    @property
    def accepted_code(self) -> list[dict[str, Any]]:
        """Results of `coar.model_code.model_code` that `accept_code` has recorded."""
        return list(self._manifest.get(ACCEPTED, []))

    def rows_intact(self) -> bool:
        """Return whether all arrays over the mask axis have the length of the plan, unlike after a cut extension."""
        names = (*ROW_COLUMNS, "outputs", "masks")
        return all(arrays.there_is(self.group, name) and self.array(name).shape[0] == len(self.plan) for name in names)

    def extend(self, plan: Plan) -> None:
        """Extend the run to a longer plan; the plan is written last, so an interruption leaves the old one."""
        rows = len(plan)
        shapes = {"outputs": (rows, self.n_examples), "masks": (rows, self.array("masks").shape[1])}
        for name, shape in shapes.items():
            self.array(name).resize(shape)
        _write_row_columns(self.group, plan)
        self.set_entry("plan", plan.to_json())
        self.plan = plan

    def masks(self, start: int, stop: int) -> np.ndarray:
        """Return the (rows, components) boolean masks of rows `start` up to `stop`, compared with the stored ones."""
        masks = self.draw(slice(start, stop))
        packed = pack(masks)
        stored = arrays.read(self.array("masks"), slice(start, stop), slice(None))
        if not np.array_equal(packed, stored):
            row = start + int((packed != stored).any(axis=1).argmax())
            chunk = arrays.chunk_path(self.array("masks"), (row // self.blocks[0], 0))
            raise CorruptRunError(
                f"chunk {chunk} of {self.path} is missing, or its row {row} ({self.plan.label(row)}) is not the one "
                f"that its seed gives; run 'coar verify --repair' and collect again"
            )
        return masks

    def draw(self, rows: slice) -> np.ndarray:
        """Draw the (rows, components) boolean masks of a slice of rows from their seed."""
        return self.plan.masks(self.sampler, self.n_components, rows.start, rows.stop)

    def outputs(self, rows: slice, examples: slice) -> np.ndarray:
        """Read (rows, examples) outputs; raise `IncompleteRunError` when an output has not been collected."""
        array = self.array("outputs")
        values = arrays.read(array, rows, examples)
        if not np.isfinite(values).all():
            row, example = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
            key = ((rows.start or 0) + row) // array.chunks[0], ((examples.start or 0) + example) // array.chunks[1]
            raise IncompleteRunError(
                f"chunk {arrays.chunk_path(array, key)} of {self.path} has not been collected; run 'coar collect' to "
                f"finish the run"
            )
        return values

    def masks_at(self, rows: np.ndarray) -> np.ndarray:
        """Return the (rows, components) masks of ascending row numbers, reading no others."""
        parts = [self.masks(int(part[0]), int(part[-1]) + 1) for part in stretches(rows)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def packed_at(self, rows: np.ndarray) -> np.ndarray:
        """Read the (rows, bytes) packed masks of ascending row numbers, as `pack` makes them, without a comparison."""
        array = self.array("masks")
        parts = [arrays.read(array, slice(int(part[0]), int(part[-1]) + 1), slice(None)) for part in stretches(rows)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def outputs_at(self, rows: np.ndarray, examples: slice) -> np.ndarray:
        """Return the (rows, examples) outputs of ascending row numbers, reading no others."""
        parts = [self.outputs(slice(int(part[0]), int(part[-1]) + 1), examples) for part in stretches(rows)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def rows_of(self, unit: Unit) -> tuple[slice, slice]:
        """Return the rows and the examples that a unit covers."""
        masks, examples = self.blocks
        return (
            slice(unit.mask_block * masks, min((unit.mask_block + 1) * masks, len(self.plan))),
            slice(unit.example_block * examples, min((unit.example_block + 1) * examples, self.n_examples)),
        )

    def units(self) -> list[Unit]:
        """Return all units, the masks of one block of examples after another."""
        masks, examples = self.blocks
        return [Unit(i, j) for j in range(-(-self.n_examples // examples)) for i in range(-(-len(self.plan) // masks))]

    def missing_units(self) -> list[Unit]:
        """Return the units that are not stored completely, in the order of `units`."""
        stored = {name: arrays.stored_chunks(self.array(name)) for name in ("outputs", "masks", "base_output")}
        masks = self.blocks[0]
        cut = {extent // masks for extent in self.plan.extents[:-1] if extent % masks}  # blocks once partly filled
        outputs = self.array("outputs")

        def done(unit: Unit) -> bool:
            if tuple(unit) not in stored["outputs"]:
                return False
            if unit.mask_block == 0 and (unit.example_block,) not in stored["base_output"]:
                return False
            if unit.example_block == 0 and (unit.mask_block, 0) not in stored["masks"]:
                return False
            return unit.mask_block not in cut or bool(np.isfinite(arrays.read(outputs, *self.rows_of(unit))).all())

        return [unit for unit in self.units() if not done(unit)]

    def write_unit(self, unit: Unit, masks: np.ndarray, outputs: np.ndarray, base_output: np.ndarray | None) -> None:
        """Store one unit, the chunk of `outputs` last: its presence marks the unit as done.

        Args:
            unit: The unit.
            masks: Its (rows, components) masks, as `draw` returns them; stored with the first block of examples.
            outputs: Its (rows, examples) outputs.
            base_output: The (examples,) outputs of the unablated model, stored with the first block of masks.
        """
        rows, examples = self.rows_of(unit)
        if unit.example_block == 0:
            arrays.write(self.array("masks"), pack(masks), rows, slice(None))
        if base_output is not None:
            arrays.write(self.array("base_output"), base_output, examples)
        arrays.write(self.array("outputs"), outputs, rows, examples)

    def entry(self, name: str) -> Any:
        """Return an optional entry of the run's manifest; None when there is none."""
        return self._manifest.get(name)

    @property
    def published(self) -> PublishedRecord | None:
        """What the file says from which the run was imported; None for any other run."""
        stored = self.entry(PUBLISHED)
        return None if stored is None else PublishedRecord.read(stored)

    def add_checks(self, record: PreflightRecord) -> None:
        """Add outcomes of checks to those that the run keeps."""
        before = self.facts.preflight or PreflightRecord()
        accepted = before.accepted | record.accepted
        passed = tuple(name for name in dict.fromkeys([*before.passed, *record.passed]) if name not in accepted)
        both = PreflightRecord(passed=passed, accepted=accepted)
        self.facts = self.facts.model_copy(update={"preflight": both})
        self.set_entry("facts", self.facts.stored())

    def set_entry(self, name: str, value: Any) -> None:
        """Store an optional entry in the run's manifest."""
        self._manifest = {**self._manifest, name: value}
        self.group.attrs[ATTRIBUTE] = self._manifest

    def require_complete(self) -> None:
        """Raise `IncompleteRunError` unless every unit is stored."""
        missing = self.missing_units()
        if not len(self.plan):
            raise IncompleteRunError(
                f"{self.path} has no masks; run 'coar collect' on it, with --test-masks to evaluate fits"
            )
        if missing:
            raise IncompleteRunError(
                f"{len(missing)} of {len(self.units())} units of {self.path} have not been collected; run 'coar "
                f"collect' again to finish the run"
            )

    def lock(self) -> AbstractContextManager[Lock]:
        """Hold the run for writing; raise `RunError` when another process does."""
        return write_lock(self.path)


def _check_study(fingerprint: dict[str, Any]) -> None:
    """Raise a built-in error when a part of the fingerprint that every reader needs is missing."""
    words = [fingerprint["ablation"]["name"], fingerprint["weights"]]
    if not all(isinstance(word, str) for word in words):
        raise TypeError(f"{words} should be words")


def pack(masks: np.ndarray) -> np.ndarray:
    """Pack (rows, components) masks to (rows, ceil(components / 8)) bytes, little-endian within a byte."""
    return np.packbits(masks, axis=1, bitorder="little")


def stretches(rows: np.ndarray) -> list[np.ndarray]:
    """Split ascending row numbers at gaps."""
    return np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)


def _write_row_columns(group: zarr.Group, plan: Plan) -> None:
    store = cast(RunStore, group.store).keeping()
    group = zarr.Group(AsyncGroup(GroupMetadata(), StorePath(store)))
    for name in ROW_COLUMNS:
        parts = [np.repeat(getattr(segment, name), segment.count) for segment in plan.segments]
        column = np.concatenate([np.zeros(0, str if name == "split" else float), *parts])
        arrays.write_all(group, name, column, "mask")


def _create_arrays(group: zarr.Group, sizes: Sizes, rows: int) -> None:
    for name in ("outputs", "masks", "base_output"):
        form = layout.unit_specs(sizes)[name]
        shape, chunks = layout.laid_out(form, sizes, growing=rows)
        arrays.create_array(
            group, name, shape=shape, chunks=chunks, dtype=form.dtype, dimensions=form.dimensions, overwrite=True
        )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text[:12] + "..." if isinstance(value, str) and len(text) == 64 else text
