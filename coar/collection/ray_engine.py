"""Distribution of units to the actors of a Ray cluster, with replacement of lost actors."""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from coar.cluster import TRIES, RayCluster, _first, connected, unwrap
from coar.collection.execution import Execution
from coar.collection.preparation import BatchSettings, check_same, tuned, unit_runner
from coar.collection.units import Stage, UnitProgress, gradient_stage, interrupts, mask_stage
from coar.errors import EngineError
from coar.forward.copies import device_copy
from coar.forward.malloc import memory_kept
from coar.progress import WORKER_LOST
from coar.store.gradients import AnyUnit
from coar.store.plan import Unit
from coar.store.run import Run
from coar.study import Study

log = logging.getLogger(__name__)
STARTING = 300.0  # seconds for the first worker to be placed, and to build its study
AHEAD = 2  # units assigned to a worker: the current one and the next one


@dataclass(frozen=True)
class Job:
    """Settings of a worker.

    Attributes:
        study: Builds the study.
        folder: The working directory of the driver, since pipelines may contain relative paths.
        threads: Threads of a worker.
        run: Path or address of the run.
        device: Where to compute.
        gradients: Whether mask gradients are collected.
        execution: Batches, memory and units of work.
    """

    study: Callable[[], Study]
    folder: str
    threads: int
    run: str
    device: str
    gradients: bool
    execution: Execution


