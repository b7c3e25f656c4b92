"""Files of published attributions, read into runs and written from runs."""

import logging
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from coar._version import __version__
from coar.ablation.zero import ZeroWeight
from coar.attributions import Attributions, best_fit
from coar.collection.collect import blocks_of
from coar.collection.execution import Execution
from coar.collection.preparation import BatchSettings, RunRequest, prepare
from coar.components.table import Component, Components
from coar.errors import MismatchError, RunError, SettingsError, StorageError, WeightsError
from coar.forward.copies import device_copy
from coar.forward.malloc import memory_kept
from coar.outputs.classification import CorrectClassMargin
from coar.progress import progress_bar
from coar.sampling import BernoulliSampler
from coar.store.fits import FitWriter, check_name, chunk_rows, fit_record
from coar.store.lock import write_lock
from coar.store.places import Address, locate
from coar.store.records import PUBLISHED, FitRecord, PrecisionRecord, PublishedRecord, RunRecord
from coar.store.run import UNKNOWN, Run
from coar.store.state import state_of
from coar.study import Study
from coar.weights import read_pickle

log = logging.getLogger(__name__)

NotFinite = Literal["refuse", "leave_out", "zero"]
OUTPUT = CorrectClassMargin(against="largest")
PART_BYTES = 2**28  # of weights that are held in memory at a time
NAMED = 5  # names in a message
FORMAT = "a dict with weight (components, examples), bias (examples,) and perhaps lam (examples,)"


@dataclass(frozen=True, kw_only=True)
class PublishedSetup:
    """A setup of published attributions.

    The components of a file are the rows of weights in the order of `named_modules()`. A mask zeroes rows of weights,
    and biases stay.

    Attributes:
        name: Its name.
        rows: By name of a layer, or of a parameter that no layer has as its weight, the number of its rows, in the
            file's order.
        biased: Whether the layers have biases.
        examples: Number of examples; None where published files differ.
        ablated_fraction: The share of components that training masks ablate. The files do not contain it.
    """

    name: str
    rows: Mapping[str, int]
    biased: bool
    examples: int | None
    ablated_fraction: float

    @property
    def names(self) -> list[str]:
        """Names of the components in the file's order."""
        return [f"{site}[{i}]" for site, count in self.rows.items() for i in range(count)]

    def components(self) -> Components:
        """Return the table of components as the finders make it: slices of parameters first, then rows of layers."""
        slices, layers = [], []
        for site, count in self.rows.items():
            if site.endswith("in_proj_weight"):
                slices += [
                    Component(f"{site}[{i}]", "parameter slice", site, "parameter", 0, i, 1) for i in range(count)
                ]
            elif self.biased:
                layers += [Component(f"{site}[{i}]", "neuron", site, "output", -1, i, 1) for i in range(count)]
            else:
                layers += [Component(f"{site}[{i}]", "conv filter", site, "output", 1, i, 1) for i in range(count)]
        return Components([*slices, *layers])

    def places(self, components: Components) -> np.ndarray:
        """Return each component's row in the file.

        Raises:
            MismatchError: When the components are not those of the setup.
        """
        row = {name: i for i, name in enumerate(self.names)}
        theirs, ours = [name for name in row if name not in set(components.names)], components.names
        other = [name for name in ours if name not in row]
        if theirs or other or len(ours) != len(row):
            lacks = f"lacks {len(theirs)}, such as {theirs[0]}" if theirs else "has all"
            has = f"has {len(other)} others, such as {other[0]}" if other else "no others"
            raise MismatchError(
                f"the table of {len(ours)} components does not fit the {len(row)} of {self.name}: it {lacks}, and "
                f"{has}; give the study of the published model, with all of its components"
            )
        return np.array([row[name] for name in ours])


def resnet_rows(blocks: Mapping[str, int], widths: Mapping[str, int], convolutions: tuple[int, ...]) -> dict[str, int]:
    """Return the convolutions of a residual network but those of its shortcuts, with their numbers of filters.

    Args:
        blocks: By name of a stage, its number of blocks.
        widths: By name of a stage, its width; the first is that of the first convolution too.
        convolutions: Filters of a block's convolutions, as multiples of the width.
    """
    rows = {"conv1": next(iter(widths.values()))}
    for stage, count in blocks.items():
        for block in range(count):
            rows |= {f"{stage}.{block}.conv{i}": n * widths[stage] for i, n in enumerate(convolutions, start=1)}
    return rows


