"""Masks x images per second, compared with three other ways of running ablated models, on five models.

    COAR_DATA=/path/to/folder python benchmarks/collect.py    # everything; most of the time for the large models
    python benchmarks/collect.py --models vit-b-16 gpt2 --examples 4 64 --rounds 5

The other ways, all in float32, are:

- the published loop copies the model for every mask, zeroes the ablated rows and reads the examples again through a
  data loader: here the cheapest possible loader, without decoding or transforms, so ratios to it are lower bounds;
- captum's LayerFeatureAblation makes one perturbation of one module per forward pass; all its passes count, including
  the two that it makes before the first perturbation of a module;
- the hook loop multiplies activations by the mask in forward hooks, on one copy of the model, the examples in memory.

Ours is the computation of `coar.collect`, units of 64 masks by `FastRunner.outputs`, in float32 and in bfloat16,
without storing, with the plan that collecting measures: examples and masks per forward pass. Freed memory is kept, as
in collecting; the others use malloc's defaults. If a unit would take too long, its time is that of its first mask,
including entering and leaving the gates, plus 63 times the time of a further mask in a longer call. The time of each
way includes drawing its masks.

The ways take turns, in rounds. The others run in a process of their own, because they would otherwise reuse memory that
ours obtained from the system, instead of requesting it as they do alone. The tables show the median of each rate over
rounds, and for each ratio, taken within a round, the median and the range. The peak is the best of all matrix products
of the same type measured during the run; the share of it is our rate times the arithmetic of the plain forward pass.
"""

import argparse
import copy
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import coar
from benchmarks.models import SUBJECTS
from benchmarks.peers import layer_feature_ablation
from coar.collection.collect import MASK_BLOCK
from coar.components.table import Components
from coar.forward.autotune import fastest_runner
from coar.forward.batches import ExampleBlock
from coar.forward.copies import device_copy
from coar.forward.devices import BATCH_SIZE
from coar.forward.execution_plan import ExecutionPlan
from coar.forward.malloc import memory_kept
from coar.forward.model_runner import ModelRunner
from coar.forward.runner import FastRunner
from coar.gates.batch_norms import following_batch_norms

CPU = torch.device("cpu")
BATCH = BATCH_SIZE["cpu"]  # examples per forward pass; ours starts from it and measures, as a run does
LONG = 2_000  # assumed length of the run in masks, a small share of which may be spent on choosing the plan
MOST = 512  # masks per round
FEW = 4  # examples on which following batch norms are found
OURS = {"float32": torch.float32, "bf16": torch.bfloat16}
PEERS = ("published loop", "captum", "hook loop")

Run = Callable[[np.ndarray], object]  # takes (masks, components) masks
Way = Callable[[int], float]  # takes a number of masks, returns forward passes over all examples per second


