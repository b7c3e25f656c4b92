"""Times of ranking, of the predicted rule and of applying an edit with 82,944 components, as many as a ViT-B/16 has.

    python benchmarks/edit_times.py

The net has linear layers of a ViT-B's sizes and random weights; attributions of 100 targets and 1,000 references are
random numbers, held in memory in the form of a fit's file. The edit has 20 components.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import coar
from coar.attributions import Attributions, Origin
from coar.editing.select import ranking, welch_t

BLOCKS, SIZES = 12, (768, 2304, 768, 3072, 768)
TARGETS, EXAMPLES = 100, 1_100


class Held:
    """Attributions in memory."""

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        self.values = values

    def read(self, field: str, *slices: slice | np.ndarray) -> np.ndarray:
        """Return part of a field."""
        return self.values[field][slices]

    def fields(self) -> list[str]:
        """Return the names of the fields."""
        return list(self.values)


def attributions(study: coar.Study) -> Attributions:
    """Return random attributions with standard errors, the targets' shifted for every thousandth component."""
    d, rng = len(study.components), np.random.default_rng(0)
    weights = rng.standard_normal((EXAMPLES, d), dtype=np.float32)
    weights[:TARGETS, ::1_000] += 5
    errors = np.full((EXAMPLES, d), 0.1, np.float32)
    held = Held({"weight": weights, "standard_error": errors, "intercept": np.zeros(EXAMPLES)})
    origin = Origin(np.zeros(d, np.float32), {}, study.fingerprint())
    columns = {"id": np.arange(EXAMPLES), "label": (np.arange(EXAMPLES) >= TARGETS).astype(int)}
    return Attributions(study.components, columns, {"masks": 0}, origin, held)


def timed(what: str, work: Callable[[], Any]) -> Any:
    """Do a piece of work and print its time."""
    start = time.perf_counter()
    done = work()
    print(f"{what:50}{time.perf_counter() - start:8.2f} s", flush=True)
    return done


def main() -> None:
    """Time all three."""
    torch.manual_seed(0)
    pairs = [*itertools.pairwise(SIZES)] * BLOCKS
    model = nn.Sequential(*[nn.Linear(*pair) for pair in pairs])
    examples = coar.Examples(inputs=torch.zeros(2, SIZES[0]), targets=torch.zeros(2, dtype=torch.long))
    study = coar.Study(model=model, examples=examples, components=coar.neurons(model))
    found = attributions(study)
    print(f"{len(study.components):,} components, {EXAMPLES:,} examples, {torch.get_num_threads()} threads")
    goal = coar.EditGoal(targets="label == 0", references="label == 1", direction="decrease")
    timed("published ranking, by Welch's t", lambda: ranking(welch_t(found, goal), goal))
    edit = timed("predicted choice", lambda: coar.edit(found, goal, budget=20, rule="predicted"))
    timed("prediction of what the edit does", lambda: coar.predict_edit(found, edit))
    timed("applying it, to 80 million weights", lambda: edit.apply(model))


if __name__ == "__main__":
    main()