def vit_rows(layers: int, width: int, hidden: int) -> dict[str, int]:
    """Return the linear weights of torchvision's vision transformer but that of its head, with their rows.

    Args:
        layers: Number of layers.
        width: Width of the residual stream.
        hidden: Neurons of a feed-forward block.
    """
    rows: dict[str, int] = {}
    for layer in (f"encoder.layers.encoder_layer_{i}" for i in range(layers)):
        attention = f"{layer}.self_attention"
        rows |= {f"{attention}.in_proj_weight": 3 * width, f"{attention}.out_proj": width}
        rows |= {f"{layer}.mlp.0": hidden, f"{layer}.mlp.3": width}
    return rows


_RESNET50 = resnet_rows(
    {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3},
    {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512},
    (1, 1, 4),
)
SETUPS = {
    setup.name: setup
    for setup in (
        PublishedSetup(
            name="cifar10",
            rows=resnet_rows({"layer": 4}, {"layer": 256}, (1, 1)),
            biased=False,
            examples=10_000,
            ablated_fraction=0.10,
        ),
        PublishedSetup(name="imagenet_resnet50", rows=_RESNET50, biased=False, examples=50_000, ablated_fraction=0.05),
        PublishedSetup(
            name="imagenet_vit_b16",
            rows=vit_rows(12, 768, 3072),
            biased=True,
            examples=5_000,
            ablated_fraction=0.05,
        ),
        PublishedSetup(name="celeba", rows=_RESNET50, biased=False, examples=None, ablated_fraction=0.05),
        PublishedSetup(name="waterbirds", rows=_RESNET50, biased=False, examples=None, ablated_fraction=0.05),
    )
}


def import_published(
    file: str | Path,
    path: str | Path | Address,
    *,
    setup: str | PublishedSetup,
    study: Study | None = None,
    metadata: Mapping[str, np.ndarray] | None = None,
    not_finite: NotFinite = "refuse",
    name: str = PUBLISHED,
    device: str = "auto",
    progress: bool = True,
) -> Run:
    """Write the attributions of a published file into a run, as a fit.

    With a study the run is that of the study: `collect` can add masks to it, `evaluate` scores the fit on them, and
    edits are tested on the model. Without one the weights and the examples are unknown, so the run can be loaded and
    shown, and edits can be predicted.

    Args:
        file: A file that torch has saved: a dict with `weight` (components, examples), `bias` (examples,) and perhaps
            `lam` (examples,).
        path: The run: a path that does not exist yet, or a run of the same study without this fit.
        setup: `cifar10`, `imagenet_resnet50`, `imagenet_vit_b16`, `celeba`, `waterbirds`, or a setup of your own.
        study: The study of the published model: its examples in the file's order, `ZeroWeight()`, and
            `CorrectClassMargin(against="largest")`.
        metadata: Columns over the file's examples, such as `label`; only without a study.
        not_finite: What to do with numbers that are NaN or infinite: `refuse` the file, `leave_out` their examples, or
            set such weights to `zero`.
        name: Name of the fit.
        device: Where the study's model is checked.
        progress: Show a progress bar.

    Raises:
        WeightsError: When the file is damaged, holds more than tensors, or does not fit the setup.
        MismatchError: When the study does not fit the setup, or the run is another study's.
        RunError: When the run has a fit of that name.
        StorageError: When the disk or the object store fails; the same call starts again.
    """
    spec = _setup_of(setup)
    content = _read(Path(os.path.expanduser(file)), spec)
    kept, record = _finite(content, spec, not_finite, Path(file).name, check_name(name))
    if study is not None and metadata:
        raise SettingsError("metadata and a study were given; the study's examples have metadata of their own")
    places = spec.places(spec.components() if study is None else study.components)
    fitting = None if study is None else _fitting(study, len(content["bias"]), kept)
    columns = _columns(metadata or {}, len(content["bias"]), kept)
    place = locate(path)
    with write_lock(place), memory_kept():
        run = _without_model(place, spec, columns) if fitting is None else _of_study(place, fitting, device)
        if fit_record(run, name) is not None:
            raise RunError(f"{run.path} has a fit {name!r}; choose another name or path")
        _write(run, content, kept, places, record, spec.ablated_fraction, progress=progress)
    return run


