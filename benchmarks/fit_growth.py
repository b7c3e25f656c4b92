"""Growth of the time and memory of fitting with the number of components and of masks, beside the products' floor.

    python -m benchmarks.fit_growth                       # all parts; alone on the machine
    python -m benchmarks.fit_growth --parts lasso ols     # some parts
    python -m benchmarks.fit_growth --largest 22720       # without larger sizes
    python -m benchmarks.fit_growth --scale 0.1           # a quick test
    python -m benchmarks.fit_growth --threads 1           # of torch; by default as many as torch takes
    python -m benchmarks.fit_growth --keep runs/growth    # results as they come; a stopped benchmark goes on

`ridge`, `lasso` and `ols` fit generated runs of 2,304, 9,216, 22,720 and 82,944 components, the sizes of published
setups, under a stated memory limit. Ridge and lasso have the same masks and examples at each size, so that the exponent
of time in components is that of the method. Least squares needs more masks than components: it has 1.5 times as many.
Beside each is its floor: the seconds of two products of the size of masks x components x examples in float32, times the
products that the fit made, and the bytes of packed masks that they read.

`informed` fits 64 mask gradients of generated runs, without masks, at the same sizes and at 458,752 components.
`corrected` corrects such fits by 2,000 masks, under limits that exclude the decomposition.

`masks` fits the first 500, 2,000 and 8,000 masks of a run of 9,216 components by ridge, under a limit that excludes the
decomposition. It prints the line of time on masks, and the range of memory.

Every fit has a process of its own; memory is the peak above that after the imports. Times are those of the wall clock;
CPU seconds of all threads are beside them.
"""

import argparse
import json
import logging
import multiprocessing
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

import coar
from benchmarks.fit import add_gradients, forget_peak, generate, memory_gib
from coar.regression.iterative import operators
from coar.regression.memory import FEW as FEW_EXAMPLES
from coar.regression.memory import FEW_TILE_BYTES, TILE_BYTES

SIZES, LARGEST = (2_304, 9_216, 22_720, 82_944), 458_752
MASKS, EXAMPLES = 2_000, 16
FEW_MASKS, FEW = 1_000, 4  # of the lasso, whose paths take hundreds of products
GRADIENTS, LEARNED = 64, 16  # mask gradients, and examples, of informed fits
SITES = 24
PARTS = ("ridge", "lasso", "ols", "informed", "corrected", "masks")
LIMIT, LARGE_LIMIT = "1GiB", "4GiB"
HELD_LIMIT = "6GiB"  # of least squares at the largest size, whose masks of 1.3 GB stay in memory within it
CORRECTED_LIMITS = ("256MiB", "512MiB", "512MiB", "1GiB")
OF_MASKS, SMALL_LIMIT = (500, 2_000, 8_000), "512MiB"


