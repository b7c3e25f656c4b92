"""What each ablation costs and how far it takes a net from where it was trained, on digits.

    python benchmarks/ablations.py                       # a minute on one core

Times are of the processor, the fastest of several: a mask on a block of examples through a worker, over a plain forward
pass. The net is so small that what a gate does once per mask shows; on larger nets it does not. Loss is the
cross-entropy of examples that no constant has seen, under random masks at three ablated fractions.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

import coar
from coar.ablation import ABLATIONS
from coar.worker import Worker, device_copy
from pipelines import digits

MASKS, REPEATS = 40, 20
FRACTIONS = (0.05, 0.10, 0.20)


def fastest(run: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several calls."""
    took = []
    for _ in range(REPEATS):
        start = time.process_time()
        run()
        took.append(time.process_time() - start)
    return min(took)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=128)
    arguments = parser.parse_args()
    study = digits.study()
    model, components = device_copy(study.model, torch.device("cpu")), study.components
    examples = study.examples.subset(range(arguments.examples))
    print(
        f"{'ablation':>16} {'constants s':>12} {'gated / plain':>14}" + "".join(f"{f'loss {f}':>11}" for f in FRACTIONS)
    )
    for label in ABLATIONS:
        ablation = coar.choose_ablation(label, calibration=digits.split()["train"])
        start = time.process_time()
        constants = ablation.replacements(model, components, batch_size=128)
        seconds = time.process_time() - start
        worker = Worker(
            model, components, constants, coar.CrossEntropy(), donors=ablation.donors, batch_size=arguments.examples
        )
        block = worker.load(examples, 0, len(examples))
        masks = {
            at: study.sampler.masks("test", range(MASKS), len(components), ablated_fraction=at) for at in FRACTIONS
        }
        losses = [worker.outputs(block, masks[at]).mean() for at in FRACTIONS]
        plain = fastest(lambda worker=worker, block=block: worker.base_output(block))
        one = np.stack([masks[0.10][0]] * 16)
        gated = fastest(lambda worker=worker, block=block, one=one: worker.outputs(block, one)) / len(one)
        print(f"{label:>16} {seconds:>12.2f} {gated / plain:>14.2f}" + "".join(f"{loss:>11.3f}" for loss in losses))


if __name__ == "__main__":
    main()