def export_published(
    run: Run, path: str | Path, *, fit: str | None = None, setup: str | PublishedSetup | None = None
) -> None:
    """Write a fit in the format of published files; `lam` only if the fit has penalties.

    Args:
        run: The run.
        path: The file. All weights are in memory while it is written.
        fit: Name of the fit; by default the one that `load` chooses.
        setup: The setup whose order of components the file has; by default that of the published setup with these
            components, and the order of the run's table if there is none.

    Raises:
        RunError: When the run has no such fit.
        MismatchError: When the run's components are not those of the setup.
        StorageError: When the file cannot be written.
    """
    attributions = Attributions.open(run, fit or best_fit(run))
    stored = run.published
    table = run.components
    spec = _setup_of(setup) if setup else _known(table)
    places = spec.places(table) if spec else np.arange(len(table))
    imported = stored is not None and attributions.fit.method == PUBLISHED
    kind = getattr(torch, stored.dtype) if stored is not None and imported else torch.float32
    weight = torch.empty(len(table), len(attributions), dtype=kind)
    for part in _parts(len(attributions), len(table), 1):
        values = torch.from_numpy(np.ascontiguousarray(attributions.weights(part).T))
        weight[torch.from_numpy(places), part] = values.to(kind)
    content = {"weight": weight, "bias": torch.from_numpy(attributions.intercept)}
    if attributions.has_penalty:
        content["lam"] = torch.from_numpy(attributions.penalty)
    file = Path(os.path.expanduser(path))
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial)
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError when the disk is full
        with suppress(OSError):
            partial.unlink()
        raise StorageError(f"cannot write {file}: {error}; free space or choose another path") from error


def columns_in(file: Path) -> dict[str, np.ndarray]:
    """Return the columns in a .npz file; raise `SettingsError` when it cannot be read."""
    try:
        with np.load(file, allow_pickle=False) as data:
            return dict(data)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise SettingsError(
            f"{file} has no columns ({error}); write them with numpy.savez('FILE.npz', label=labels)"
        ) from None


def is_imported(path: str | Path | Address) -> bool:
    """Return whether there is an imported run at a path."""
    place = locate(path)
    return state_of(place) == "ready" and Run.open(place).published is not None


def _setup_of(setup: str | PublishedSetup) -> PublishedSetup:
    if isinstance(setup, PublishedSetup):
        return setup
    if setup not in SETUPS:
        raise SettingsError(f"there is no published setup {setup!r}; choose one of {', '.join(SETUPS)}")
    return SETUPS[setup]


def _known(table: Components) -> PublishedSetup | None:
    """Return the first published setup with the components of a table, or None."""
    names = set(table.names)
    return next((setup for setup in SETUPS.values() if names == set(setup.names)), None)


def _read(file: Path, spec: PublishedSetup) -> dict[str, Tensor]:
    """Read the tensors of a published file, the weights mapped into memory; raise `WeightsError` if they do not fit."""
    if not file.is_file():
        raise WeightsError(f"there are no attributions at {file}; check the path, or get the file first")
    content = read_pickle(file, remedy="get the file again, from its authors", mapped=True)
    known = {"weight": 2, "bias": 1, "lam": 1}
    given = {key: value for key, value in content.items() if key in known} if isinstance(content, dict) else {}
    if not {"weight", "bias"} <= given.keys() or not all(isinstance(value, Tensor) for value in given.values()):
        has = ", ".join(map(str, content)) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise WeightsError(f"{file} has {has or 'nothing'}, where {FORMAT} was expected; give a published file")
    shapes = {key: tuple(value.shape) for key, value in given.items()}
    rows, examples = len(spec.names), spec.examples or (shapes["bias"] or (0,))[0]
    wanted = {key: (rows, examples) if axes == 2 else (examples,) for key, axes in known.items() if key in given}
    if shapes != wanted:
        raise WeightsError(
            f"{file} has {_shapes(shapes)}, where {spec.name} has {_shapes(wanted)}{_advice(shapes['weight'], rows)}"
        )
    kinds = {key: value.dtype for key, value in given.items()}
    if not all(kind.is_floating_point for kind in kinds.values()):
        raise WeightsError(f"{file} has numbers of types {kinds}; floating-point numbers were expected")
    return given


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key} of shape {shape}" for key, shape in shapes.items())


