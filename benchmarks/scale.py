"""Scaling of collection to many workers, masks and examples: throughput, overheads, driver, listing, a soak test.

Run it on a machine that does nothing else, from the root of a clone:

    OMP_NUM_THREADS=1 python benchmarks/scale.py                # throughput, storing, driver and listing
    OMP_NUM_THREADS=1 python benchmarks/scale.py --quick        # the same with small sizes, as a quick test
    OMP_NUM_THREADS=1 python benchmarks/scale.py --soak 60      # collect for an hour while workers are killed

**Throughput** compares two Ray workers with one, of one thread each, from the first stored unit to the last, on the
pipeline's study; and one Ray worker with this process. Rounds alternate, and medians are printed. **Waiting** is the
share of the workers' time since they were ready that they spent without a unit, as they report it; it is the cost of
distributing units, independent of the machine's speed. **Storing** is the share of `write_unit` in the time of a unit,
with files synced to the disk. **The driver** is the driver's own work per unit when 1 to 1,000 workers take units at
once, with a Ray that does nothing. **Listing** is the time to find the missing units of a run of 100,000 chunks. **The
soak** collects one run while workers are killed at random moments, samples the memory of driver and workers, and
verifies the run.
"""

import argparse
import logging
import os
import random
import shutil
import signal
import statistics
import tempfile
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import coar
from coar.cluster import RayCluster
from coar.collection.collect import blocks_of
from coar.collection.preparation import BatchSettings, unit_runner
from coar.collection.ray_engine import ActorPool
from coar.collection.units import Stage
from coar.forward.copies import device_copy
from coar.forward.devices import choose_device
from coar.store.integrity import verify
from coar.store.plan import Plan, Unit
from coar.store.run import Run
from pipelines import digits

BATCH = 512
SETTINGS: dict[str, Any] = {"device": "cpu", "progress": False}
EXECUTION = coar.Execution(batch_size=BATCH)
PAUSE = 5.0  # seconds between samples of memory
CHUNKS = 1563, 64  # of mask blocks and example blocks: 100,032 in all


def study() -> coar.Study:
    """The digits under zero ablation; each worker builds it."""
    return digits.study(ablation="zero")


def study_of_few() -> coar.Study:
    """A few of the digits, so that units are short and kills frequent."""
    whole = study()
    return replace(whole, examples=whole.examples.subset(range(64)))


def seconds_per_unit(path: Path) -> float:
    """Return the time between units of a finished run, from the times of their files."""
    stamps = sorted(file.stat().st_mtime for file in path.glob("outputs/c/*/*"))
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1)


class Waits(logging.Handler):
    """Adds up the times that Ray workers report."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.busy = self.idle = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Add the times in a record of a unit."""
        self.busy += getattr(record, "seconds", 0.0)
        self.idle += getattr(record, "idle", 0.0)


def throughput(folder: Path, units: int, rounds: int) -> None:
    """Compare two workers with one, and one with this process."""
    ways: dict[str, RayCluster | None] = {"this process": None}
    ways |= {f"{workers} on Ray": RayCluster(study=study, workers=workers) for workers in (1, 2)}
    found: dict[str, list[float]] = {way: [] for way in ways}
    made, path, waits = study(), folder / "r.zarr", Waits()
    logger = logging.getLogger("coar.collection.ray_engine")
    logger.addHandler(waits)
    logger.setLevel(logging.DEBUG)
    for _ in range(rounds):
        for way, cluster in ways.items():
            coar.collect(made, path, masks=64 * units, cluster=cluster, execution=EXECUTION, **SETTINGS)
            found[way].append(seconds_per_unit(path))
            shutil.rmtree(path)
    here, one, two = (statistics.median(found[way]) for way in ways)
    print(f"throughput, {units} units of 64 masks x {len(made.examples)} examples, medians of {rounds} rounds")
    for way, seconds in zip(ways, (here, one, two), strict=True):
        print(f"  {way:13} {1000 * seconds:8.1f} ms a unit  all: {[round(1000 * s, 1) for s in found[way]]}")
    print(f"  two workers do {one / two:.2f} times the work of one (bar: 1.8)")
    print(f"  one worker takes {one / here:.2f} times what this process takes")
    print(f"  waiting: {100 * waits.idle / (waits.busy + waits.idle):.2f} % of the workers' time (bar: 3 %)")