class RayWorker:
    """The class of the actors; an actor keeps the model between units."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tuned = False

    def build(self) -> None:
        """Build the study, and check that the run was made for it."""
        job = self._job
        if Path(job.folder).is_dir():
            os.chdir(job.folder)
        torch.set_num_threads(job.threads)
        study = job.study()
        run = Run.open(job.run)
        check_same(run, study.fingerprint(), "auto")
        model = device_copy(study.model, job.device, study.examples)
        batches = BatchSettings.choose(study, model, job.execution, gradients=job.gradients)
        self._study, self._run, self._batches = study, run, batches
        self._runner = unit_runner(study, run, model, batches)
        self._free_since = time.monotonic()

    @memory_kept()
    def do(self, unit: AnyUnit, missing: int) -> tuple[float, float]:
        """Do one unit; before its first unit of masks, tune the execution plan for `missing` units.

        Return the seconds that it took, and the idle seconds of the worker before it.
        """
        began = time.monotonic()
        idle = began - self._free_since
        if isinstance(unit, Unit) and not self._tuned:
            self._runner.masks = tuned(self._study, self._run, self._runner.masks, [unit] * missing, self._batches)
            self._tuned = True
        self._runner.do(unit)
        self._free_since = time.monotonic()
        return self._free_since - began, idle


def collect_on_cluster(cluster: RayCluster, run: Run, *, device: str, execution: Execution, progress: bool) -> None:
    """Do a prepared run's missing units on the workers of a cluster.

    Raises:
        EngineError: When Ray is not installed, the cluster cannot be reached, no worker can be placed, or `TRIES`
            workers are lost on a unit.
        CoarError: An error of this package in a worker.
        KeyboardInterrupt: After Ctrl-C, once the assigned units are stored.
    """
    stages = gradient_stage(run, (1, 1)), mask_stage(run, (1, 1))
    if not any(stage.missing for stage in stages):
        return
    job = Job(
        study=cluster.builder(),
        folder=os.getcwd(),
        threads=max(1, int(cluster.cpus_per_worker)),
        run=str(run.path.resolve() if isinstance(run.path, Path) else run.path),
        device=device,
        gradients=bool(stages[0].share),
        execution=execution,
    )
    with connected(cluster) as ray:
        crew = ActorPool(ray, cluster, job)
        for stage in stages:
            with interrupts() as stopped, UnitProgress(stage, shown=progress) as tally:
                for unit in crew.work_off(stage, stopped.is_set):
                    tally.add(unit)
                if tally.left or (stopped.is_set() and stage is stages[0] and stages[1].missing):
                    raise tally.interrupted(run)
        crew.dismiss()


class ActorPool:
    """The driver's side of the workers.

    An actor builds its study first, then gets units. The units of a lost actor are assigned again, and a new actor
    replaces it where the cluster has room, now or once a machine joins.
    """

    def __init__(self, ray: ModuleType, cluster: RayCluster, job: Job) -> None:
        self._ray = ray
        self._cluster = cluster
        self._job = job
        self._kind = ray.remote(RayWorker).options(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)
        self._actors: set[Any] = set()
        self._load: dict[Any, int] = {}  # assigned units, by ready worker
        self._by_load: list[dict[Any, None]] = [{} for _ in range(AHEAD + 1)]  # workers by load, in order of arrival
        self._doing: dict[Any, tuple[Any, AnyUnit | None]] = {}  # by task: actor and unit, None while building
        self._lost: Counter[AnyUnit | None] = Counter()  # numbers of lost workers, by unit
        self._began = time.monotonic()
        for _ in range(cluster.workers):
            self._engage()

    def work_off(self, stage: Stage, stopped: Callable[[], bool]) -> Iterator[AnyUnit]:
        """Yield each missing unit once it is stored; after a stop, the assigned ones."""
        queue = deque(stage.missing)
        in_hand = 0
        while (queue and not stopped()) or in_hand:
            while queue and not stopped() and (free := self._freest()) is not None:
                unit = queue.popleft()
                self._doing[free.do.remote(unit, len(queue) + 1)] = (free, unit)
                self._has(free, self._load[free] + 1)
                in_hand += 1
            for task in self._finished():
                actor, finished = self._doing.pop(task)
                in_hand -= finished is not None
                if self._succeeded(task, actor, finished):
                    if finished is None:
                        self._has(actor, 0)
                    else:
                        if actor in self._load:  # the actor has not been lost
                            self._has(actor, self._load[actor] - 1)
                        yield finished
                elif finished is not None:
                    queue.appendleft(finished)
            if not self._load and time.monotonic() - self._began > STARTING:
                raise self._nobody()

    def dismiss(self) -> None:
        """End the actors."""
        for actor in self._actors:
            self._ray.kill(actor)

    def _engage(self) -> None:
        actor = self._kind.remote(self._job)
        self._actors.add(actor)
        self._doing[actor.build.remote()] = (actor, None)

    def _freest(self) -> Any:
        """Return a worker with the fewest assigned units; None when all have `AHEAD`."""
        return next((next(iter(workers)) for workers in self._by_load[:AHEAD] if workers), None)

    def _has(self, actor: Any, units: int | None) -> None:
        """Set the number of units assigned to a worker; None when it is lost."""
        before = self._load.pop(actor, None)
        if before is not None:
            del self._by_load[before][actor]
        if units is not None:
            self._load[actor] = units
            self._by_load[units][actor] = None

    def _finished(self) -> list[Any]:
        """Wait for a task, and return all finished ones: a query of many costs little more than a query of one."""
        tasks = list(self._doing)
        self._ray.wait(tasks, num_returns=1, timeout=1.0)
        done: list[Any] = self._ray.wait(tasks, num_returns=len(tasks), timeout=0)[0]
        return done

    def _succeeded(self, task: Any, actor: Any, unit: AnyUnit | None) -> bool:
        """Return whether a task succeeded; raise the worker's error, or replace a lost worker."""
        exceptions = self._ray.exceptions
        try:
            spent = self._ray.get(task)
        except exceptions.RayTaskError as error:
            raise unwrap(error, unit) from None
        except exceptions.RayError as error:
            about = {"event": WORKER_LOST, "unit": list(unit) if unit else None}
            log.warning("a worker was lost (%s); its work is assigned again", type(error).__name__, extra=about)
            self._lost[unit] += 1
            if self._lost[unit] >= TRIES:
                raise EngineError(
                    f"{TRIES} workers were lost {f'on {unit}' if unit else 'before they were ready'}: {_first(error)}; "
                    f"check the memory of their machines, and that coar is installed there, then run the same "
                    f"command again to continue"
                ) from error
            if actor in self._actors:  # it may be lost with several units, and is replaced once
                self._actors.discard(actor)
                self._has(actor, None)
                self._engage()
            return False
        self._lost[unit] = 0
        if unit is not None:
            seconds, idle = spent
            log.debug("a worker did a unit", extra={"unit": list(unit), "seconds": seconds, "idle": idle})
        return True

    def _nobody(self) -> EngineError:
        return EngineError(
            f"no worker was ready after {STARTING:.0f} s: each requests {self._cluster.cpus_per_worker:g} processors "
            f"and {self._cluster.gpus_per_worker:g} GPUs, and the cluster has {self._ray.cluster_resources()}; request "
            f"less, or add machines"
        )
