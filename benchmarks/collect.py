"""Counterfactuals per second on cifar10's ResNet-20, beside the published loop written plainly.

    COAR_DATA=/path/to/folder python benchmarks/collect.py
    python benchmarks/collect.py        # without the data: random weights and pictures of the same shape

The published loop copies the model for every mask, zeroes the ablated rows, and reads the data again through a data
loader, in float32. Its loader here is the cheapest there is (tensors in memory, no decoding, no transforms), so the
ratio is a lower bound. All variants run in turn, several rounds, in one process; the median ratio is what to quote.
The floor is the arithmetic of the forward passes at the speed of a plain matrix product of the same type.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import coar
from pipelines import cifar10

EXAMPLES = 256


def make_study() -> coar.Study:
    """Return the cifar10 study, or the same shapes with random numbers where the data is missing."""
    if "COAR_DATA" in os.environ:
        return cifar10.study(ablation="zero")
    torch.manual_seed(0)
    net = cifar10.CifarResNet().eval()
    pictures, labels = torch.randn(EXAMPLES, 3, 32, 32), torch.randint(0, 10, (EXAMPLES,))
    examples = coar.Examples(inputs=pictures, targets=labels)
    return coar.Study(model=net, examples=examples, components=coar.conv_filters(net))


def published_loop(study: coar.Study, masks: np.ndarray) -> Tensor:
    """Copy, zero, read the data again, run, for every mask; return (masks, examples) margins."""
    rows = [(component.site, component.position) for component in study.components]
    data = TensorDataset(study.examples.inputs, study.examples.targets)
    margins = []
    for mask in masks:
        model = copy.deepcopy(study.model).eval()
        layers = dict(model.named_modules())
        for keep, (site, position) in zip(mask, rows, strict=True):
            if not keep:
                layers[site].weight.data[position] = 0
        parts = []
        with torch.no_grad():
            for inputs, targets in DataLoader(data, batch_size=EXAMPLES):
                logits = model(inputs)
                correct = logits.gather(1, targets[:, None])[:, 0]
                others = logits.scatter(1, targets[:, None], -torch.inf).logsumexp(1)
                parts.append(correct - others)
        margins.append(torch.cat(parts))
    return torch.stack(margins)


def ours(study: coar.Study, folder: Path, precision: str) -> Callable[[int], float]:
    """Return a function that extends a run by so many masks and returns the seconds that took, storage included."""
    path = folder / f"{precision}.zarr"
    settings = {"precision": precision, "progress": False, "device": "cpu", "precision_tolerance": 0.5}
    coar.collect(study, path, masks=64, **settings)

    def extend(masks: int) -> float:
        have = len(coar.Run.open(path).plan)
        start = time.perf_counter()
        coar.collect(study, path, masks=have + masks, **settings)
        return time.perf_counter() - start

    return extend


def product_speed(kind: torch.dtype, size: int = 2048) -> float:
    """Return the floating-point operations per second of a square matrix product."""
    a = torch.randn(size, size).to(kind)
    a @ a
    start = time.perf_counter()
    for _ in range(6):
        a @ a
    return 6 * 2 * size**3 / (time.perf_counter() - start)


def flops_per_example(model: nn.Module, inputs: Tensor) -> float:
    """Return the floating-point operations of one forward pass of one example."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs[:4])
    return counter.get_total_flops() / 4


def main() -> None:
    """Run the rounds and print rates, ratios and shares of the floor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", type=int, default=128, help="masks per round, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    study = make_study()
    n = len(study.examples)
    masks = study.sampler.masks("train", range(arguments.masks // 8), len(study.components))
    published_loop(study, masks[:2])
    rates: dict[str, list[float]] = {"published loop": [], "float32": [], "bf16": []}
    with tempfile.TemporaryDirectory() as folder:
        extend = {name: ours(study, Path(folder), name) for name in ("float32", "bf16")}
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            published_loop(study, masks)
            rates["published loop"].append(len(masks) * n / (time.perf_counter() - start))
            for name, run in extend.items():
                rates[name].append(arguments.masks * n / run(arguments.masks))
        stored = coar.Run.open(Path(folder) / "float32.zarr")
        expected = published_loop(study, stored.masks(0, 2)).numpy()
        difference = np.abs(stored.outputs(slice(0, 2), slice(None)) - expected).max()
        error = coar.Run.open(Path(folder) / "bf16.zarr").facts["precision"]["error"]
    flops = flops_per_example(study.model, study.examples.inputs)
    floors = {"float32": torch.float32, "bf16": torch.bfloat16}
    report = {"threads": torch.get_num_threads(), "examples": n, "megaflops_per_example": round(flops / 1e6, 1)}
    for name, values in rates.items():
        report[name] = {"masks_x_images_per_second": round(statistics.median(values))}
        if name in floors:
            ratios = [a / b for a, b in zip(values, rates["published loop"], strict=True)]
            share = statistics.median(values) * flops / product_speed(floors[name])
            report[name] |= {
                "ratio_to_published_loop": round(statistics.median(ratios), 2),
                "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
                "of_matrix_product_speed": round(share, 3),
            }
    report["largest_difference_to_published_loop_float32"] = float(difference)
    report["bf16_error_of_spread"] = round(error, 4)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
