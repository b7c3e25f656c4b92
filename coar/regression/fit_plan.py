"""The plan of a fit: which way it computes, and how much at a time."""

from dataclasses import dataclass
from typing import Literal

import torch

from coar.forward.memory_limit import readable
from coar.store.run import Run

Way = Literal["decomposed", "gram", "packed"]
WORDS: dict[Way, str] = {
    "decomposed": "from one decomposition of the masks",
    "gram": "iteratively, from the masks' Gram matrix in float32",
    "packed": "iteratively, from masks of one bit per component",
}


@dataclass(frozen=True)
class FitPlan:
    """How a fit computes.

    Attributes:
        method: `ridge`, `ols`, `lasso` or `informed`.
        way: `decomposed`: all examples share one decomposition, or one Gram matrix in float64; `gram` and `packed`:
            iterative solvers of products with the masks' Gram matrix in float32, or with packed masks.
        device: Where the products are computed.
        limit: Most bytes that the fit may take.
        needed: Bytes that it is expected to take at its peak, above those of the process before.
        together: Examples that are solved together, a multiple of those in a chunk, or all.
        tile: Rows of masks that are unpacked together; 0 where none are.
        basis: Vectors that the Lanczos process keeps per example; 0 where there is none.
        held: Whether packed masks stay in memory.
        working: Components in the working set of the lasso with packed masks on a CPU, at most; 0 for other fits.
        learning: Examples that an informed fit learns from, at most; 0 for other methods.
        choosing: Examples whose Lanczos processes run together where an informed fit chooses its penalty; 0 where
            there are none.
    """

    method: str
    way: Way
    device: torch.device
    limit: int
    needed: int
    together: int
    tile: int = 0
    basis: int = 0
    held: bool = False
    working: int = 0
    learning: int = 0
    choosing: int = 0

    @property
    def key(self) -> str:
        """What two plans have in common that give the same numbers, but for rounding."""
        return f"{self.way}-{self.learning}"

    def blocks(self, run: Run) -> list[slice]:
        """Return the blocks of examples that are solved together; each fills whole chunks of a fit."""
        n, step = run.n_examples, self.together
        return [slice(start, min(start + step, n)) for start in range(0, n, step)]

    def words(self, masks: int, components: int, examples: int) -> str:
        """Return the plan as a line of text."""
        how = WORDS[self.way] if masks >= 2 else "from mask gradients alone"
        return (
            f"{self.method} on {masks:,} masks, {components:,} components and {examples:,} examples: "
            f"{how} on {self.device}, {self.together:,} examples at a time, about "
            f"{readable(self.needed)} of at most {readable(self.limit)}"
        )
