"""A fit on a Ray cluster: sums in shares, added up pair by pair, and blocks of examples solved in parallel."""

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from coar.cluster import TRIES, RayCluster, unwrap
from coar.errors import EngineError
from coar.regression.fit_plan import FitPlan
from coar.regression.sums import FitBlock, Gram, Moments, Solver, dealt_rows, moments_of, panels, takes_moments
from coar.store.fits import write_block
from coar.store.records import FitLearned
from coar.store.run import Run

AHEAD = 2  # blocks of examples in progress per worker, which bounds the number of sums that wait to be solved


class ClusterFit:
    """One fit by the tasks of a cluster, with the same numbers as a fit in one process.

    Ray repeats a task when its process or machine is lost, and recomputes lost results.

    Args:
        ray: The module, connected to the cluster.
        cluster: Its settings.
        run: A complete run, at a path that all machines reach.
        rows: Row numbers of the training masks to use.
        rounds: How many rounds of mask gradients to use.
        plan: The method, and how every worker computes.
        fields: Names of the arrays that the method's solutions have.
        solver_of: Prepares what all examples share, see `coar.regression.fitting.solver_of`.
    """

    def __init__(
        self,
        ray: ModuleType,
        cluster: RayCluster,
        run: Run,
        rows: np.ndarray,
        rounds: int,
        plan: FitPlan,
        *,
        fields: tuple[str, ...],
        solver_of: Callable[..., Solver],
    ) -> None:
        self._ray, self._workers, self._run = ray, cluster.workers, run
        self._summed = plan.way == "decomposed" and takes_moments(plan.method, len(rows), run.n_components)
        self._fit = Fit(
            str(run.path.resolve() if isinstance(run.path, Path) else run.path),
            plan,
            rounds,
            max(1, int(cluster.cpus_per_worker)),
            fields,
            solver_of,
        )
        self._options = {
            "num_cpus": cluster.cpus_per_worker,
            "num_gpus": cluster.gpus_per_worker,
            "max_retries": TRIES,
        }
        self._rows = ray.put(rows)
        self._remote: dict[Any, Any] = {}

    def prepare(self) -> FitLearned:
        """Prepare what all examples share; return what was learned.

        Raises:
            RegressionError: When the masks or the mask gradients cannot support a fit.
        """
        gram = self._gram() if self._summed else None
        learned, self._shared = self._do(_prepare, self._rows, gram, results=2)
        found: FitLearned = self._finish(learned)
        return found

    def solve(self, name: str, blocks: list[slice]) -> Iterator[slice]:
        """Solve every block of examples and write it into the named fit; yield each block when it is written."""
        waiting = deque(blocks)
        doing: dict[Any, slice] = {}
        while waiting or doing:
            while waiting and len(doing) < AHEAD * self._workers:
                block = waiting.popleft()
                doing[self._block(name, block)] = block
            done, _ = self._ray.wait(list(doing), num_returns=1)
            for task in done:
                self._finish(task)
                yield doing.pop(task)

    def _gram(self) -> Any:
        """Add up the workers' sums over masks pair by pair, so that no machine holds many of them at once."""
        parts = [self._do(_gram, self._rows, (at, self._workers)) for at in range(self._workers)]
        while len(parts) > 1:
            pairs = [parts[at : at + 2] for at in range(0, len(parts), 2)]
            parts = [self._do(_add, *pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return parts[0]

    def _block(self, name: str, block: slice) -> Any:
        """Start to solve a block; if that takes moments, its panels are summed in parallel."""
        each = panels(block, block.stop - block.start) if self._summed else []
        parts = [self._do(_moments, self._rows, panel) for panel in each]
        return self._do(_solve, self._rows, self._shared, name, block, *parts)

    def _do(self, function: Any, *arguments: Any, results: int = 1) -> Any:
        if function not in self._remote:  # sent to the cluster once
            self._remote[function] = self._ray.remote(function).options(**self._options, num_returns=results)
        return self._remote[function].remote(self._fit, *arguments)

    def _finish(self, task: Any) -> Any:
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            raise unwrap(error, None) from None
        except self._ray.exceptions.RayError as error:
            raise EngineError(
                f"a task of the fit was lost {TRIES} times ({type(error).__name__}); check the memory of the cluster's "
                f"machines, then run the same command again"
            ) from error


class Fit(NamedTuple):
    """The settings of every task of a fit.

    Attributes:
        place: The run.
        plan: The method, and how to compute.
        rounds: How many rounds of mask gradients to use.
        threads: How many threads a task has.
        fields: Names of the arrays that solutions have.
        solver_of: Prepares what all examples share.
    """

    place: str
    plan: FitPlan
    rounds: int
    threads: int
    fields: tuple[str, ...]
    solver_of: Callable[..., Solver]

    def open(self) -> Run:
        """Open the run, on as many threads as the task has."""
        torch.set_num_threads(self.threads)
        return Run.open(self.place)


def _gram(fit: Fit, rows: np.ndarray, share: tuple[int, int]) -> Gram:
    run = fit.open()
    return Gram.of(run, dealt_rows(run, rows, share))


def _add(_fit: Fit, one: Gram, other: Gram) -> Gram:
    return one + other


def _moments(fit: Fit, rows: np.ndarray, panel: slice) -> Moments:
    return moments_of(fit.open(), rows, panel)


def _prepare(fit: Fit, rows: np.ndarray, gram: Gram | None) -> tuple[FitLearned, Solver]:
    """Return what was learned, and the solver of blocks."""
    run = fit.open()
    solver = fit.solver_of(run, rows, fit.rounds, plan=fit.plan, gram=gram)
    return solver.learned(), solver


def _solve(fit: Fit, rows: np.ndarray, solver: Solver, name: str, block: slice, *parts: Moments) -> None:
    run = fit.open()
    result = solver.solve(FitBlock(run, rows, block, Moments.joined(parts) if parts else None))
    write_block(run, name, block, **{field: getattr(result, field).numpy() for field in fit.fields})
