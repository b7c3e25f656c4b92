"""Time and memory of fitting, compared with its two necessary matrix products and with scikit-learn.

    python benchmarks/fit.py                 # 50,000 masks x 2,304 components x 10,000 examples; about 2.3 GB of disk
    python benchmarks/fit.py --masks 10000 --examples 2000 --components 1000
    python benchmarks/fit.py --masks 4096 --examples 100 --components 50 --scale 0.1   # a quick test

The outputs are generated (linear in the masks plus noise) and stored in a real run on disk, which is then fitted like
any other. The floor is X'X and X'Y of the same size and type (float32), from memory, in the same process.
`fit_growth.py` measures the growth of time with components and with masks.

Lasso is compared with scikit-learn's Lasso at the penalties that ours chose, from the rows and from the Gram matrix,
and with its path of as many penalties as ours follows. scikit-learn solves one example after another, so its times are
measured on a few examples and scaled up to all. The time of the Gram matrix, which is computed once, is not scaled.

fast_l1, the SAGA solver of the method's authors (github.com/MadryLab/fast_l1), is left out because it needs a CUDA
device: it imports CuPy, pins memory and sends tensors to the device by name. Its published settings are 100 penalties
down to 1e-6 of the largest, a learning rate of 0.01 and an end when no weight's squared change in a pass is above
5e-10; the settings published with the method have a single penalty, of zero.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import Lasso, Ridge, RidgeCV, lasso_path

import coar
from coar.components.table import Component, Components
from coar.regression.lasso import PATH
from coar.regression.ridge import PENALTIES
from coar.regression.sums import BATCH as ROWS
from coar.store.arrays import write
from coar.store.gradients import MaskGradients
from coar.store.plan import Plan
from coar.store.records import PrecisionRecord, RunRecord
from coar.store.run import pack

FEW = 20  # examples for timing scikit-learn's lasso and comparing with it


def generate(path: Path, masks: int, components: int, examples: int, *, sites: int = 1) -> coar.Run:
    """Write a run whose outputs are linear in the masks plus noise of the same spread; its sites are of equal size."""
    size = -(-components // sites)
    table = Components(
        Component(f"layer{i // size}[{i % size}]", "neuron", f"layer{i // size}", "output", -1, i % size, 1)
        for i in range(components)
    )
    sampler = coar.BernoulliSampler(ablated_fraction=0.10, seed=0)
    run = coar.Run.create(
        path,
        components=table,
        metadata={"id": np.arange(examples)},
        replacements=np.zeros(components, dtype=np.float32),
        fingerprint={
            "components": table.fingerprint(),
            "sampler": sampler.settings(),
            "ablation": coar.ZeroWeight().settings(),
            "weights": "none",
        },
        facts=RunRecord(batch_norms={}, precision=PrecisionRecord(name="float32")),
        blocks=(256, min(examples, 500)),
    )
    run.extend(Plan().extended({("train", 0.10): masks}))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(components, examples, generator=generator) / components**0.5
    block = run.blocks[0]
    for start in range(0, masks, 8 * block):
        rows = slice(start, min(start + 8 * block, masks))
        masks_of_rows = run.draw(rows)
        x = torch.from_numpy(masks_of_rows).float()
        y = x @ weights + 0.3 * torch.randn(len(x), examples, generator=generator)
        write(run.array("masks"), pack(masks_of_rows), rows, slice(None))
        write(run.array("outputs"), y.numpy(), rows, slice(None))
    write(run.array("base_output"), weights.sum(0).numpy(), slice(None))
    os.sync()  # no background writing while the fit is timed
    return run


def add_gradients(run: coar.Run, count: int, *, noise: float = 0.3, rank: int = 8) -> None:
    """Give a run mask gradients: effects that examples share in part, curvature of a low rank, and noise."""
    mask_gradients = MaskGradients(run)
    mask_gradients.extend(count)
    n, d = run.n_examples, run.n_components
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(n, 20, generator=generator) @ torch.randn(20, d, generator=generator) / 20**0.5
    effects = (shared + torch.randn(n, d, generator=generator)) / d**0.5
    directions = torch.randn(rank, d, generator=generator) / d**0.5
    bends = torch.randn(n, rank, generator=generator)
    for unit in mask_gradients.missing_units():
        examples, masks = mask_gradients.examples_of(unit), mask_gradients.masks(unit.round)
        groups = torch.from_numpy(mask_gradients.group_of(examples))
        effect, bend = effects[examples], bends[examples]
        sums, counts = torch.zeros(2, *effect.shape), torch.zeros(2, *effect.shape)
        outputs = torch.zeros(len(masks), len(effect))
        for i, of_groups in enumerate(masks):
            x = torch.from_numpy(of_groups).float()[groups]
            along = (x - 0.9) @ directions.T
            gradient = effect + (bend * along) @ directions
            gradient += noise * torch.randn(gradient.shape, generator=generator) / d**0.5
            outputs[i] = (effect * x).sum(1) + (bend * along**2).sum(1) / 2
            outputs[i] += noise * torch.randn(len(effect), generator=generator)
            for end, chosen in enumerate((x, 1 - x)):
                sums[end] += gradient * chosen
                counts[end] += chosen
        mask_gradients.write_unit(unit, *(sums / counts).numpy(), outputs.numpy())


def bare_products(masks: int, components: int, examples: int) -> float:
    """Return the seconds of X'X and X'Y in float32, in blocks of rows that are already in memory."""
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
    """Reset the highest resident memory to the current one."""
    Path("/proc/self/clear_refs").write_text("5")


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a run's masks and outputs whole, in the float64 that scikit-learn computes in."""
    run = coar.Run.open(path)
    rows = slice(0, len(run.plan))
    return run.masks(0, rows.stop).astype(np.float64), run.outputs(rows, slice(None)).astype(np.float64)


