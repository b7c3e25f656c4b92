"""The fit of a run: reads it once, solves for every example, and writes the attributions into it."""

import logging
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from coar.attributions import Attributions
from coar.cluster import RayCluster, connected
from coar.errors import IncompleteRunError, RegressionError, SettingsError
from coar.evaluation import score
from coar.forward.devices import choose_device
from coar.forward.memory_limit import readable
from coar.progress import progress_bar
from coar.regression.distributed.cluster import ClusterFit
from coar.regression.distributed.partial_sums import PartialSums
from coar.regression.fit_plan import FitPlan
from coar.regression.informed.fit import Informed
from coar.regression.iterative.solver import Iterative
from coar.regression.iterative.sparse import IterativeSparse
from coar.regression.lasso import Design, Sparse
from coar.regression.memory import plan_of
from coar.regression.ridge import FromMoments, FromOutputs
from coar.regression.sums import FitBlock, Gram, Solution, Solver, Streamed, Sums, takes_moments
from coar.renamed import new_arguments_only
from coar.store.fits import BegunFit, add_validation, check_name, chunk_rows, finished_fit, fit_record
from coar.store.gradients import MaskGradients
from coar.store.lock import worker_lock
from coar.store.plan import check_worker
from coar.store.records import FitLearned, FitRecord, FitRequest
from coar.store.run import Run

log = logging.getLogger(__name__)
METHODS = {  # the arrays of a fit by its method
    "ridge": ("weight", "intercept", "standard_error", "penalty"),
    "ols": ("weight", "intercept", "standard_error", "penalty"),
    "lasso": ("weight", "intercept", "penalty"),
    "informed": ("weight", "intercept", "standard_error"),
}