def storing(folder: Path, units: int) -> None:
    """Measure the time of storing a unit and its share of the unit's time."""
    made, model = study(), device_copy(study().model, choose_device("cpu"), study().examples)
    run = coar.collect(
        made, folder / "r.zarr", masks=2, execution=coar.Execution(batch_size=BATCH, mask_block=64), **SETTINGS
    )
    run.extend(run.plan.extended({("train", made.sampler.ablated_fraction): 64 * units}))
    runner = unit_runner(made, run, model, BatchSettings(BATCH, BATCH, tune=False, compiled=False))
    stored: list[float] = []
    write = run.write_unit

    def timed(*parts: Any) -> None:
        began = time.perf_counter()
        write(*parts)
        stored.append(time.perf_counter() - began)

    run.write_unit = timed  # type: ignore[method-assign]
    began = time.perf_counter()
    for unit in run.missing_units():
        runner.do(unit)
    whole = time.perf_counter() - began
    share, each = 100 * sum(stored) / whole, 1000 * whole / len(stored)
    print(f"storing: {1000 * statistics.median(stored):.1f} ms a unit, {share:.2f} % of {each:.0f} ms (bar: 3 %)")
    shutil.rmtree(folder / "r.zarr")


@dataclass(frozen=True)
class Call:
    """An actor's method, as the driver sees it."""

    ray: "Idle"

    def remote(self, *_: Any) -> object:
        """Start a task that ends at once."""
        return self.ray.start()