def penalties(x: np.ndarray) -> np.ndarray:
    """Return the package's grid of penalties for this design."""
    return PENALTIES.numpy() * np.linalg.eigvalsh(np.cov(x.T) * (len(x) - 1)).mean()


def measure(kind: str, path: Path, masks: int | None = None) -> tuple[float, float]:
    """Fit in one way; return the seconds, and the GiB of memory above that after the imports.

    Args:
        kind: A method of the package, or a class of scikit-learn.
        path: The run.
        masks: For a method of the package, the number of masks to fit, the first ones.
    """
    forget_peak()
    before = memory_gib("VmRSS")
    if kind in ("ridge", "lasso"):
        start = time.perf_counter()
        coar.fit(coar.Run.open(path), method=kind, masks=masks, refit=True, progress=False)
    else:
        x, y = load(path)
        ways = {"Ridge": Ridge(solver="cholesky"), "RidgeCV": RidgeCV(alphas=penalties(x), alpha_per_target=True)}
        start = time.perf_counter()
        ways[kind].fit(x, y)
    return time.perf_counter() - start, memory_gib("VmHWM") - before


def measure_apart(kind: str, path: Path, masks: int | None = None) -> tuple[float, float]:
    """Measure in a process of its own, so that memory starts at the same level."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, kind, path, masks).result()


def compare_with_scikit_learn(path: Path, masks: int, components: int, examples: int) -> None:
    """Fit a run that scikit-learn can hold in memory, each way in a process of its own, and compare."""
    figures = {kind: measure_apart(kind, path) for kind in ("ridge", "Ridge", "RidgeCV")}
    notes = {
        "ridge": "ours, read from disk, a penalty per example, standard errors",
        "Ridge": "from memory, one given penalty, no errors",
        "RidgeCV": "from memory, a penalty per example, no errors",
    }
    print(f"compared with scikit-learn at {masks} masks, {components} components, {examples} examples")
    for kind, (seconds, memory) in figures.items():
        time_ratio, memory_ratio = figures["ridge"][0] / seconds, figures["ridge"][1] / memory
        print(f"  {kind:8} {notes[kind]:61} {seconds:7.2f} s {memory:6.2f} GiB", end="  ")
        print(f"ours takes {time_ratio:.2f} of the time, {memory_ratio:.2f} of the memory")
    attributions = coar.load(path, "ridge")
    x, y = load(path)
    few = range(20)
    exact = np.stack([Ridge(alpha=attributions.penalty[i]).fit(x, y[:, i]).coef_ for i in few])
    cross = RidgeCV(alphas=penalties(x), alpha_per_target=True).fit(x, y[:, few])
    same = np.isclose(cross.alpha_, attributions.penalty[list(few)], rtol=1e-3).mean()
    difference = np.abs(exact - attributions.weights(slice(0, len(few)))).max()
    print(f"  largest coefficient difference to Ridge at our penalties, {len(few)} examples: {difference:.1e}")
    print(f"  share of them for which RidgeCV (leave-one-out) picks our penalty (GCV): {same:.2f}")


def compare_with_scikit_learn_lasso(path: Path, masks: int, components: int, examples: int) -> None:
    """Compare lasso with scikit-learn's at the penalties that ours chose, in time and in weights."""
    ours, memory = measure_apart("lasso", path)
    attributions = coar.load(path, "lasso")
    few = min(FEW, examples)
    weight, penalty = attributions.weights(slice(0, few)), attributions.penalty[:few].astype(float)
    x, y = load(path)
    start = time.perf_counter()
    x, y = x - x.mean(0), np.asfortranarray(y[:, :few] - y[:, :few].mean(0))
    gram, products = x.T @ x, np.asfortranarray(x.T @ y)
    once = time.perf_counter() - start

    def seconds(solve: Callable[[int], object]) -> float:
        start = time.perf_counter()
        for i in range(few):
            solve(i)
        return (time.perf_counter() - start) * examples / few

    def rows(i: int, tol: float = 1e-4) -> np.ndarray:
        return Lasso(alpha=penalty[i], fit_intercept=False, tol=tol, max_iter=100_000).fit(x, y[:, i]).coef_

    def path_of(i: int, alphas: np.ndarray) -> object:
        return lasso_path(x, y[:, i], alphas=alphas, precompute=gram, Xy=products[:, i], check_input=False)

    times = {
        "one given penalty, from the rows": seconds(rows),
        "one given penalty, from the Gram matrix": once + seconds(lambda i: path_of(i, penalty[i : i + 1])),
        f"{len(PATH)} penalties, from the Gram matrix": once
        + seconds(lambda i: path_of(i, PATH.numpy() * np.abs(products[:, i]).max() / masks)),
    }
    print(f"lasso compared with scikit-learn's at {masks} masks, {components} components, {examples} examples")
    kept = f"{(weight != 0).mean():.2f} of weights kept"
    print(f"  ours, up to {len(PATH)} penalties and a choice: {ours:.2f} s {memory:.2f} GiB; {kept}")
    for note, taken in times.items():
        print(f"  Lasso, {note:41} {taken:8.2f} s, from {few} examples; ours takes {ours / taken:.3f} of the time")
    exact = np.stack([rows(i, 1e-12) for i in range(few)])
    difference = np.abs(exact - weight).max(1) / np.abs(exact).max(1)
    print(f"  largest coefficient difference, as a share of an example's largest weight: {difference.max():.1e}")
    print("  fast_l1 left out: it needs a CUDA device (see the head of this file)")


def main() -> None:
    """Run all parts and print their times and memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, size in (("masks", 50_000), ("components", 2_304), ("examples", 10_000)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--folder", type=Path, default=None, help="folder for the run; a temporary one by default")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the sizes in comparisons with others")
    sizes = parser.parse_args()
    shape = (sizes.masks, sizes.components, sizes.examples)
    small = [max(round(size * sizes.scale), 10) for size in (10_000, 700, 500)]
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
        generate(folder / "small.zarr", *small)
        compare_with_scikit_learn(folder / "small.zarr", *small)
        compare_with_scikit_learn_lasso(folder / "small.zarr", *small)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
