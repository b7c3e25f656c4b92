"""A fit on a Ray cluster: sums in shares, added up pair by pair, and blocks of examples solved beside each other."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coar.engines.ray import TRIES, RayCluster, told
from coar.errors import EngineError
from coar.regression.ridge import LinearFit, Spectrum, check_solvable, solve_from_moments, solve_from_outputs
from coar.regression.sums import Gram, Moments, dealt_rows, moments_of, panels
from coar.store import Run
from coar.store.fits import FIELDS, write_block

AHEAD = 2  # blocks of examples in hand per worker, so that sums do not pile up before they are solved


class ClusterFit:
    """One fit of ridge or least squares by the tasks of a cluster; each number is the one that one process gets.

    Ray does a task again when the process or the machine that did it is lost, and makes lost results anew.

    Args:
        ray: The module, connected to the cluster.
        cluster: Its settings.
        run: A complete run, at a path that all machines reach.
        rows: Row numbers of the training masks to use.
        method: `ridge` or `ols`.
    """

    def __init__(self, ray: ModuleType, cluster: RayCluster, run: Run, rows: np.ndarray, method: str) -> None:
        self._ray, self._workers, self._run = ray, cluster.workers, run
        self._many = len(rows) > run.n_components
        self._fit = Fit(
            str(run.path.resolve() if isinstance(run.path, Path) else run.path),
            method,
            max(1, int(cluster.cpus_per_worker)),
        )
        self._options = {
            "num_cpus": cluster.cpus_per_worker,
            "num_gpus": cluster.gpus_per_worker,
            "max_retries": TRIES,
        }
        self._rows = ray.put(rows)
        self._remote: dict[Any, Any] = {}

    def decompose(self) -> None:
        """Make what all examples share; raise `RegressionError` when the masks cannot support a fit."""
        if self._many:
            parts = [self._do(_gram, self._rows, (at, self._workers)) for at in range(self._workers)]
            while len(parts) > 1:  # pair by pair, so that no machine holds more than a few
                pairs = [parts[at : at + 2] for at in range(0, len(parts), 2)]
                parts = [self._do(_add, *pair) if len(pair) == 2 else pair[0] for pair in pairs]
            done, self._shared = self._do(_primal, parts[0], results=2)
        else:
            done, self._shared = self._do(_dual, self._rows, results=2)
        self._finish(done)

    def solve(self, name: str, step: int) -> Iterator[slice]:
        """Have every block of `step` examples solved and written into the fit of a name; yield each once it is."""
        n = self._run.n_examples
        waiting = deque(slice(at, min(at + step, n)) for at in range(0, n, step))
        doing: dict[Any, slice] = {}
        while waiting or doing:
            while waiting and len(doing) < AHEAD * self._workers:
                block = waiting.popleft()
                doing[self._block(name, block, step)] = block
            done, _ = self._ray.wait(list(doing), num_returns=1)
            for task in done:
                self._finish(task)
                yield doing.pop(task)

    def _block(self, name: str, block: slice, step: int) -> Any:
        if not self._many:
            return self._do(_solve_dual, self._rows, self._shared, name, block)
        parts = [self._do(_moments, self._rows, panel) for panel in panels(block, step)]
        return self._do(_solve_primal, self._shared, name, block, *parts)

    def _do(self, function: Any, *arguments: Any, results: int = 1) -> Any:
        if function not in self._remote:  # each is sent to the cluster once
            self._remote[function] = self._ray.remote(function).options(**self._options, num_returns=results)
        return self._remote[function].remote(self._fit, *arguments)

    def _finish(self, task: Any) -> None:
        try:
            self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            raise told(error, None) from None
        except self._ray.exceptions.RayError as error:
            raise EngineError(
                f"a task of the fit was lost {TRIES} times ({type(error).__name__}); look at the memory of the "
                f"cluster's machines, then run the same command again"
            ) from error


class Fit(NamedTuple):
    """What every task is told.

    Attributes:
        place: The run.
        method: `ridge` or `ols`.
        threads: How many threads a task has.
    """

    place: str
    method: str
    threads: int

    def open(self) -> Run:
        """Open the run, on as many threads as the task has."""
        torch.set_num_threads(self.threads)
        return Run.open(self.place)


def _gram(fit: Fit, rows: np.ndarray, share: tuple[int, int]) -> Gram:
    run = fit.open()
    return Gram.of(run, dealt_rows(run, rows, share))


def _add(_fit: Fit, one: Gram, other: Gram) -> Gram:
    return one + other


def _primal(fit: Fit, gram: Gram) -> tuple[None, tuple[Spectrum, Gram]]:
    torch.set_num_threads(fit.threads)
    spectrum = Spectrum.primal(gram)
    check_solvable(spectrum, fit.method)
    return None, (spectrum, Gram(torch.empty(0), gram.total, gram.count))


def _dual(fit: Fit, rows: np.ndarray) -> tuple[None, tuple[Spectrum, Tensor]]:
    run = fit.open()
    shared = Spectrum.dual(torch.from_numpy(run.masks_at(rows)).float())
    check_solvable(shared[0], fit.method)
    return None, shared


def _moments(fit: Fit, rows: np.ndarray, panel: slice) -> Moments:
    return moments_of(fit.open(), rows, panel)


def _solve_primal(fit: Fit, shared: tuple[Spectrum, Gram], name: str, block: slice, *parts: Moments) -> None:
    run = fit.open()
    _write(run, name, block, solve_from_moments(*shared, Moments.joined(parts), method=fit.method))


def _solve_dual(fit: Fit, rows: np.ndarray, shared: tuple[Spectrum, Tensor], name: str, block: slice) -> None:
    run = fit.open()
    outputs = torch.from_numpy(run.outputs_at(rows, block))
    _write(run, name, block, solve_from_outputs(*shared, outputs, method=fit.method))


def _write(run: Run, name: str, block: slice, result: LinearFit) -> None:
    write_block(run, name, block, **{field: getattr(result, field).numpy() for field in FIELDS})