@dataclass(frozen=True)
class Timing:
    """Measurements on one model and one number of examples.

    Attributes:
        model: Name of the model.
        components: Number of components.
        examples: Number of examples.
        rates: Masks x images per second in each round, by the way's name.
        flops: Floating-point operations of a plain forward pass of one example.
        difference: Largest difference of our float32 outputs from the published loop's, relative to the largest output.
    """

    model: str
    components: int
    examples: int
    rates: dict[str, list[float]]
    flops: float
    difference: float


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the (examples,) margins of the target classes against the log-sum-exp of the other logits."""
    correct = logits.gather(1, targets[:, None])[:, 0]
    return correct - logits.scatter(1, targets[:, None], -torch.inf).logsumexp(1)


def published_loop(study: coar.Study) -> Callable[[np.ndarray], Tensor]:
    """Return a function that copies, zeroes, reads and runs for every mask, and returns (masks, examples) margins."""
    data = TensorDataset(study.examples.inputs, study.examples.targets)
    sites = {site: np.array(indices) for (site, _, _), indices in study.components.sites().items()}

    def run(masks: np.ndarray) -> Tensor:
        rows = []
        for mask in masks:
            model = copy.deepcopy(study.model)
            for site, indices in sites.items():  # a site's components are all its rows, in order
                model.get_submodule(site).weight.data[torch.from_numpy(~mask[indices])] = 0
            with torch.no_grad():
                batches = DataLoader(data, batch_size=BATCH)
                rows.append(torch.cat([margins(model(inputs), targets) for inputs, targets in batches]))
        return torch.stack(rows)

    return run


def hook_loop(study: coar.Study) -> Callable[[np.ndarray], Tensor]:
    """Return a function that runs one model with hooks for every mask, and returns (masks, examples) margins."""
    model = copy.deepcopy(study.model)
    keeps: dict[str, Tensor] = {}
    sites = {site: (axis, indices) for (site, _, axis), indices in study.components.sites().items()}
    for site in sites:
        model.get_submodule(site).register_forward_hook(lambda _module, _args, y, site=site: y * keeps[site])
    inputs, targets = (part.split(BATCH) for part in study.examples.block(0, len(study.examples)))
    batches = list(zip(inputs, targets, strict=True))

    def run(masks: np.ndarray) -> Tensor:
        rows = []
        for mask in torch.from_numpy(masks).float():
            for site, (axis, indices) in sites.items():
                keeps[site] = mask[indices] if axis == -1 else mask[indices][:, None, None]
            with torch.inference_mode():
                rows.append(torch.cat([margins(model(x), y) for x, y in batches]))
        return torch.stack(rows)

    return run


@memory_kept()
def workers(study: coar.Study) -> dict[str, tuple[FastRunner, ExampleBlock]]:
    """Return, by precision, the runner of a long run, with its measured plan, and the examples."""
    model = device_copy(study.model, CPU, study.examples)
    constants = study.ablation.replacements(model, study.components, batch_size=BATCH)
    few = ModelRunner(model, study.output).load(study.examples, 0, FEW)

    def outputs(variant: nn.Module) -> Tensor:
        return torch.from_numpy(ModelRunner(variant, study.output).base_output(few))

    norms = following_batch_norms(model, study.components, run=outputs)
    made = {}
    for precision in OURS:
        plan = ExecutionPlan(precision=precision)
        runner = FastRunner(model, study.components, constants, study.output, plan, batch_norms=norms)
        masks = study.sampler.masks("train", range(MASK_BLOCK), len(study.components))
        runner = fastest_runner(runner, study.examples, masks, work=LONG)
        made[precision] = runner, runner.load(study.examples, 0, len(study.examples))
    return made


def seconds_of(study: coar.Study, run: Run, masks: range) -> float:
    """Return the seconds to draw some masks and run them."""
    start = time.perf_counter()
    run(study.sampler.masks("train", masks, len(study.components)))
    return time.perf_counter() - start


def plain_way(study: coar.Study, run: Run) -> Way:
    """Return a way that runs one mask after another."""
    return lambda count: count / seconds_of(study, run, range(count))


def unit_way(study: coar.Study, run: Run) -> Way:
    """Return a way that runs whole units of masks, or extrapolates the time of one from fewer masks."""

    @memory_kept()
    def way(count: int) -> float:
        units = count // MASK_BLOCK
        if units:
            took = [seconds_of(study, run, range(at * MASK_BLOCK, (at + 1) * MASK_BLOCK)) for at in range(units)]
            return units * MASK_BLOCK / sum(took)
        first = seconds_of(study, run, range(1))
        further = (seconds_of(study, run, range(1 + count)) - first) / count
        return MASK_BLOCK / (first + (MASK_BLOCK - 1) * further)

    return way


def captum_way(study: coar.Study) -> Way:
    """Return a way that ablates as many components as there are masks, one at a time, spread over the table."""

    def way(count: int) -> float:
        chosen = np.unique(np.linspace(0, len(study.components) - 1, count).astype(int))
        few = replace(study, components=Components(study.components[int(i)] for i in chosen))
        found = layer_feature_ablation(few, device="cpu", batch_size=BATCH)
        return found.forwards / found.seconds

    return way


def masks_for(way: Way, seconds: float) -> int:
    """Return the number of masks that a way runs in some seconds, at least 1; this also warms it up."""
    count = 1
    while True:
        start = time.perf_counter()
        way(count)
        took = time.perf_counter() - start
        if took > seconds / 3 or count == MOST:
            return max(1, min(MOST, int(count * seconds / took)))
        count = min(2 * count, MOST)


def subject(name: str, examples: int) -> coar.Study:
    """Return a model's study of a number of examples, or of all that it has."""
    study = SUBJECTS[name].study(max((*SUBJECTS[name].examples, examples)))
    return replace(study, examples=study.examples.subset(range(min(examples, len(study.examples)))))


def serve(pipe: Connection, name: str, examples: int, threads: int) -> None:
    """Time the requested peers, pairs of a way's name and a number of masks, until None is received."""
    torch.set_num_threads(threads)
    study = subject(name, examples)
    ways = {"published loop": plain_way(study, published_loop(study)), "captum": captum_way(study)}
    ways["hook loop"] = plain_way(study, hook_loop(study))
    while asked := pipe.recv():
        pipe.send(ways[asked[0]](asked[1]))