@new_arguments_only
def fit(
    run: Run,
    *,
    method: str = "auto",
    masks: int | None = None,
    gradients: int | None = None,
    name: str | None = None,
    refit: bool = False,
    merge: bool = False,
    cluster: RayCluster | None = None,
    memory_limit: int | str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Attributions:
    """Fit one linear model per example from masks to outputs and write it into the run.

    Args:
        run: A complete run; its test masks are not read.
        method: `ridge`, with a penalty per example chosen by generalised cross-validation; `ols`; `lasso`, with sparse
            weights and penalties chosen in the same way; `informed`, which starts from mask gradients and corrects them
            by masks, if there are any; or `auto`: `ridge` without mask gradients, else `informed`. If the run also has
            validation masks and no name is given, `auto` fits both and returns the one that predicts these better.
        masks: Number of training masks to use, the first ones; by default all.
        gradients: Number of mask gradients to use, the first ones; a number that ends inside a round is rounded down to
            whole rounds, with a warning.
        name: Name of the fit in the run; by default the method.
        refit: Fit again even if the run already has this fit.
        merge: Solve from the sums that the workers of a job array made by `fit_share`.
        cluster: Make sums and solve on a Ray cluster.
        memory_limit: Most memory that the fit may take, in bytes or as text such as `4GiB`; by default half of what is
            free. The plan that keeps it is logged. A fit that one decomposition of the masks would take beyond the
            limit is iterative. On a cluster it is the limit of each worker.
        device: Where a fit computes: `auto`, `cpu`, `cuda` or `cuda:N`; `mps` has no float64. On a CUDA device no fit
            decomposes masks: `ridge`, `ols`, `lasso` and the correction of `informed` are iterative there.
        progress: Show a progress bar.

    Returns:
        The attributions, read lazily from the run.

    Raises:
        SettingsError: When there is no such method or device, or the device has no float64.
        IncompleteRunError: When units are missing, or the sums of a worker.
        EngineError: When the cluster cannot be reached, or its workers fail.
        RegressionError: When there are fewer than two masks, too few for least squares, or too few mask gradients; when
            an example does not converge; or when the memory limit is too small for one block of examples.
    """
    if method not in (*METHODS, "auto"):
        raise SettingsError(f"unknown method {method!r}; choose auto or one of {', '.join(METHODS)}")
    if len(run.plan) or not MaskGradients(run).count:
        run.require_complete()
    rounds = _rounds(run, gradients, method)
    rows = _rows(run, masks, none_will_do=rounds > 0)
    common: dict[str, Any] = {"refit": refit, "progress": progress, "merge": merge, "cluster": cluster}
    common |= {"memory_limit": memory_limit, "device": fit_device(device)}
    if merge:
        method = _summed_method(method, rounds, rows, run)
    if method != "auto":
        return _fit(run, method, rows, rounds, name or method, **common)
    if not rounds:
        return _fit(run, "ridge", rows, 0, name or "ridge", **common)
    informed_fit = _fit(run, "informed", rows, rounds, name or "informed", **common)
    if len(rows) < 2 or name or not run.plan.count("validation", run.sampler.ablated_fraction) >= 2:
        return informed_fit
    ridge_fit = _fit(run, "ridge", rows, 0, "ridge", **common)
    return max(informed_fit, ridge_fit, key=lambda fitted: fitted.fit.require_validation())


def fit_share(
    run: Run, worker: tuple[int, int], *, method: str = "auto", masks: int | None = None, name: str | None = None
) -> None:
    """Make the sums over masks of worker k of n for a fit, and store them in the run.

    All workers get the same settings and run in any order or at once. Then `fit` with `merge` adds up and solves.

    Args:
        run: A complete run.
        worker: k and n, counted from 1.
        method: As for `fit`.
        masks: As for `fit`.
        name: As for `fit`.

    Raises:
        IncompleteRunError: When units are missing.
        MismatchError: When the sums were begun with another number of workers.
        RegressionError: When there are no more masks than components, so that the fit does not use sums, or when the
            sums do not fit into half of the free memory.
    """
    among = check_worker(worker)
    run.require_complete()
    if method not in (*METHODS, "auto"):
        raise SettingsError(f"unknown method {method!r}; choose auto or one of {', '.join(METHODS)}")
    rows = _rows(run, masks, none_will_do=False)
    method = _summed_method(method, _rounds(run, None, method), rows, run)
    _require_sums(plan_of(run, method, len(rows), memory_limit=None, device=torch.device("cpu")), run.n_components)
    shares = PartialSums(run, check_name(name or method), rows, chunk_rows(run))
    with worker_lock(run.path, prepared=shares.prepared) as lock:
        if lock.alone:
            shares.lay_out(among[1])
            lock.share()
        shares.do(among)


def _summed_method(method: str, rounds: int, rows: np.ndarray, run: Run) -> str:
    """Return the method of a fit from workers' sums; raise `RegressionError` when the fit does not use sums."""
    if len(rows) <= run.n_components:
        raise RegressionError(
            f"{len(rows)} masks and {run.n_components} components were given; a fit in shares needs more masks than "
            f"components: fit in one process, or on a Ray cluster"
        )
    return method if method != "auto" else "informed" if rounds else "ridge"


def _rows(run: Run, masks: int | None, *, none_will_do: bool) -> np.ndarray:
    rows = run.plan.rows("train", run.sampler.ablated_fraction)
    if masks is not None and not (2 <= masks <= len(rows) or (masks == 0 and none_will_do)):
        raise RegressionError(f"{masks} masks were requested and the run has {len(rows)}; choose 2 to {len(rows)}")
    return rows[:masks]


def _rounds(run: Run, gradients: int | None, method: str) -> int:
    """Return how many rounds of mask gradients to use, all of them collected."""
    found = MaskGradients(run)
    if method not in ("informed", "auto"):
        return 0
    missing = found.missing_units()
    if missing:
        raise IncompleteRunError(
            f"{len(missing)} of {len(found.units())} units of mask gradients of {run.path} have not been "
            f"collected; run 'coar collect' again to finish the run"
        )
    if method == "informed" and not found.count:
        raise RegressionError(
            f"an informed fit needs mask gradients, and {run.path} has none; collect some, such as --gradients 64"
        )
    return found.whole_rounds(gradients)


def _fit(
    run: Run,
    method: str,
    rows: np.ndarray,
    rounds: int,
    name: str,
    *,
    refit: bool,
    progress: bool,
    merge: bool,
    cluster: RayCluster | None,
    memory_limit: int | str | None,
    device: torch.device,
) -> Attributions:
    if method != "informed" and len(rows) < 2:
        raise RegressionError(
            f"a fit needs at least two training masks, and {run.path} has {len(rows)}; collect with --masks"
        )
    label = check_name(name)
    gradients = {"gradients": sum(MaskGradients(run).rounds[:rounds])} if method == "informed" else {}
    request = FitRequest(method=method, masks=len(rows), ablated_fraction=run.sampler.ablated_fraction, **gradients)
    known = fit_record(run, label)
    if refit or known is None or not known.answers(request):
        plan = plan_of(run, method, len(rows), gradients=request.gradients, memory_limit=memory_limit, device=device)
        log.info("%s", plan.words(len(rows), run.n_components, run.n_examples))
        with run.lock():
            if cluster is not None:
                _fit_on_cluster(cluster, run, rows, rounds, label, request, plan, progress=progress)
            else:
                _fit_here(run, rows, rounds, label, request, plan, merge=merge, progress=progress)
    _validate(run, label)
    return Attributions.open(run, label)


def _fit_here(
    run: Run,
    rows: np.ndarray,
    rounds: int,
    label: str,
    request: FitRequest,
    plan: FitPlan,
    *,
    merge: bool,
    progress: bool,
) -> None:
    """Solve in this process, block by block, and write the fit; go on with one that was interrupted."""
    method, step = request.method, chunk_rows(run)
    shares = PartialSums(run, label, rows, step) if merge else None
    if shares is not None:
        _require_sums(plan, run.n_components)
        shares.require()
    fields = METHODS[method]
    begun = BegunFit.of(run, label, fields, request, plan.key)
    todo = begun.missing(plan.blocks(run))
    learned, solutions = _solutions(run, rows, rounds, method, plan, todo, sums=shares or Streamed(run, rows, step))
    first = list(islice(solutions, 1))  # an error is raised here, before the stored fit is replaced
    writer = begun.writer(FitRecord.of(request, learned))
    done = len(plan.blocks(run)) - len(todo)
    with progress_bar(total=done + len(todo), initial=done, desc=f"fit {label}", unit="block", shown=progress) as bar:
        for examples, result in chain(first, solutions):
            writer.write(examples, **{field: getattr(result, field).numpy() for field in fields})
            bar.update()
    writer.finish()
    if shares is not None:
        shares.remove()


def _require_sums(plan: FitPlan, components: int) -> None:
    """Raise `RegressionError` unless the sums over masks, a matrix of components, fit the plan's memory."""
    if plan.way != "decomposed":
        raise RegressionError(
            f"a fit in shares adds up matrices of {components:,} x {components:,} numbers, which do not fit into "
            f"{readable(plan.limit)}; fit in one process, on a Ray cluster, or with a larger memory limit"
        )


def _fit_on_cluster(
    cluster: RayCluster,
    run: Run,
    rows: np.ndarray,
    rounds: int,
    label: str,
    request: FitRequest,
    plan: FitPlan,
    *,
    progress: bool,
) -> None:
    """Solve blocks of examples on the cluster, which writes them; go on with a fit that was interrupted."""
    fields = METHODS[request.method]
    begun = BegunFit.of(run, label, fields, request, plan.key)
    blocks = begun.missing(plan.blocks(run))
    with connected(cluster) as ray:
        work = ClusterFit(ray, cluster, run, rows, rounds, plan, fields=fields, solver_of=solver_of)
        learned = work.prepare()  # an error is raised here, before the stored fit is replaced
        writer = begun.writer(FitRecord.of(request, learned))
        done = run.n_examples - sum(block.stop - block.start for block in blocks)
        with progress_bar(
            total=run.n_examples, initial=done, desc=f"fit {label}", unit="example", shown=progress
        ) as bar:
            for examples in work.solve(label, blocks):
                bar.update(examples.stop - examples.start)
        writer.finish()


def _validate(run: Run, label: str) -> None:
    """Store the fit's mean correlation on all validation masks with the fit, if there are any."""
    fraction = run.sampler.ablated_fraction
    count = run.plan.count("validation", fraction)
    if count >= 2 and finished_fit(run, label).validation_masks != count:
        scores = score(Attributions.open(run, label), run, fraction, split="validation")
        with run.lock():
            add_validation(run, label, float(scores["pearson"].mean()), count)


def _solutions(
    run: Run, rows: np.ndarray, rounds: int, method: str, plan: FitPlan, blocks: list[slice], *, sums: Sums
) -> tuple[FitLearned, Iterator[tuple[slice, Solution]]]:
    """Return what was learned for all examples, and the solved blocks of examples."""
    summed = plan.way == "decomposed" and takes_moments(method, len(rows), run.n_components)
    solver = solver_of(run, rows, rounds, plan=plan, gram=sums.gram() if summed else None)
    return solver.learned(), (
        (examples, solver.solve(FitBlock(run, rows, examples, sums.moments(examples) if summed else None)))
        for examples in blocks
    )


def solver_of(run: Run, rows: np.ndarray, rounds: int, *, plan: FitPlan, gram: Gram | None = None) -> Solver:
    """Prepare what all examples of a fit share.

    Args:
        run: A complete run.
        rows: Row numbers of the training masks to use; may be empty for `informed`.
        rounds: How many rounds of mask gradients to use.
        plan: The method, and how to compute.
        gram: The sums over these masks; by default they are made here if the method uses them.

    Raises:
        RegressionError: When the masks or the mask gradients do not support the fit.
    """
    if plan.method == "informed":
        return Informed.of(run, rows, rounds, plan, gram=gram)
    if plan.way != "decomposed":
        if plan.method == "lasso":
            return IterativeSparse.of(run, rows, plan)
        return Iterative.of(run, rows, plan.method, plan)
    if plan.method == "lasso":
        return Sparse(Design.of(gram or Gram.of(run, rows)))
    if takes_moments(plan.method, len(rows), run.n_components):
        return FromMoments.of(gram or Gram.of(run, rows), plan.method)
    return FromOutputs.of(run, rows, plan.method)


def fit_device(name: str) -> torch.device:
    """Return the device of a fit; `auto` is CUDA where there is one, else the CPU.

    Raises:
        SettingsError: When there is no such device, or it has no float64.
    """
    if name.partition(":")[0] == "mps":
        raise SettingsError(f"device {name!r} has no float64, which fits need; give device='cpu' or device='auto'")
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    return choose_device(name)