class Idle:
    """A Ray whose tasks end just after they are submitted, so that only the driver's own work remains."""

    def __init__(self) -> None:
        self._tasks = 0
        self.exceptions = SimpleNamespace(RayTaskError=RuntimeError, RayError=RuntimeError)

    def start(self) -> int:
        """Return the number of a new task."""
        self._tasks += 1
        return self._tasks

    def remote(self, _: type) -> "Idle":
        """Return this object as a class of actors."""
        return self

    def options(self, **_: Any) -> SimpleNamespace:
        """Return the factory of actors."""
        return SimpleNamespace(remote=lambda _: Actor(self))

    def wait(self, tasks: list[int], *, num_returns: int, timeout: float) -> tuple[list[int], list[int]]:  # noqa: ARG002
        """Return a tenth of the tasks as done."""
        done = tasks[: max(1, min(num_returns, len(tasks) // 10))]
        return done, tasks[len(done) :]

    def get(self, _: int) -> tuple[float, float]:
        """Return the result of a task, its times."""
        return 0.0, 0.0

    def kill(self, _: Any) -> None:
        """End nothing."""


class Actor:
    """An actor that does nothing."""

    def __init__(self, ray: Idle) -> None:
        self.build = self.do = Call(ray)


def driver(units: int) -> None:
    """Time the driver's own work per unit for growing numbers of workers."""
    print(f"driver, its own work per unit of {units}, with a Ray that does nothing")
    for workers in (1, 10, 100, 1000):
        crew = ActorPool(Idle(), RayCluster(workers=workers), {})  # type: ignore[arg-type]
        names = [Unit(i, 0) for i in range(units)]
        stage = Stage("mask", dict.fromkeys(names, 1.0), list(names))
        began = time.perf_counter()
        count = sum(1 for _ in crew.work_off(stage, lambda: False))
        print(f"  {workers:5} workers {1e6 * (time.perf_counter() - began) / count:8.1f} us a unit")


def listing(folder: Path) -> None:
    """Time the search for missing units among 100,000 chunks."""
    made = study_of_few()
    blocks, path = (2, 1), folder / "r.zarr"
    small = coar.collect(made, folder / "small.zarr", masks=2, execution=EXECUTION, **SETTINGS)
    rows = Plan().extended({("train", made.sampler.ablated_fraction): 2 * CHUNKS[0]})
    Run.create(
        path,
        components=small.components,
        metadata=small.metadata,
        replacements=small.replacements,
        fingerprint=small.fingerprint,
        facts=small.facts,
        blocks=blocks,
        plan=rows,
    )
    for name, shape in {"outputs": CHUNKS, "masks": (CHUNKS[0], 1), "base_output": (CHUNKS[1],)}.items():
        for key in np.ndindex(*shape):
            file = path / "/".join([name, "c", *map(str, key)])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x" * 64)
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        missing = len(Run.open(path).missing_units())
        taken.append(time.perf_counter() - began)
    print(f"listing {CHUNKS[0] * CHUNKS[1]:,} chunks: {statistics.median(taken):.2f} s, {missing} missing (bar: 2 s)")
    shutil.rmtree(path)


def growth() -> None:
    """Print how a run's objects and the driver's lists grow, by the sizes that `collect` chooses."""
    tracemalloc.start()
    names = [Unit(i, 0) for i in range(10_000)]
    lists = list(names), deque(names), dict.fromkeys(names, 1.0)  # the lists that a driver keeps
    each = tracemalloc.get_traced_memory()[0] / len(lists[0])
    tracemalloc.stop()
    print(f"growth, by the chosen sizes of units, and {each:.0f} bytes a unit measured in the driver")
    print("      masks   examples  masks/unit  examples/unit      units  MB/unit  driver MB")
    for masks, examples in ((5_000, 1_000), (10**5, 10**4), (10**5, 10**5), (10**6, 10**5), (10**6, 10**6)):
        height, width = blocks_of(masks, examples, None, None)
        units = -(-masks // height) * -(-examples // width)
        held = units * each / 1e6
        print(f"  {masks:9,} {examples:10,} {height:11} {width:14} {units:10,}", end="")
        print(f" {4 * height * width / 1e6:8.2f} {held:10.1f}")


def resident(pid: int) -> float:
    """Return a process' resident memory in MiB; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError):
        return 0.0


def own_workers() -> list[int]:
    """Return the processes of actors that this process's Ray has started, by their titles and ancestors."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if file.read_bytes().startswith(b"ray::RayWorker") and descends(int(file.parent.name), os.getpid()):
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


def descends(pid: int, from_: int) -> bool:
    """Return whether a process is a descendant of another."""
    while pid > 1 and pid != from_:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid == from_


def soak(folder: Path, minutes: float, every: float, build: Callable[[], coar.Study] = study_of_few) -> bool:
    """Collect for some minutes while workers are killed; return whether the run is whole and memory steady."""
    path, made, over = folder / "r.zarr", build(), threading.Event()
    samples: list[tuple[float, float, float]] = []
    killed: list[int] = []
    rng, began = random.Random(0), time.monotonic()

    def watch() -> None:
        due = time.monotonic() + every
        while not over.wait(PAUSE):
            alive = own_workers()
            workers = max((resident(pid) for pid in alive), default=0.0)
            samples.append((time.monotonic() - began, resident(os.getpid()), workers))
            if time.monotonic() > due and alive:
                due = time.monotonic() + rng.expovariate(1 / every)
                victim = rng.choice(alive)
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

    watcher = threading.Thread(target=watch)
    watcher.start()
    masks = 0
    try:
        while time.monotonic() - began < 60 * minutes:
            masks += 64 * 200
            cluster = RayCluster(study=build, workers=2)
            run = coar.collect(made, path, masks=masks, cluster=cluster, execution=EXECUTION, **SETTINGS)
    finally:
        over.set()
        watcher.join()
    problems = verify(run)
    left = len(run.missing_units())
    print(f"soak of {(time.monotonic() - began) / 60:.1f} minutes: {len(run.units())} units, ", end="")
    print(f"{len(killed)} workers killed, {left} units missing, {len(problems)} problems")
    steady = print_memory(samples)
    return not problems and not left and steady


def print_memory(samples: list[tuple[float, float, float]]) -> bool:
    """Print memory over time; return whether it is steady: in the last third at most 10 % above the middle third."""
    thirds = [samples[len(samples) // 3 : 2 * len(samples) // 3], samples[2 * len(samples) // 3 :]]
    if not all(thirds):
        print("  too short to judge memory")
        return True
    steady = True
    for at, name in ((1, "driver"), (2, "largest worker")):
        middle, last = (statistics.median(sample[at] for sample in third if sample[at]) for third in thirds)
        steady &= last <= 1.1 * middle
        print(f"  {name:14} {middle:7.0f} MiB in the middle third, {last:7.0f} MiB in the last", end="")
        print(f", most {max(sample[at] for sample in samples):7.0f} MiB")
    return steady


def main() -> None:
    """Run the chosen parts and print their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few units and one round")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="only a soak of so many minutes")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between kills in a soak, on average")
    parser.add_argument("--only", choices=["throughput", "storing", "driver", "listing", "growth"], help="one part")
    parser.add_argument("--folder", type=Path, default=None, help="folder for runs; a temporary one by default")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="coar-scale-"))
    units, rounds = (6, 1) if arguments.quick else (60, 3)
    parts: dict[str, Callable[[], None]] = {
        "storing": lambda: storing(folder, units),
        "driver": lambda: driver(2_000 if arguments.quick else 20_000),
        "growth": growth,
        "listing": lambda: listing(folder),
        "throughput": lambda: throughput(folder, units, rounds),
    }
    try:
        if arguments.soak is not None:
            raise SystemExit(0 if soak(folder, arguments.soak, arguments.every) else 1)
        for name, part in parts.items():
            if arguments.only in (None, name):
                part()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
