"""Time and memory of fitting, beside the two bare matrix products it cannot do without and beside scikit-learn.

    python benchmarks/fit.py                 # 50,000 masks x 2,304 components x 10,000 examples; about 2.3 GB of disk
    python benchmarks/fit.py --masks 10000 --examples 2000 --components 1000

The outputs are generated (linear in the masks plus noise) and stored in a real run on disk, which is then fitted as any
other. The floor is X'X and X'Y of the same size and type (float32), from memory, in the same process.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import Ridge, RidgeCV

import coar
from coar.components import Component, Components
from coar.store import Plan
from coar.store.arrays import write

ROWS = 2048  # rows per bare product, the same as in the package


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


def peak_gib() -> float:
    """Return the largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def beside_scikit_learn(folder: Path, masks: int, components: int, examples: int) -> None:
    """Fit a run that scikit-learn can hold in memory, and compare time and coefficients."""
    run = generate(folder / "small.zarr", masks, components, examples)
    x, y = run.masks(0, masks).astype(np.float64), run.outputs(slice(0, masks), slice(None)).astype(np.float64)
    alphas = np.logspace(-4, 4, 65) * float(np.linalg.eigvalsh(np.cov(x.T) * (masks - 1)).mean())
    start = time.perf_counter()
    attributions = coar.fit(run, progress=False)
    ours = time.perf_counter() - start
    one = float(np.median(attributions.penalty))
    start = time.perf_counter()
    Ridge(alpha=one, solver="cholesky").fit(x, y)
    ridge = time.perf_counter() - start
    start = time.perf_counter()
    cross = RidgeCV(alphas=alphas, alpha_per_target=True).fit(x, y)
    ridge_cv = time.perf_counter() - start
    same = np.isclose(cross.alpha_, attributions.penalty, rtol=1e-3)
    exact = np.stack([Ridge(alpha=a).fit(x, y[:, i]).coef_ for i, a in enumerate(attributions.penalty[:20])])
    print(f"beside scikit-learn at {masks} masks, {components} components, {examples} examples")
    print(f"  ours, read from disk, a penalty per example, standard errors   {ours:8.2f} s")
    print(f"  Ridge, from memory, one given penalty, no errors               {ridge:8.2f} s   ratio {ours / ridge:.2f}")
    print(
        f"  RidgeCV, from memory, a penalty per example, no errors      {ridge_cv:8.2f} s   ratio {ours / ridge_cv:.3f}"
    )
    print(
        f"  largest coefficient difference to Ridge at our penalties (20 examples): "
        f"{np.abs(exact - attributions.weights(slice(0, 20))).max():.1e}"
    )
    print(f"  examples for which RidgeCV (leave-one-out) picks our penalty (GCV): {same.mean():.3f}")


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
        before = peak_gib()
        start = time.perf_counter()
        coar.fit(run, progress=False)
        fitting = time.perf_counter() - start
        peak = peak_gib()
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
            "peak_before_gib": round(before, 2),
        }
        print(json.dumps(result, indent=1))
        beside_scikit_learn(folder, 5_000, 500, 300)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
