"""Attributions to compare with, stored as fits: leave-one-out, the mask gradient, and those of any other method."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from coar.attributions import Attributions, best_fit
from coar.collection.preparation import ensure_gradients, fast_runner
from coar.errors import AblationError, IncompleteRunError, SettingsError
from coar.evaluation import evaluate
from coar.forward.batches import ExampleBlock
from coar.forward.copies import device_copy
from coar.forward.malloc import memory_kept
from coar.forward.runner import FastRunner
from coar.progress import progress_bar
from coar.store.fits import FitWriter, blocks_of, check_name, chunk_rows, finished_fits, fit_record
from coar.store.records import FitRecord
from coar.store.run import Run
from coar.study import Study

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

ADDED = "added"  # the method of fits that `add_fit` stores
MASKS = 64  # single-component masks per call of the worker
DOUBTFUL = 0.5  # share of the best fit's held-out correlation below which the order of an added array is doubted
UNRELATED = 0.1  # held-out correlation below which it is doubted where the run has no other fit


def leave_one_out(
    study: Study, run: Run, *, device: str = "auto", batch_size: int | None = None, progress: bool = True
) -> Attributions:
    """Attribute to each component the drop in output when it alone is ablated.

    It costs one forward pass per component, from the component's layer on.

    Args:
        study: The study that the run was made for.
        run: The run to write the attributions into, as fit `leave_one_out`.
        device: Where to compute.
        batch_size: Most examples per forward pass.
        progress: Show a progress bar.

    Raises:
        MismatchError: When the run was made for another study.
    """

    def attribute(worker: FastRunner, block: ExampleBlock, base: np.ndarray) -> np.ndarray:
        d = len(run.components)
        drops = []
        for start in range(0, d, MASKS):
            masks = np.ones((min(MASKS, d - start), d), dtype=bool)
            masks[np.arange(len(masks)), np.arange(start, start + len(masks))] = False
            drops.append(base - worker.outputs(block, masks))
        return np.concatenate(drops).T

    return _store(study, run, "leave_one_out", attribute, device, batch_size, progress)


def mask_gradient(
    study: Study, run: Run, *, device: str = "auto", batch_size: int | None = None, progress: bool = True
) -> Attributions:
    """Attribute to each component the gradient of the output by its gate, at the unablated model.

    This is the first-order estimate of leave-one-out: the sum over positions of (activation - replacement) times the
    activation's gradient. It costs one forward and one backward pass.

    Args:
        study: The study that the run was made for.
        run: The run to write the attributions into, as fit `mask_gradient`.
        device: Where to compute.
        batch_size: Most examples per forward pass.
        progress: Show a progress bar.

    Raises:
        MismatchError: When the run was made for another study.
        AblationError: When some components are parameter slices, which have no output to gate, or gradients are not
            those of the output.
    """
    if "mask_gradient" not in applicable(run):
        raise AblationError("parameter slices have no output to gate, so they have no mask gradient")
    return _store(
        study,
        run,
        "mask_gradient",
        lambda worker, block, _: worker.full_model_gradients(block),
        device,
        batch_size,
        progress,
    )


def add_fit(run: Run, name: str, weight: ArrayLike, intercept: ArrayLike | None = None) -> Attributions:
    """Store attributions of another method as a fit of the run, so that `evaluate` and edits take them as any other.

    The prediction for a mask is the intercept plus the sum of the weights of the kept components. `load` never chooses
    an added fit by itself. A fit of the same name is replaced if it was added too.

    A plain array does not say in which order its rows and columns are. So a warning is logged if it predicts the
    outputs under the run's test masks with less than half of the mean correlation of the run's best fit (without one,
    with less than 0.1): the order is wrong, or the method is. Without test masks nothing is checked.

    Args:
        run: The run to write the attributions into.
        name: Name of the fit.
        weight: (examples, components) numbers, in the order of the run's examples and components. A DataFrame with the
            names of components as columns and ids of examples as index, such as `Attributions.to_pandas` returns, is
            brought into this order.
        intercept: (examples,) predictions with every component ablated; a Series with ids is brought into order. By
            default, the numbers for which the mean prediction on the run's training masks is the mean output.

    Raises:
        SettingsError: When the name belongs to a fit that was not added, an array has another shape or a number that
            is not finite, or labels are not those of the run.
        IncompleteRunError: When no intercept is given, and the run has no training masks or misses units.
    """
    added = store_added(run, name, _ordered("weight", weight, run), _ordered("intercept", intercept, run))
    _doubt_order(run, name)
    return added


def store_added(run: Run, name: str, weight: ArrayLike, intercept: ArrayLike | None) -> Attributions:
    """Store arrays in the order of the run as a fit, see `add_fit`."""
    known = fit_record(run, check_name(name))
    if known is not None and known.method != ADDED:
        raise SettingsError(f"{run.path} has a fit {name!r} by {known.method}; choose another name")
    shape = (run.n_examples, run.n_components)
    weights = _numbers("weight", weight, shape, "(examples, components)")
    intercepts = None if intercept is None else _numbers("intercept", intercept, shape[:1], "(examples,)")
    if intercepts is None:
        intercepts = _centring_intercepts(run, weights)
    record = FitRecord(method=ADDED, masks=0, ablated_fraction=run.sampler.ablated_fraction)
    with run.lock():
        writer = FitWriter(run, name, ("weight", "intercept"), record)
        for examples in blocks_of(run):
            writer.write(examples, weight=weights[examples], intercept=intercepts[examples])
        writer.finish()
    return Attributions.open(run, name)


def _ordered(name: str, given: Any, run: Run) -> Any:
    """Return a table or column of pandas in the order of the run, by its labels; anything else as it is."""
    import pandas as pd

    if not isinstance(given, (pd.DataFrame, pd.Series)):
        return given
    given = given.iloc[_positions(f"the index of {name}", given.index, run.metadata["id"], "ids of the run's examples")]
    if isinstance(given, pd.DataFrame):
        known = run.components.names
        given = given.iloc[
            :, _positions(f"the header of {name}", given.columns, known, "names of the run's components")
        ]
    return given


def _positions(what: str, labels: "pd.Index[Any]", known: Sequence[Any] | np.ndarray, meaning: str) -> np.ndarray:
    """Return where each known label is; pandas' own numbers from 0 say nothing, and are taken as the run's order."""
    import pandas as pd

    if (isinstance(labels, pd.RangeIndex) and labels.name is None) or labels.tolist() == list(known):
        return np.arange(len(labels))
    wanted = pd.Index(known)
    strange = labels.difference(wanted).tolist()
    missing = wanted.difference(labels).tolist()
    if strange or missing or not (labels.is_unique and wanted.is_unique):
        found = f"has {strange[0]!r}" if strange else f"lacks {missing[0]!r}" if missing else "has a label twice"
        raise SettingsError(f"{what} {found}; give the {meaning}, each once, or an array in the run's order")
    return labels.get_indexer(wanted)


def _doubt_order(run: Run, name: str) -> None:
    """Warn if an added fit predicts the outputs under test masks much worse than the run's own best fit does."""
    own = best_fit(run)
    others = [own] if own in finished_fits(run) else []
    try:
        table = evaluate(run, fits=[*others, name]).table
    except IncompleteRunError:
        return
    fraction = min(table["ablated_fraction"], key=lambda one: abs(one - run.sampler.ablated_fraction))
    scores = table[table["ablated_fraction"] == fraction].set_index("fit")["pearson"]
    if scores[name] >= (DOUBTFUL * scores[own] if others else UNRELATED):
        return
    log.warning(
        "fit %r predicts outputs under held-out masks with a mean correlation of %.2f%s: unless the method is that "
        "poor, its rows or columns are in another order than the run's examples (metadata['id']) and components "
        "(components.names); a DataFrame with these labels is put in order",
        name,
        scores[name],
        f", and {own!r} with {scores[own]:.2f}" if others else "",
    )