def floor(masks: int, components: int, examples: int, threads: int) -> dict[str, float]:
    """Return GFLOP/s of the bare products for tiles as the fit makes them."""
    torch.set_num_threads(threads)
    rows = min(max((FEW_TILE_BYTES if examples < FEW_EXAMPLES else TILE_BYTES) // (4 * components), 16), 4096, masks)
    tile, values = torch.rand(rows, components), torch.rand(examples, components)
    image, out = values @ tile.T, torch.zeros(examples, components)
    start = time.perf_counter()
    for _ in range(3):
        torch.mm(values, tile.T, out=image)
        out.addmm_(image, tile)
    taken = (time.perf_counter() - start) / 3
    return {"gflops": 4 * rows * components * examples / taken / 1e9}


class Counted:
    """Counts the products of a fit, and the seconds in them, by the operator's own methods."""

    def __init__(self) -> None:
        self.products, self.columns, self.seconds = 0, 0, 0.0
        for kind in (operators.PackedGram, operators.HeldGram):
            kind.times = self._counted(kind.times)  # type: ignore[method-assign]

    def _counted(self, times: Any) -> Any:
        def counted(operator: Any, values: torch.Tensor) -> torch.Tensor:
            start = time.perf_counter()
            result: torch.Tensor = times(operator, values)
            self.seconds += time.perf_counter() - start
            self.products += 1
            self.columns += values.shape[1]
            return result

        return counted


def measure(path: Path, method: str, limit: str | None, masks: int | None, threads: int) -> dict[str, Any]:
    """Fit; return seconds, GiB above those after the imports, the plan, and the number of products."""
    torch.set_num_threads(threads)
    plans: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: plans.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("coar.regression.fitting").addHandler(handler)
    logging.getLogger("coar").setLevel(logging.INFO)
    run, counted = coar.Run.open(path), Counted()
    forget_peak()
    before, start, cpu = memory_gib("VmRSS"), time.perf_counter(), time.process_time()
    coar.fit(run, method=method, masks=masks, refit=True, memory_limit=limit, device="cpu", progress=False)
    seconds, peak = time.perf_counter() - start, memory_gib("VmHWM") - before
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "gib": round(peak, 2),
        "products": counted.products,
        "columns": counted.columns,
        "in_products": round(counted.seconds, 2),
        "plan": plans[0],
    }


def apart(function: Any, *arguments: Any) -> Any:
    """Call in a process of its own, so that memory starts at the same level."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def make(path: Path, masks: int, components: int, examples: int, gradients: int, sites: int = SITES) -> None:
    """Generate a run with masks, or with mask gradients."""
    run = generate(path, masks, components, examples, sites=min(sites, components))
    if gradients:
        add_gradients(run, gradients)


class Bench:
    """Measured fits, kept in a file as they come.

    Args:
        folder: Where runs are generated, one at a time.
        kept: The file; fits that it has are not made again.
        scale: Factor of all sizes.
        largest: The largest number of components.
        threads: Threads of torch.
    """

    def __init__(self, folder: Path, kept: Path, scale: float, largest: int, threads: int) -> None:
        self._folder, self._kept, self._scale, self._threads = folder, kept, scale, threads
        self.sizes = [self.size(size) for size in SIZES if size <= largest]
        self.beyond = [self.size(LARGEST)] if largest >= LARGEST else []
        self.found: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}

    def size(self, number: int) -> int:
        """Return a number scaled."""
        return max(round(number * self._scale), 16)

    def fits(
        self, shape: tuple[int, int, int], gradients: int, wanted: list[tuple[str, str | None, int | None]]
    ) -> list[dict[str, Any]]:
        """Generate a run of (masks, components, examples), fit it in all ways, and return what was measured."""
        keys = [f"{method} {masks or shape[0]} x {shape[1]} x {shape[2]} {limit}" for method, limit, masks in wanted]
        path = self._folder / "run.zarr"
        if not all(key in self.found for key in keys):
            shutil.rmtree(path, ignore_errors=True)  # of a benchmark that was stopped
            apart(make, path, *shape, gradients)
            for key, (method, limit, masks) in zip(keys, wanted, strict=True):
                if key not in self.found:
                    result = apart(measure, path, method, limit, masks, self._threads)
                    own = (masks or shape[0], *shape[1:])
                    result |= floor(*own, self._threads) if result["products"] else {}
                    self.found[key] = {"method": method, "shape": own, "limit": limit, **result}
                    self._kept.write_text(json.dumps(self.found, indent=1))
                print(line(self.found[key]), flush=True)
            shutil.rmtree(path)
        return [self.found[key] for key in keys]

    def ridge(self) -> None:
        """Fit by ridge at every number of components."""
        wanted = [("ridge", LIMIT, None)]
        exponent("ridge", [r for d in self.sizes for r in self.fits((self.size(MASKS), d, EXAMPLES), 0, wanted)])

    def lasso(self) -> None:
        """Fit by lasso at every number of components."""
        wanted = [("lasso", LIMIT, None)]
        exponent("lasso", [r for d in self.sizes for r in self.fits((self.size(FEW_MASKS), d, FEW), 0, wanted)])

    def ols(self) -> None:
        """Fit by least squares at every number of components, on 1.5 times as many masks."""
        results = []
        for d in self.sizes:
            limit = HELD_LIMIT if d >= self.size(SIZES[3]) else LIMIT
            results += self.fits((3 * d // 2, d, FEW), 0, [("ols", limit, None)])
        exponent("ols", results)

    def informed(self) -> None:
        """Fit mask gradients at every number of components."""
        results = []
        for d in (*self.sizes, *self.beyond):
            limit = LARGE_LIMIT if d >= self.size(SIZES[3]) else LIMIT
            results += self.fits((32, d, LEARNED), GRADIENTS, [("informed", limit, 0)])
        exponent("informed", results)

    def corrected(self) -> None:
        """Fit mask gradients, corrected by masks, at every number of components."""
        results = []
        for d, limit in zip(self.sizes, CORRECTED_LIMITS, strict=False):
            results += self.fits((self.size(MASKS), d, LEARNED), GRADIENTS, [("informed", limit, None)])
        exponent("corrected", results)

    def masks(self) -> None:
        """Fit increasing numbers of masks of one run."""
        sizes = [self.size(masks) for masks in OF_MASKS]
        wanted = [("ridge", SMALL_LIMIT, masks) for masks in sizes]
        results = self.fits((sizes[-1], self.size(SIZES[1]), EXAMPLES), 0, wanted)
        more, once = np.polyfit(sizes, [result["seconds"] for result in results], 1)
        print(f"ridge, limit {SMALL_LIMIT}: {once:.2f} s + {1000 * more:.3f} s per 1,000 masks; ", end="")
        print(f"{min(r['gib'] for r in results):.2f} to {max(r['gib'] for r in results):.2f} GiB")


def line(result: dict[str, Any]) -> str:
    """Return a measured fit as a line of text."""
    masks, components, examples = result["shape"]
    text = f"{result['method']:8} {masks:7,} masks {components:8,} components {examples:4} examples "
    text += f"{result['seconds']:8.1f} s ({result['cpu_seconds']:.1f} of the CPU) {result['gib']:6.2f} GiB "
    text += f"of {result['limit'] or 'the default'}"
    if result["products"]:
        flops = 4 * masks * components * result["columns"]
        least = flops / result["gflops"] / 1e9
        text += f"; {result['products']} products: {result['in_products']:.1f} s, floor {least:.1f} s "
        text += f"at {result['gflops']:.0f} GFLOP/s, {result['products'] * masks * components / 8e9:.1f} GB of masks"
    return text


def exponent(method: str, results: list[dict[str, Any]]) -> None:
    """Print the slope of log time on log components."""
    sizes, seconds = (np.log([pick(r) for r in results]) for pick in (lambda r: r["shape"][1], lambda r: r["seconds"]))
    if len(sizes) < 2:
        return
    slopes = np.diff(seconds) / np.diff(sizes)
    print(f"{method}: exponents of time in components {', '.join(f'{slope:.2f}' for slope in slopes)}; ", end="")
    print(f"over all {np.polyfit(sizes, seconds, 1)[0]:.2f}")


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--largest", type=int, default=LARGEST, help="largest number of components")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all sizes: less than 1 for a quick test")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--keep", type=Path, default=None, help="folder for results and runs; temporary by default")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="coar-fit-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        bench = Bench(folder, folder / "results.json", arguments.scale, arguments.largest, arguments.threads)
        for part in arguments.parts:
            getattr(bench, part)()
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