def _advice(shape: tuple[int, ...], rows: int) -> str:
    """Return what most likely explains a wrong shape."""
    if len(shape) == 2 and shape[1] == rows:
        return "; the weights look transposed, and (components, examples) is expected"
    others = [setup.name for setup in SETUPS.values() if len(shape) == 2 and len(setup.names) == shape[0]]
    if others and rows != shape[0]:
        return f"; files with {shape[0]} components are those of {', '.join(others)}"
    return "; get the file again, or choose another setup"


def _finite(
    content: dict[str, Tensor], spec: PublishedSetup, not_finite: NotFinite, file: str, fit: str
) -> tuple[np.ndarray, PublishedRecord]:
    """Return the examples to keep, by number, and the record of the file.

    Raises:
        WeightsError: When there are NaNs or infinities that the caller has not allowed, or no example is without them.
    """
    if not_finite not in ("refuse", "leave_out", "zero"):
        raise SettingsError(f"not_finite is {not_finite!r}; choose one of refuse, leave_out, zero")
    weight = content["weight"]
    rows, columns = np.zeros(weight.shape[0], np.int64), np.zeros(weight.shape[1], np.int64)
    for part in _parts(weight.shape[1], weight.shape[0], 1):
        wrong = ~torch.isfinite(weight[:, part])
        rows += wrong.sum(1).numpy()
        columns[part] = wrong.sum(0).numpy()
    other = sum((~torch.isfinite(content[key])).numpy().astype(np.int64) for key in content if key != "weight")
    count = int(columns.sum() + np.sum(other))
    record = PublishedRecord(
        setup=spec.name, file=file, fit=fit, dtype=str(weight.dtype).removeprefix("torch."), not_finite=count
    )
    every = np.arange(weight.shape[1])
    if not count:
        return every, record
    hit, names = np.flatnonzero(columns + other), [spec.names[i] for i in np.flatnonzero(rows)]
    found = (
        f"{file} has {count} numbers that are NaN or infinite, of {len(hit)} examples, {_named(hit.tolist())}, and of "
        f"{len(names)} components, {_named(names) or 'none'}"
    )
    if not_finite == "leave_out" and len(hit) < len(every):
        log.warning("%s; the run is without these examples", found)
        left = tuple(int(i) for i in hit)
        return np.setdiff1d(every, hit), record.model_copy(update={"left_out": left})
    if not_finite == "zero" and not np.any(other):
        log.warning("%s; these weights are 0 in the run", found)
        return every, record.model_copy(update={"zeroed": tuple(names)})
    remedy = {
        "refuse": "leave their examples out (--not-finite leave_out), or take such weights as 0 (--not-finite zero)",
        "leave_out": "no example is without them; take such weights as 0 (--not-finite zero)",
        "zero": "some are in bias or lam, which cannot be 0; leave their examples out (--not-finite leave_out)",
    }
    raise WeightsError(f"{found}; {remedy[not_finite]}")


def _named(items: list[object] | list[str] | list[int]) -> str:
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return ", ".join(map(str, items[:NAMED])) + more


def _columns(metadata: Mapping[str, np.ndarray], examples: int, kept: np.ndarray) -> dict[str, np.ndarray]:
    """Return columns over the kept examples, with their number in the file as `id` unless it is given."""
    columns = {"id": np.arange(examples)} | {name: np.asarray(column) for name, column in metadata.items()}
    wrong = {name: column.shape for name, column in columns.items() if column.shape != (examples,)}
    if wrong:
        raise SettingsError(f"metadata has columns of shapes {wrong}; ({examples},) was expected, one per example")
    return {name: column[kept] for name, column in columns.items()}


