"""Time and memory of fitting, beside the two bare matrix products it cannot do without and beside scikit-learn.

    python benchmarks/fit.py                 # 50,000 masks x 2,304 components x 10,000 examples; about 2.3 GB of disk
    python benchmarks/fit.py --masks 10000 --examples 2000 --components 1000

The outputs are generated (linear in the masks plus noise) and stored in a real run on disk, which is then fitted as any
other. The floor is X'X and X'Y of the same size and type (float32), from memory, in the same process.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import Ridge, RidgeCV

import coar
from coar.components import Component, Components
from coar.regression.ridge import PENALTIES
from coar.regression.sums import BATCH as ROWS
from coar.store import Plan
from coar.store.arrays import write


def generate(path: Path, masks: int, components: int, examples: int) -> coar.Run:
    """Write a run whose outputs are linear in the masks plus noise of the same spread."""
    table = Components(Component(f"layer[{i}]", "neuron", "layer", "output", -1, i, 1) for i in range(components))
    sampler = coar.BernoulliSampler(ablated_fraction=0.10, seed=0)
    run = coar.Run.create(
        path,
        components=table,
        metadata={"id": np.arange(examples)},
        replacements=np.zeros(components, dtype=np.float32),
        fingerprint={"components": table.fingerprint(), "sampler": sampler.settings()},
        facts={"precision": {"name": "float32"}, "batch_norms": {}},
        blocks=(256, min(examples, 500)),
    )
    run.extend(Plan().extended({("train", 0.10): masks}))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(components, examples, generator=generator) / components**0.5
    block = run.blocks[0]
    for start in range(0, masks, 8 * block):
        rows = slice(start, min(start + 8 * block, masks))
        packed = run.packed_masks(rows.start, rows.stop)
        x = torch.from_numpy(np.unpackbits(packed, axis=1, count=components, bitorder="little")).float()
        y = x @ weights + 0.3 * torch.randn(len(x), examples, generator=generator)
        write(run.array("masks"), packed, rows, slice(None))
        write(run.array("outputs"), y.numpy(), rows, slice(None))
    write(run.array("base_output"), weights.sum(0).numpy(), slice(None))
    os.sync()  # so that no writing goes on in the background while the fit is timed
    return run


def bare_products(masks: int, components: int, examples: int) -> float:
    """Return the seconds that X'X and X'Y take in float32, in blocks of rows that are already in memory."""
    x, y = torch.rand(ROWS, components), torch.rand(ROWS, examples)
    x.T @ x
    start = time.perf_counter()
    for _ in range(masks // ROWS):
        x.T @ x
        x.T @ y
    return (time.perf_counter() - start) * masks / (masks // ROWS * ROWS)


def memory_gib(field: str) -> float:
    """Return this process's resident memory now (`VmRSS`) or at its highest (`VmHWM`), in GiB; Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 2**20


def forget_peak() -> None:
    """Let the highest resident memory start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a run's masks and outputs whole, in the float64 that scikit-learn computes in."""
    run = coar.Run.open(path)
    rows = slice(0, len(run.plan))
    return run.masks(0, rows.stop).astype(np.float64), run.outputs(rows, slice(None)).astype(np.float64)


def penalties(x: np.ndarray) -> np.ndarray:
    """Return the grid of penalties that the package uses for this design."""
    return PENALTIES.numpy() * np.linalg.eigvalsh(np.cov(x.T) * (len(x) - 1)).mean()


def measure(kind: str, path: Path) -> tuple[float, float]:
    """Fit in one way; return the seconds, and the GiB by which memory rose above what the imports take."""
    forget_peak()
    before = memory_gib("VmRSS")
    if kind == "ours":
        start = time.perf_counter()
        coar.fit(coar.Run.open(path), refit=True, progress=False)
    else:
        x, y = load(path)
        ways = {"Ridge": Ridge(solver="cholesky"), "RidgeCV": RidgeCV(alphas=penalties(x), alpha_per_target=True)}
        start = time.perf_counter()
        ways[kind].fit(x, y)
    return time.perf_counter() - start, memory_gib("VmHWM") - before


def beside_scikit_learn(folder: Path, masks: int, components: int, examples: int) -> None:
    """Fit a run that scikit-learn can hold in memory, each way in a process of its own, and compare."""
    path = folder / "small.zarr"
    generate(path, masks, components, examples)
    figures = {}
    for kind in ("ours", "Ridge", "RidgeCV"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            figures[kind] = pool.submit(measure, kind, path).result()
    notes = {
        "ours": "read from disk, a penalty per example, standard errors",
        "Ridge": "from memory, one given penalty, no errors",
        "RidgeCV": "from memory, a penalty per example, no errors",
    }
    print(f"beside scikit-learn at {masks} masks, {components} components, {examples} examples")
    for kind, (seconds, memory) in figures.items():
        time_ratio, memory_ratio = figures["ours"][0] / seconds, figures["ours"][1] / memory
        print(f"  {kind:8} {notes[kind]:55} {seconds:7.2f} s {memory:6.2f} GiB", end="  ")
        print(f"ours takes {time_ratio:.2f} of the time, {memory_ratio:.2f} of the memory")
    attributions = coar.load(path)
    x, y = load(path)
    few = range(20)
    exact = np.stack([Ridge(alpha=attributions.penalty[i]).fit(x, y[:, i]).coef_ for i in few])
    cross = RidgeCV(alphas=penalties(x), alpha_per_target=True).fit(x, y[:, few])
    same = np.isclose(cross.alpha_, attributions.penalty[list(few)], rtol=1e-3).mean()
    difference = np.abs(exact - attributions.weights(slice(0, len(few)))).max()
    print(f"  largest coefficient difference to Ridge at our penalties, {len(few)} examples: {difference:.1e}")
    print(f"  share of them for which RidgeCV (leave-one-out) picks our penalty (GCV): {same:.2f}")


def main() -> None:
    """Run both parts and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, size in (("masks", 50_000), ("components", 2_304), ("examples", 10_000)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--folder", type=Path, default=None, help="where to put the run; a temporary folder by default")
    sizes = parser.parse_args()
    shape = (sizes.masks, sizes.components, sizes.examples)
    folder = Path(tempfile.mkdtemp(dir=sizes.folder, prefix="coar-fit-"))
    try:
        run = generate(folder / "run.zarr", *shape)
        forget_peak()
        start = time.perf_counter()
        coar.fit(run, progress=False)
        fitting = time.perf_counter() - start
        peak = memory_gib("VmHWM")
        floor = bare_products(*shape)
        result = {
            "masks": sizes.masks,
            "components": sizes.components,
            "examples": sizes.examples,
            "threads": torch.get_num_threads(),
            "fit_seconds": round(fitting, 1),
            "bare_products_seconds": round(floor, 1),
            "ratio": round(fitting / floor, 2),
            "peak_gib": round(peak, 2),
        }
        print(json.dumps(result, indent=1))
        beside_scikit_learn(folder, 10_000, 700, 500)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
