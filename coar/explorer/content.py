"""All that a page shows of a run, as one JSON object."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coar._version import __version__
from coar.attributions import Attributions, best_fit
from coar.components.table import Components
from coar.description import describe
from coar.errors import IncompleteRunError, RunError
from coar.evaluation import Evaluation, evaluate
from coar.explorer.activations import Computed, compute, first_kernels
from coar.explorer.attention import attention_patterns
from coar.explorer.edits import edits_of
from coar.explorer.inputs import input_maps
from coar.explorer.language import language_of
from coar.explorer.looks import looks_of, sheet
from coar.explorer.packing import floats, plain, shares, steps, table
from coar.explorer.part import Part, part_of, whole_part
from coar.explorer.source import Source
from coar.store.fits import finished_fits
from coar.store.run import Run

if TYPE_CHECKING:
    import pandas as pd

NO_PIPELINE = (
    "The page was made without the pipeline, so it has no pictures or texts, no predictions and no activations; "
    "'coar report RUN --pipeline FILE' adds them."
)
BLUE, ORANGE = np.array([0.0, 0.45, 0.70]), np.array([0.84, 0.37, 0.0])  # Okabe and Ito (2008)
SITES = 300  # layers whose sums are shown, at most
ENLARGED = 32  # pixels of a kernel's side on the page, about


def gather(
    run: Run,
    folder: Path,
    *,
    fit: str | None = None,
    source: Source | None = None,
    evaluation: Evaluation | None = None,
) -> dict[str, Any]:
    """Return what a page shows of a run.

    Args:
        run: The run.
        folder: Its reports folder, where edits are, and circuits, traces and lenses may be.
        fit: Name of the fit; by default the best one.
        source: The pipeline; None without one.
        evaluation: The evaluation of the run; by default it is computed.

    Raises:
        RunError: When the run has no fit of that name.
    """
    notes = [] if source is not None else [NO_PIPELINE]
    name = fit or default_fit(run)
    attributions = None if name is None else Attributions.open(run, name)
    if attributions is None:
        notes.append("The run has no fit, so the page has no attributions; 'coar fit RUN' makes one.")
    part = part_of(attributions) if attributions is not None else whole_part(run.n_examples, run.n_components)
    notes += part.sentences()
    layers = len({component.site for component in run.components})
    if layers > SITES:
        notes.append(f"The model has {layers:,} layers with components, too many to show sums of each.")
    if evaluation is None:
        evaluation = _evaluation(run, notes)
    computed = compute(source.study, part.examples, run.facts.batch_norms) if source is not None else None
    maps = input_maps(source.study, part.examples, notes) if source is not None else None
    patterns = attention_patterns(source.study, part.examples) if source is not None else None
    made: dict[str, Any] = {
        "title": Path(str(run.path)).name,
        "version": __version__,
        "facts": describe(run),
        "output": run.fingerprint["output"],
        "examples": _examples(run, part, source, computed),
        "components": _components(run.components, part, source, computed),
        "pipeline": None if source is None or source.file is None else str(source.file),
        "run": str(run.path),
        "notes": notes,
    }
    if maps is not None:
        made["examples"]["inputs"] = steps(maps)
    if patterns is not None:
        made["attention"] = patterns.packed(part.components)
    made |= language_of(_folders(folder, source), run, notes)
    made["edits"] = edits_of(folder, made["components"]["names"], attributions, source)
    if attributions is not None and name is not None:
        made["fit"] = _fit(attributions, name, part, run)
    if evaluation is not None:
        made["evaluation"] = _scores(evaluation, part)
    return made


def _folders(folder: Path, source: Source | None) -> list[Path]:
    """Return the reports folder, and those into which the commands of language models write by default."""
    if source is None or source.file is None:
        return [folder]
    name = source.file.stem
    return [folder, *(folder.parent / one for one in (name, f"{name}-circuit") if folder.parent / one != folder)]


def default_fit(run: Run) -> str | None:
    """Return the name of the fit that `load` chooses; of a run with baselines only, the first; None without any."""
    found = finished_fits(run)
    if all(record.of_baseline for record in found.values()):
        return next(iter(found), None)
    return best_fit(run)


def _evaluation(run: Run, notes: list[str]) -> Evaluation | None:
    """Return the evaluation of a run; None with a note of the reason when it cannot be evaluated."""
    try:
        return evaluate(run)
    except (IncompleteRunError, RunError) as error:
        notes.append(f"No evaluation: {error}.")
        return None


def _examples(run: Run, part: Part, source: Source | None, computed: Computed | None) -> dict[str, Any]:
    metadata = {name: [plain(value) for value in column[part.examples]] for name, column in run.metadata.items()}
    made: dict[str, Any] = {
        "rows": part.examples.tolist(),
        "of": part.n_examples,
        "metadata": metadata,
        "output": floats(
            run.column("base_output")[part.examples] if len(run.plan) else np.full(len(metadata["id"]), np.nan)
        ),
    }
    if source is not None:
        made |= looks_of(source.study.examples, part.examples, source.show, source.tokenizer).packed()
    if computed is not None and computed.correct is not None:
        made["correct"] = computed.correct.tolist()
    if computed is not None and computed.predicted is not None and computed.probability is not None:
        made |= {"predicted": computed.predicted.tolist(), "probability": floats(computed.probability)}
    return made


def _components(components: Components, part: Part, source: Source | None, computed: Computed | None) -> dict[str, Any]:
    sites = list(dict.fromkeys(one.site for one in components))
    number = {site: i for i, site in enumerate(sites)}
    chosen = [components[int(i)] for i in part.components]
    made: dict[str, Any] = {
        "rows": part.components.tolist(),
        "of": part.n_components,
        "names": [one.name for one in chosen],
        "kinds": [one.kind for one in chosen],
        "sites": sites,
        "site": [number[one.site] for one in chosen],
        "index": [one.position // one.size for one in chosen],
    }
    if source is not None:
        kernels = first_kernels(source.study.model, components)
        there = [i for i, row in enumerate(part.components.tolist()) if row in kernels]
        if there:
            drawn = _drawn([kernels[int(part.components[i])] for i in there])
            made["kernels"] = {"components": there, **sheet(drawn)}
    if computed is not None:
        found = computed.exciting
        made["exciting"] = {
            "rows": found.rows[part.components].tolist(),
            "values": floats(found.values[part.components]),
            "places": floats(found.places[part.components]),
            "maps": shares(found.maps[part.components]),
        }
    return made


def _drawn(kernels: list[np.ndarray]) -> np.ndarray:
    """Return kernels as pictures: weights of one channel from blue over white to orange, those of three as colours."""
    drawn = []
    for kernel in kernels:
        unit = kernel / max(float(np.abs(kernel).max()), 1e-12)
        if kernel.shape[2] == 3:
            shares = (unit + 1) / 2
        else:
            end = np.where(unit < 0, BLUE, ORANGE)
            shares = 1 + np.abs(unit) * (end - 1)
        drawn.append((255 * shares).round().astype(np.uint8))
    factor = max(1, ENLARGED // max(drawn[0].shape[:2]))
    return np.stack(drawn).repeat(factor, axis=1).repeat(factor, axis=2)


def _fit(attributions: Attributions, name: str, part: Part, run: Run) -> dict[str, Any]:
    """Return weights and their standard errors, and per example the sums over all components and over each site."""
    sites = list(dict.fromkeys(one.site for one in attributions.components))
    number = {site: i for i, site in enumerate(sites)}
    site = np.array([number[one.site] for one in attributions.components])
    weights = attributions.weights(part.examples)
    made: dict[str, Any] = {
        "name": name,
        "method": attributions.fit.method,
        "masks": attributions.fit.masks,
        "gradients": attributions.fit.gradients,
        "fraction": run.sampler.ablated_fraction,
        "weights": steps(weights[:, part.components]),
        "full": floats(attributions.intercept[part.examples] + weights.sum(1)),
    }
    if len(sites) <= SITES:
        parts = [weights[:, site == i] for i in range(len(sites))]
        made["above"] = steps(np.stack([part.clip(min=0).sum(1) for part in parts], axis=1))
        made["below"] = steps(np.stack([part.clip(max=0).sum(1) for part in parts], axis=1))
    if attributions.has_standard_errors:
        made["errors"] = steps(attributions.standard_errors(part.examples)[:, part.components])
    return made


def _scores(evaluation: Evaluation, part: Part) -> dict[str, Any]:
    """Return an evaluation's table, and per fit the examples' scores at the fraction of the training masks."""
    fractions = evaluation.table["ablated_fraction"].unique()
    main = min(fractions, key=lambda fraction: abs(fraction - evaluation.ablated_fraction))
    at_main = evaluation.per_example[evaluation.per_example["ablated_fraction"] == main]
    return {
        "table": table(evaluation.table),
        "fraction": float(main),
        "fits": {str(name): _per_example(rows, part) for name, rows in at_main.groupby("fit", sort=False)},
    }


def _per_example(rows: "pd.DataFrame", part: Part) -> dict[str, Any]:
    ordered = rows.set_index("example").loc[part.examples]
    return {
        name: floats(ordered[name].to_numpy(np.float32))
        for name in ("pearson", "spearman", "explained_variance", "slope")
    }