def _numbers(name: str, given: ArrayLike, shape: tuple[int, ...], meaning: str) -> np.ndarray:
    """Return the array in float32, or raise `SettingsError` when its shape or a number is wrong."""
    try:
        values = np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingsError(f"{name} is not an array of numbers ({error}); give {meaning} numbers") from error
    if values.shape != shape:
        turned = "; it looks transposed: give its .T" if len(shape) == 2 and values.shape == shape[::-1] else ""
        raise SettingsError(f"{name} has shape {values.shape}; {shape} {meaning} was expected{turned}")
    if not np.isfinite(values).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise SettingsError(
            f"{name} has {int((~np.isfinite(values)).sum())} numbers that are not finite, such as {where}"
        )
    return values


def _centring_intercepts(run: Run, weights: np.ndarray) -> np.ndarray:
    """Return (examples,) intercepts with which predictions on the training masks have the outputs' mean."""
    rows = run.plan.rows("train", run.sampler.ablated_fraction)
    if not len(rows):
        raise IncompleteRunError(
            f"{run.path} has no training masks to choose intercepts on; give intercept=, for example zeros: "
            f"correlations do not depend on it"
        )
    run.require_complete()
    kept = run.masks_at(rows).mean(axis=0)
    means = [run.outputs_at(rows, examples).mean(axis=0, dtype=np.float64) for examples in blocks_of(run)]
    centred: np.ndarray = (np.concatenate(means) - weights @ kept).astype(np.float32)
    return centred


BASELINES: dict[str, Callable[..., Attributions]] = {
    "leave_one_out": leave_one_out,
    "mask_gradient": mask_gradient,
}


def applicable(run: Run) -> list[str]:
    """Return the names of the baselines that a run's components allow; parameter slices have no gradient."""
    slices = any(component.side == "parameter" for component in run.components)
    return [name for name in BASELINES if not (slices and name == "mask_gradient")]


def _store(
    study: Study,
    run: Run,
    name: str,
    attribute: Callable[[FastRunner, ExampleBlock, np.ndarray], np.ndarray],
    device: str,
    batch_size: int | None,
    progress: bool,
) -> Attributions:
    run.check(study.fingerprint())
    record = FitRecord(method=name, masks=0, ablated_fraction=run.sampler.ablated_fraction)
    known = fit_record(run, name)
    if known is not None and known.answers(record):
        return Attributions.open(run, name)
    model = device_copy(study.model, device, study.examples)
    worker = fast_runner(study, run, model, batch_size=batch_size)
    with run.lock(), memory_kept():
        if name == "mask_gradient":
            ensure_gradients(study, run, model, batch_size=batch_size)
        writer = FitWriter(run, name, ("weight", "intercept"), record)
        step = max(run.blocks[1] // chunk_rows(run), 1) * chunk_rows(run)
        for start in progress_bar(range(0, run.n_examples, step), desc=name, unit="block", shown=progress):
            examples = slice(start, min(start + step, run.n_examples))
            block = worker.load(study.examples, examples.start, examples.stop)
            base = worker.base_output(block)
            weight = attribute(worker, block, base)
            writer.write(examples, weight=weight, intercept=base - weight.sum(axis=1))
        writer.finish()
    return Attributions.open(run, name)
