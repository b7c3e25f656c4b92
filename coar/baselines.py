"""Cheaper attributions to compare with: leave-one-out and the mask gradient, stored as fits."""

from collections.abc import Callable

import numpy as np

from coar.attributions import Attributions
from coar.collection.preparation import fast_runner
from coar.errors import AblationError
from coar.forward.batches import ExampleBlock
from coar.forward.devices import choose_device, device_copy
from coar.forward.malloc import memory_kept
from coar.forward.runner import FastRunner
from coar.progress import progress_bar
from coar.store.fits import FitWriter, chunk_rows, fit_record
from coar.store.records import FitRecord
from coar.store.run import Run
from coar.study import Study

MASKS = 64  # single-component masks per call of the worker


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
        AblationError: When some components are parameter slices, which have no output to gate.
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
    worker = fast_runner(study, run, device_copy(study.model, choose_device(device)), batch_size=batch_size)
    with run.lock(), memory_kept():
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
