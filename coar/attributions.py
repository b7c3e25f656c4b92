"""Attributions: one labelled weight per example and component, read lazily, with predictions of outputs."""

import html
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, overload

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from coar.charts import html_table, signed_bars, signed_grid, split_bars
from coar.components.table import Components, read_component
from coar.errors import RunError, SettingsError, StorageError, WeightsError, install_hint
from coar.renamed import no_attribute
from coar.store.fits import FIELDS, finished_fit, finished_fits, fit_array, fit_fields, read_fit
from coar.store.records import FitRecord
from coar.store.run import Run

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes

BLOCK = 1024  # examples per read when all of them are read
PART_NUMBERS = 2**24  # attributions held at a time by sums over examples
WITHIN = 1.96  # standard errors on either side of a 95 % interval
HTML_ROWS = 10  # components that a notebook shows
PREFERRED = ("informed", "ridge", "ols")


class _Source(Protocol):
    """Storage of the numbers of a fit."""

    def read(self, field: str, *slices: slice) -> np.ndarray: ...
    def fields(self) -> list[str]: ...


@dataclass(frozen=True)
class _RunSource:
    run: Run
    name: str

    def read(self, field: str, *slices: slice) -> np.ndarray:
        return read_fit(self.run, self.name, field, *slices)

    def fields(self) -> list[str]:
        return fit_fields(self.run, self.name)


@dataclass(frozen=True)
class _FileSource:
    path: Path

    def read(self, field: str, *slices: slice) -> np.ndarray:
        with safe_open(self.path, framework="np") as file:
            stored = file.get_slice(field)
            start, stop, step = slices[0].indices(stored.get_shape()[0])
            return np.asarray(stored[start : max(start, stop)])[::step]

    def fields(self) -> list[str]:
        with safe_open(self.path, framework="np") as file:
            return [field for field in FIELDS if field in file.keys()]  # noqa: SIM118


@dataclass(frozen=True, eq=False)
class Origin:
    """Facts about the study and ablation of attributions that edits need.

    Attributes:
        constants: (components.width,) float32 constants that replaced ablated components, one per channel; NaN where
            the ablation has none, as under resampling.
        batch_norms: By site, the path of the batch norm that takes the site's constants.
        fingerprint: The fingerprint of the study.
        accepted_code: Hashes of other code that the run accepted as equivalent, see `Run.accept_code`.
        accepted_checks: Names of checks before the run that failed and were accepted.
    """

    constants: np.ndarray
    batch_norms: dict[str, str]
    fingerprint: dict[str, Any]
    accepted_code: tuple[dict[str, Any], ...] = ()
    accepted_checks: tuple[str, ...] = ()

    @property
    def ablation(self) -> str:
        """Name of the ablation."""
        return str(self.fingerprint["ablation"]["name"])

    @property
    def weights(self) -> str:
        """SHA-256 of the model's weights."""
        return str(self.fingerprint["weights"])

    @property
    def codes(self) -> tuple[dict[str, Any], ...]:
        """Hashes of the code of the model, and of code accepted as equivalent; empty if the run does not know them."""
        own = self.fingerprint.get("code")
        return (own, *self.accepted_code) if own else ()