@contextmanager
def peers_apart(name: str, examples: int) -> Iterator[dict[str, Way]]:
    """Provide the ways of the peers, which run in another process."""
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=serve, args=(there, name, examples, torch.get_num_threads()))
    process.start()
    there.close()  # waiting for a process that failed then ends in an error

    def asking(way: str) -> Way:
        def ask(count: int) -> float:
            here.send((way, count))
            return float(here.recv())

        return ask

    try:
        yield {way: asking(way) for way in PEERS}
        here.send(None)
    finally:
        process.join(10)
        process.kill()


def measure(name: str, study: coar.Study, rounds: int, seconds: float) -> Timing:
    """Let all ways take turns on one model and its examples, every other round in reverse order."""
    n, ours = len(study.examples), workers(study)
    with peers_apart(name, n) as ways:
        for precision, (worker, block) in ours.items():
            ways[precision] = unit_way(study, lambda masks, w=worker, b=block: w.outputs(b, masks))
        counts = {way: masks_for(run, seconds) for way, run in ways.items()}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            for way in list(ways)[:: (-1) ** number]:
                rates[way].append(n * ways[way](counts[way]))
    masks = study.sampler.masks("train", range(2), len(study.components))
    expected = published_loop(study)(masks).numpy()
    worker, block = ours["float32"]
    difference = np.abs(worker.outputs(block, masks) - expected).max() / np.abs(expected).max()
    flops = flops_per_example(study.model, study.examples.block(0, 1)[0])
    return Timing(name, len(study.components), n, rates, flops, float(difference))


def product_speed(kind: torch.dtype) -> float:
    """Return the floating-point operations per second of the fastest of some square matrix products."""
    best = 0.0
    for size in (512, 1024, 2048):
        a = torch.randn(size, size).to(kind)
        for _ in range(6):
            start = time.perf_counter()
            a @ a
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def flops_per_example(model: nn.Module, inputs: Tensor) -> float:
    """Return the floating-point operations of one forward pass of one example.

    Attention's fused path, whose operations the counter does not see, is off while counting.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() / len(inputs)


def header(arguments: argparse.Namespace, peak: dict[str, float]) -> str:
    """Return date, machine, versions and settings."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "transformers", "captum"))
    speeds = ", ".join(f"{value / 1e9:.0f} GFLOP/s {precision}" for precision, value in peak.items())
    weights = "trained" if "COAR_DATA" in os.environ else "random"
    return (
        f"# Collecting, {datetime.now(UTC):%Y-%m-%d}\n\n{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"{torch.get_num_threads()} threads; {platform.system()}, Python {platform.python_version()}, {packages}.\n"
        f"{arguments.rounds} rounds of {arguments.seconds:g} s per way; resnet20 with {weights} weights. Best matrix "
        f"product: {speeds}.\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def rate_row(timing: Timing) -> list[str]:
    """Return the row of rates."""
    values = [f"{statistics.median(values):,.3g}" for values in timing.rates.values()]
    return [timing.model, f"{timing.components:,}", str(timing.examples), *values]


def ratio_row(timing: Timing, peak: dict[str, float]) -> list[str]:
    """Return the row of ratios, shares of the peak, and the difference of the outputs."""
    cells = [timing.model, str(timing.examples)]
    for precision in OURS:
        for peer in PEERS:
            ratios = [a / b for a, b in zip(timing.rates[precision], timing.rates[peer], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        cells.append(f"{statistics.median(timing.rates[precision]) * timing.flops / peak[precision]:.2f}")
    return [*cells, f"{timing.difference:.0e}"]


def main() -> None:
    """Measure every model at every number of examples, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", choices=SUBJECTS, nargs="+", default=list(SUBJECTS))
    parser.add_argument("--examples", type=int, nargs="+", help="by default few and many, depending on the model")
    parser.add_argument("--seconds", type=float, default=1.0, help="budget of each way in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    peak = dict.fromkeys(OURS, 0.0)
    timings = []
    for name in arguments.models:
        sizes = arguments.examples or SUBJECTS[name].examples
        for size in sizes:
            peak = {precision: max(peak[precision], product_speed(kind)) for precision, kind in OURS.items()}
            start = time.perf_counter()
            timings.append(measure(name, subject(name, size), arguments.rounds, arguments.seconds))
            print(f"{name}, {size} examples: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(header(arguments, peak))
    print("Masks x images per second, medians:\n")
    print(table(["model", "components", "examples", *PEERS, *OURS], [rate_row(timing) for timing in timings]))
    ratios = [f"{precision} / {peer}" for precision in OURS for peer in PEERS]
    columns = ["model", "examples", *ratios[:3], "float32 of peak", *ratios[3:], "bf16 of peak", "difference"]
    print("Ratios of ours to the others, medians and ranges over rounds:\n")
    print(table(columns, [ratio_row(timing, peak) for timing in timings]))


if __name__ == "__main__":
    main()
