"""Growth of the time and memory of fitting with the number of masks, extrapolated to a fit of the largest size.

    python benchmarks/fit_growth.py                     # both parts at the sizes below; alone on the machine
    python benchmarks/fit_growth.py --scale 0.1         # a quick test
    python benchmarks/fit_growth.py --figures elsewhere

The first part fits the first 5,000, 10,000, 20,000 and 40,000 masks of one generated run of 2,304 components and 300
examples, by ridge and by lasso, each in a process of its own. It prints the median of `--rounds` rounds, the slope of
the logarithm of time on that of masks, and the line of time on masks: the time that does not depend on masks (the
eigendecomposition, or the paths of penalties) and the time that a thousand masks add. Lasso may get faster with more
masks, since its paths then take fewer steps. The figure is `fit_masks.png`.

The second part is 22,720 components x 100,000 masks x 5,000 examples with each of the three numbers a tenth and a
twentieth as large. No term in the time is of a higher order than the third in the three numbers together: masks x
components^2 for X'X, masks x components x examples for X'Y, components^3 for the eigendecomposition, components^2 x
examples for every step of a path. So with all three s times as large, time grows by s^3 at most, and memory, in which
components^2 leads, by s^2 at most: reading and elementwise operations grow by less. The numbers of steps in a path
depend on the ratio of masks to components, which stays constant. The smaller of the two sizes shows the actual
exponent.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.fit import generate, measure_apart

METHODS = {"ridge": "#4477aa", "lasso": "#ee6677"}  # with colours of Paul Tol's bright scheme
MASKS, COMPONENTS, EXAMPLES = (5_000, 10_000, 20_000, 40_000), 2_304, 300
LARGEST = (100_000, 22_720, 5_000)  # masks, components, examples
PART, HALF = 1 / 10, 2  # of the largest size in each number; the smaller size is half of that
FIGURES = Path("reports/benchmarks")


def growth(folder: Path, scale: float, rounds: int) -> tuple[list[int], dict[str, np.ndarray]]:
    """Fit increasing numbers of masks; return these numbers, and by method (2, sizes) seconds and GiB."""
    sizes = [round(masks * scale) for masks in MASKS]
    components, examples = round(COMPONENTS * scale), round(EXAMPLES * scale)
    print(f"growth with masks at {components} components, {examples} examples, {torch.get_num_threads()} threads")
    path = folder / "growth.zarr"
    generate(path, sizes[-1], components, examples)
    found = {method: np.empty((2, len(sizes), rounds)) for method in METHODS}
    for number in range(rounds):  # rounds outside, so that a slow minute spreads over all sizes
        for method, values in found.items():
            for i, masks in enumerate(sizes):
                values[:, i, number] = measure_apart(method, path, masks)
    shutil.rmtree(path)
    return sizes, {method: np.median(values, axis=2) for method, values in found.items()}


def print_growth(sizes: list[int], found: dict[str, np.ndarray]) -> None:
    """Print seconds and GiB by masks, the slope of log time on log masks, and the line of time on masks."""
    for method, (seconds, memory) in found.items():
        for masks, taken, held in zip(sizes, seconds, memory, strict=True):
            print(f"  {method:6} {masks:7} masks {taken:8.2f} s {held:6.2f} GiB")
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        more, fixed = np.polyfit(sizes, seconds, 1)
        of_memory = np.polyfit(np.log(sizes), np.log(memory), 1)[0]
        print(f"  {method:6} slope of log time on log masks {slope:.2f}, of log memory {of_memory:.2f};", end=" ")
        print(f"time about {fixed:.2f} s + {1000 * more:.3f} s per 1,000 masks")


def draw_growth(sizes: list[int], found: dict[str, np.ndarray], file: Path) -> None:
    """Draw seconds, with the line that fits them best, and GiB against masks."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, (seconds, memory) in found.items():
        per_mask, once = np.polyfit(sizes, seconds, 1)
        label = f"{method}, {1_000 * per_mask:.2f} s per 1,000 masks"
        left.plot(sizes, seconds, marker="o", linestyle="", color=METHODS[method], label=label)
        left.plot([0, sizes[-1]], [once, once + per_mask * sizes[-1]], color=METHODS[method])
        right.plot(sizes, memory, marker="o", color=METHODS[method], label=method)
    for axes, name in ((left, "seconds"), (right, "GiB above the imports")):
        axes.set(xlabel="masks", ylabel=name, xlim=(0, 1.05 * sizes[-1]), ylim=(0, 1.25 * axes.dataLim.y1))
        axes.set_xticks(sizes, [f"{masks:,}" for masks in sizes], rotation=30)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    print(f"  wrote {file}")


def extrapolate(folder: Path, part: float, rounds: int) -> None:
    """Fit the largest size scaled down, and half of that; print the extrapolation to the largest."""
    print("towards {:,} masks, {:,} components, {:,} examples".format(*LARGEST))
    found = {method: np.empty((2, 2)) for method in METHODS}
    for i, share in enumerate((part / HALF, part)):
        shape = [round(size * share) for size in LARGEST]
        generate(folder / "part.zarr", *shape)
        for method, values in found.items():
            trials = [measure_apart(method, folder / "part.zarr") for _ in range(rounds)]
            values[:, i] = [statistics.median(column) for column in zip(*trials, strict=True)]
            print("  {:6} {:,} masks, {:,} components, {:,} examples".format(method, *shape), end=": ")
            print(f"{values[0, i]:.2f} s {values[1, i]:.2f} GiB")
        shutil.rmtree(folder / "part.zarr")
    for method, (seconds, memory) in found.items():
        exponents = np.log([seconds[1] / seconds[0], memory[1] / memory[0]]) / np.log(HALF)
        print(f"  {method:6} exponents from the smaller to the larger: time {exponents[0]:.2f}, at most 3 by its terms")
        print(f"         memory {exponents[1]:.2f}, at most 2 by its terms")
        hours, held = seconds[1] * part**-3 / 3600, memory[1] * part**-2
        print(f"  {method:6} at the largest size at most {hours:.1f} h (x {part**-3:.0f}) and ", end="")
        print(f"{held:.0f} GiB (x {part**-2:.0f}) on a machine like this one")


def main() -> None:
    """Run both parts, print their times and memory, and draw the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all sizes: less than 1 for a quick test")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which medians are printed")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder for fit_masks.png")
    parser.add_argument("--folder", type=Path, default=None, help="folder for runs; a temporary one by default")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="coar-fit-"))
    try:
        sizes, found = growth(folder, arguments.scale, arguments.rounds)
        print_growth(sizes, found)
        draw_growth(sizes, found, arguments.figures / "fit_masks.png")
        extrapolate(folder, PART * arguments.scale, arguments.rounds)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