@dataclass(frozen=True)
class Attributions:
    """Attributions of all examples of a run, read on access.

    A positive weight means that keeping the component raises the example's output.

    Attributes:
        components: The component table.
        metadata: Columns over the examples.
        fit: Record of the fit: its method, the number of masks, and facts specific to the method.
        origin: The study and the ablation that the attributions come from.
    """

    components: Components
    metadata: dict[str, np.ndarray]
    fit: FitRecord
    origin: Origin
    _source: _Source

    if not TYPE_CHECKING:  # a type checker knows the attributes

        def __getattr__(self, name: str) -> Any:
            raise no_attribute(self, name)

    @classmethod
    def open(cls, run: Run, name: str) -> Self:
        """Open a finished fit of a run; raise `RunError` when the run has no fit of that name."""
        fit_array(run, name, "weight")
        constants = run.replacements
        if constants.ndim == 2:  # constants by position: no single constant, as under resampling
            constants = np.full(run.components.width, np.nan)
        checks = tuple(run.facts.preflight.accepted) if run.facts.preflight else ()
        origin = Origin(
            constants.astype(np.float32), run.facts.batch_norms, run.fingerprint, tuple(run.accepted_code), checks
        )
        return cls(run.components, run.metadata, finished_fit(run, name), origin, _RunSource(run, name))

    @classmethod
    def from_safetensors(cls, path: str | Path) -> Self:
        """Read attributions written by `to_safetensors`; raise `WeightsError` for any other file."""
        file = Path(os.path.expanduser(path))
        try:
            with safe_open(file, framework="np") as data:
                header = data.metadata() or {}
            components = Components(read_component(row) for row in json.loads(header["components"]))
            metadata = {name: np.asarray(column) for name, column in json.loads(header["examples"]).items()}
            shape = (len(metadata["id"]), len(components))
            with safe_open(file, framework="np") as data:
                if tuple(data.get_slice("weight").get_shape()) != shape:
                    raise ValueError(f"the weights do not have shape {shape}")
            fit, origin = _read_facts(json.loads(header["facts"]), components)
            return cls(components, metadata, fit, origin, _FileSource(file))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{file} does not hold attributions ({error!r}); export them again") from None

    def to_safetensors(self, path: str | Path) -> None:
        """Write the attributions into one file that can be read without the run.

        Raises:
            StorageError: When the file cannot be written.
        """
        tensors = {field: self._read(field, slice(None)) for field in self._source.fields()}
        facts = {
            "fit": self.fit.stored(),
            "fingerprint": self.origin.fingerprint,
            "accepted_code": self.origin.accepted_code,
            "accepted_checks": self.origin.accepted_checks,
            "batch_norms": self.origin.batch_norms,
            "replacements": self.origin.constants.tolist(),
        }
        header = {
            "components": json.dumps(list(self.components)),
            "examples": json.dumps({name: column.tolist() for name, column in self.metadata.items()}),
            "facts": json.dumps(facts),
        }
        file = Path(os.path.expanduser(path))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, file, metadata=header)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot write attributions to {file}: {error}; choose another path") from error

    def __len__(self) -> int:
        return len(self.metadata["id"])

    def __repr__(self) -> str:
        return f"Attributions({len(self)} examples, {len(self.components)} components, {self.fit.method})"

    @overload
    def __getitem__(self, index: int) -> "ExampleAttribution": ...
    @overload
    def __getitem__(self, index: slice) -> "list[ExampleAttribution]": ...
    def __getitem__(self, index: int | slice) -> "ExampleAttribution | list[ExampleAttribution]":
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = int(self._positions(np.array([index]))[0])
        rows = slice(at, at + 1)
        errors = self._read("standard_error", rows)[0] if "standard_error" in self._source.fields() else None
        identity = {name: column[at].item() for name, column in self.metadata.items()}
        return ExampleAttribution(
            self.components, self._read("weight", rows)[0], errors, float(self.intercept[at]), identity
        )

    def weights(self, examples: slice | np.ndarray | None = None) -> np.ndarray:
        """Return (examples, components) float32 weights of all examples, a slice of them, or chosen ones."""
        return self._chosen("weight", examples)

    def standard_errors(self, examples: slice | np.ndarray | None = None) -> np.ndarray:
        """Return (examples, components) float32 standard errors; raise `RunError` when the method has none."""
        if not self.has_standard_errors:
            raise RunError(f"{self.fit.method} gives no standard errors; fit with ridge or ols to get them")
        return self._chosen("standard_error", examples)

    @property
    def has_standard_errors(self) -> bool:
        """Whether the method gives standard errors."""
        return "standard_error" in self._source.fields()

    @property
    def intercept(self) -> np.ndarray:
        """(examples,) float32 predictions with every component ablated."""
        return self._read("intercept", slice(None))

    @property
    def has_penalty(self) -> bool:
        """Whether the fit has penalties."""
        return "penalty" in self._source.fields()

    @property
    def penalty(self) -> np.ndarray:
        """(examples,) float32 ridge penalties."""
        return self._read("penalty", slice(None))

    def predict(self, masks: np.ndarray) -> np.ndarray:
        """Return (masks, examples) float32 predicted outputs.

        Args:
            masks: (masks, components) booleans, True keeps.
        """
        design = np.atleast_2d(np.asarray(masks))
        if design.ndim != 2 or design.shape[1] != len(self.components) or design.dtype != bool:
            raise SettingsError(
                f"masks have shape {np.shape(masks)} and type {design.dtype}; (masks, {len(self.components)}) booleans "
                f"were expected, True where the component is kept"
            )
        x = design.astype(np.float32)
        parts = [x @ self.weights(slice(at, at + BLOCK)).T for at in range(0, len(self), BLOCK)]
        predicted: np.ndarray = np.concatenate(parts, axis=1) + self.intercept
        return predicted

    def to_xarray(self) -> "xr.Dataset":
        """Return a labelled data set over (example, component); needs the extra `xarray`."""
        try:
            import xarray
        except ImportError:
            raise SettingsError(f"to_xarray needs xarray; {install_hint('xarray')}") from None
        fields = {field: self._read(field, slice(None)) for field in self._source.fields()}
        coordinates = {name: ("example", column) for name, column in self.metadata.items()}
        coordinates["component"] = ("component", np.array(self.components.names))
        coordinates["site"] = ("component", np.array([row.site for row in self.components]))
        data = {name: (("example", "component")[: value.ndim], value) for name, value in fields.items()}
        return xarray.Dataset(data, coords=coordinates)

    def to_pandas(self) -> "pd.DataFrame":
        """Return (examples, components) weights as a frame with component names, its index the examples' id."""
        import pandas as pd

        return pd.DataFrame(self.weights(), columns=list(self.components.names), index=self.metadata["id"]).rename_axis(
            index="id", columns="component"
        )

    def plot_layers(self, examples: slice | np.ndarray | None = None, *, ax: "Axes | None" = None) -> "Axes":
        """Draw, layer by layer, the sum of weights above 0 and of those below, averaged over examples.

        Args:
            examples: A slice of the examples, positions or booleans; by default all.
            ax: Matplotlib axes; by default those of a new figure.

        Returns:
            The axes.
        """
        weights = self.weights(examples)
        sites = np.array([component.site for component in self.components])
        names = list(dict.fromkeys(sites.tolist()))
        above, below = (
            np.array([part[:, sites == name].sum(1).mean() for name in names])
            for part in (weights.clip(min=0), weights.clip(max=0))
        )
        return split_bars(ax, names, above, below, xlabel="mean sum of weights")

    def plot_heads(self, examples: slice | np.ndarray | None = None, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the mean weight of every attention head as a grid of layers and heads.

        Args:
            examples: A slice of the examples, positions or booleans; by default all.
            ax: Matplotlib axes; by default those of a new figure.

        Returns:
            The axes.

        Raises:
            SettingsError: When none of the components is an attention head.
        """
        heads = [(i, one) for i, one in enumerate(self.components) if one.kind == "attention head"]
        if not heads:
            raise SettingsError(f"{self!r} has no attention heads to draw; plot_layers draws any components")
        sites = list(dict.fromkeys(one.site for _, one in heads))
        means = self.weights(examples).mean(0)
        cells = np.full((len(sites), 1 + max(one.position // one.size for _, one in heads)), np.nan)
        for i, one in heads:
            cells[sites.index(one.site), one.position // one.size] = means[i]
        return signed_grid(ax, sites, cells, xlabel="head", title="mean weight")

    def _repr_html_(self) -> str:
        means = self.components.to_pandas()[["name", "kind"]].assign(mean_weight=self.weights().mean(0))
        strongest = means.loc[means["mean_weight"].abs().nlargest(HTML_ROWS).index]
        return f"<p>{html.escape(repr(self))}; the strongest components on average:</p>{html_table(strongest)}"

    def _chosen(self, field: str, examples: slice | np.ndarray | None) -> np.ndarray:
        if examples is None or isinstance(examples, slice):
            return self._read(field, examples or slice(None))
        rows = self._positions(np.asarray(examples))
        starts = sorted({int(row) // BLOCK * BLOCK for row in rows})
        out = np.empty((len(rows), len(self.components)), dtype=np.float32)
        for start in starts:
            here = (rows >= start) & (rows < start + BLOCK)
            low, high = int(rows[here].min()), int(rows[here].max()) + 1
            out[here] = self._read(field, slice(low, high))[rows[here] - low]
        return out

    def _positions(self, examples: np.ndarray) -> np.ndarray:
        """Convert booleans, or positions of which negative ones count from the end, into positions."""
        if examples.dtype == bool and examples.shape != (len(self),):
            raise IndexError(f"{len(examples)} booleans were given for {len(self)} examples; give one for each")
        rows = np.flatnonzero(examples) if examples.dtype == bool else examples
        outside = rows[(rows < -len(self)) | (rows >= len(self))]
        if len(outside):
            raise IndexError(f"example {outside[0]} was given; there are {len(self)} examples, counted from 0")
        return rows % len(self)

    def _read(self, field: str, rows: slice) -> np.ndarray:
        wide = (slice(None),) if field in ("weight", "standard_error") else ()
        return self._source.read(field, rows, *wide)


@dataclass(frozen=True)
class ExampleAttribution:
    """Attributions of one example.

    Attributes:
        components: The component table.
        weight: (components,) weights.
        standard_error: (components,) standard errors; None when the method gives none.
        intercept: Prediction with every component ablated.
        identity: The example's metadata.
    """

    components: Components
    weight: np.ndarray
    standard_error: np.ndarray | None
    intercept: float
    identity: dict[str, Any]

    def top(self, k: int) -> "pd.DataFrame":
        """Return the k components that raise the output most, strongest first."""
        return self.to_pandas().nlargest(k, "weight")

    def bottom(self, k: int) -> "pd.DataFrame":
        """Return the k components that lower the output most, strongest first."""
        return self.to_pandas().nsmallest(k, "weight")

    def plot(self, k: int = 10, *, ax: "Axes | None" = None) -> "Axes":
        """Draw the k components that raise the output most and the k that lower it most, with 95 % intervals.

        Args:
            k: Components on each side, at most half of all.
            ax: Matplotlib axes; by default those of a new figure.

        Returns:
            The axes.

        Raises:
            SettingsError: When k is below 1.
        """
        rows = self._strongest(k)
        half = None if self.standard_error is None else WITHIN * rows["standard_error"].to_numpy()
        return signed_bars(ax, rows["name"].tolist(), rows["weight"].to_numpy(), half, xlabel="weight")

    def _repr_html_(self) -> str:
        return html_table(self._strongest(HTML_ROWS // 2))

    def _strongest(self, k: int) -> "pd.DataFrame":
        """Return the k largest weights, then the k smallest, all in falling order."""
        import pandas as pd

        if k < 1:
            raise SettingsError(f"{k} components were asked for; give 1 or more")
        ordered = self.to_pandas().sort_values("weight", ascending=False, kind="stable")
        return ordered if 2 * k >= len(ordered) else pd.concat([ordered.head(k), ordered.tail(k)])

    def by_layer(self) -> "pd.DataFrame":
        """Return, per site in model order, the sum of weights, of their magnitudes, and the number of components."""
        frame = self.to_pandas()
        frame["magnitude"] = frame["weight"].abs()
        groups = frame.groupby("site", sort=False)
        sums = groups[["weight", "magnitude"]].sum().rename(columns={"weight": "total"})
        return sums.assign(components=groups.size())

    def to_pandas(self) -> "pd.DataFrame":
        """Return a frame with name, site, weight and standard error, its index the component's index."""
        frame = self.components.to_pandas()[["name", "site"]].assign(weight=self.weight)
        return frame if self.standard_error is None else frame.assign(standard_error=self.standard_error)


def _read_facts(facts: dict[str, Any], components: Components) -> tuple[FitRecord, Origin]:
    """Return the record of the fit and the origin from an exported file; raise when one is missing or of another type.

    Older versions wrote one constant per component; it is repeated for each channel.
    """
    needed = facts["fingerprint"]["weights"], facts["fingerprint"]["ablation"]["name"]
    if not all(isinstance(value, str) for value in needed):
        raise TypeError("weights and ablation are not strings")
    constants = components.per_channel(np.array([float(value) for value in facts["replacements"]]))
    if not all(isinstance(name, str) for name in facts["batch_norms"].values()):
        raise TypeError("names of batch norms are not strings")
    accepted = tuple(dict(one) for one in facts.get("accepted_code", []))
    checks = tuple(str(name) for name in facts.get("accepted_checks", []))
    origin = Origin(constants.astype(np.float32), facts["batch_norms"], facts["fingerprint"], accepted, checks)
    return FitRecord.read(facts["fit"]), origin


def load(path: str | Path, fit: str | None = None) -> Attributions:
    """Load attributions without the model: from a run, or from a safetensors file.

    Args:
        path: A run, or a file written by `Attributions.to_safetensors`.
        fit: Name of the fit in the run. By default, the fit named after its method that predicted validation masks
            best; without validation masks, the one with the best method. Never a baseline.

    Raises:
        RunError: When the run has no such fit.
    """
    if os.path.isfile(os.path.expanduser(path)):
        return Attributions.from_safetensors(path)
    run = Run.open(path)
    return Attributions.open(run, fit or best_fit(run))


def best_fit(run: Run) -> str:
    """Return the name of the fit that `load` chooses from a run; `ridge` when the run has none."""
    fitted = {name: record for name, record in finished_fits(run).items() if not record.of_baseline}
    scores = {name: -1.0 if record.validation is None else record.validation for name, record in fitted.items()}
    usual = sorted((name for name in PREFERRED if name in fitted), key=lambda name: -scores[name])
    return next(iter([*usual, *fitted]), "ridge")


def mean_standard_errors(attributions: Attributions, rows: np.ndarray) -> np.ndarray:
    """Return (components,) mean standard errors of these examples' attributions, zeros where the fit has none.

    The errors of one component are correlated between similar examples, so they are not reduced by averaging.
    """
    total = np.zeros(len(attributions.components))
    if attributions.has_standard_errors:
        for part in _parts(attributions, rows):
            total += attributions.standard_errors(part).sum(0, dtype=np.float64)
    return total / len(rows)


def group_means(attributions: Attributions, rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return (groups, components) mean attributions of each group, in the order of `np.unique`."""
    names, of, counts = np.unique(groups, return_inverse=True, return_counts=True)
    sums = np.zeros((len(names), len(attributions.components)))
    for part, here in zip(_parts(attributions, rows), _parts(attributions, of), strict=True):
        sums += np.equal.outer(np.arange(len(names)), here).astype(np.float32) @ attributions.weights(part)
    return sums / counts[:, None]


def _parts(attributions: Attributions, rows: np.ndarray) -> list[np.ndarray]:
    """Split rows into parts of at most `PART_NUMBERS` attributions each."""
    step = min(BLOCK, max(PART_NUMBERS // len(attributions.components), 1))
    return [rows[at : at + step] for at in range(0, len(rows), step)]


def attribution_moments(
    attributions: Attributions, rows: np.ndarray, others: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (components,) mean and unbiased variance over examples, or over differences, one block at a time."""
    count, mean, squares = 0, np.zeros(len(attributions.components)), np.zeros(len(attributions.components))
    both = (_parts(attributions, side) for side in (rows, rows if others is None else others))
    for part, other in zip(*both, strict=True):
        weights = attributions.weights(part).astype(np.float64)
        if others is not None:
            weights -= attributions.weights(other)
        here = weights.mean(0)
        gap, total = here - mean, count + len(weights)
        squares += ((weights - here) ** 2).sum(0) + gap**2 * count * len(weights) / total
        mean, count = mean + gap * len(weights) / total, total
    return mean, squares / max(count - 1, 1)