def _without_model(place: Path | Address, spec: PublishedSetup, metadata: dict[str, np.ndarray]) -> Run:
    """Create a run of which only the setup is known, or open it again."""
    table = spec.components()
    biased = [spec.biased and row.side == "output" for row in table]
    fingerprint = {
        "components": table.fingerprint(),
        "weights": UNKNOWN,
        "examples": UNKNOWN,
        "ablation": ZeroWeight().settings(),
        "output": OUTPUT.settings(),
        "sampler": BernoulliSampler(ablated_fraction=spec.ablated_fraction).settings(),
        "versions": {"coar": __version__},
    }
    if state_of(place) == "ready":
        run = Run.open(place)
        run.check(fingerprint)
        if run.n_examples != len(metadata["id"]):
            raise MismatchError(f"{run.path} has {run.n_examples} examples, and the file {len(metadata['id'])}")
        return run
    return Run.create(
        place,
        components=table,
        metadata=metadata,
        replacements=np.where(biased, np.nan, 0.0),  # a layer's bias is its constant, and unknown
        fingerprint=fingerprint,
        facts=RunRecord(batch_norms={}, precision=PrecisionRecord(name="float32")),
        blocks=blocks_of(0, len(metadata["id"]), None, None),
    )


def _fitting(study: Study, examples: int, kept: np.ndarray) -> Study:
    """Return a study on the kept examples; raise `MismatchError` unless it is of the published kind."""
    if len(study.examples) != examples:
        raise MismatchError(
            f"the study has {len(study.examples)} examples and the file {examples}; give all of the published ones, in "
            f"their order"
        )
    for what, given, wanted in (("ablation", study.ablation, ZeroWeight()), ("output", study.output, OUTPUT)):
        if given.settings() != wanted.settings():
            raise MismatchError(f"the study's {what} is {given!r}, and published attributions are of {wanted!r}")
    return study if len(kept) == examples else replace(study, examples=study.examples.subset(kept))


def _of_study(place: Path | Address, study: Study, device: str) -> Run:
    """Create a run of a study without masks, or open it again."""
    execution = Execution()
    model = device_copy(study.model, device, study.examples)
    order = RunRequest(
        requested={},
        gradients=0,
        blocks=blocks_of(0, len(study.examples), None, None),
        memory_limit=None,
        precision="auto" if state_of(place) == "ready" else "float32",
        tolerance=execution.precision_tolerance,
    )
    return prepare(study, place, model, order, BatchSettings.choose(study, model, execution, gradients=False))


def _write(
    run: Run,
    content: dict[str, Tensor],
    kept: np.ndarray,
    places: np.ndarray,
    record: PublishedRecord,
    fraction: float,
    *,
    progress: bool,
) -> None:
    """Write the numbers as a fit; the run's entry about the file comes first, so that no fit is without one."""
    run.set_entry(PUBLISHED, record.stored())
    fields = {"weight": "weight", "bias": "intercept", "lam": "penalty"}
    writer = FitWriter(
        run,
        record.fit,
        tuple(field for key, field in fields.items() if key in content),
        FitRecord(method=PUBLISHED, masks=0, ablated_fraction=fraction),
    )
    rows = torch.from_numpy(places)
    for part in progress_bar(_parts(len(kept), len(places), chunk_rows(run)), desc="import", shown=progress):
        numbers = kept[part]
        span = content["weight"][:, int(numbers[0]) : int(numbers[-1]) + 1].float()
        weight = span[rows][:, torch.from_numpy(numbers - numbers[0])].T.numpy()
        if record.zeroed:
            weight = np.where(np.isfinite(weight), weight, 0.0)
        values = {fields[key]: content[key][numbers].float().numpy() for key in content if key != "weight"}
        writer.write(part, weight=np.ascontiguousarray(weight), **values)
    writer.finish()


def _parts(examples: int, components: int, step: int) -> list[slice]:
    """Split examples into parts of whole steps, with at most `PART_BYTES` of weights each if a step allows it."""
    size = max(PART_BYTES // (4 * components) // step, 1) * step
    return [slice(at, min(at + size, examples)) for at in range(0, examples, size)]
