"""The part of a run's attributions that fits on a page."""

from dataclasses import dataclass

import numpy as np

from coar.attributions import Attributions

NUMBERS = 600_000  # weights on a page; with their standard errors 3.2 MB
EXAMPLES = 400  # the fewest examples that stay where components are left out


@dataclass(frozen=True)
class Part:
    """Some examples and some components of attributions.

    Attributes:
        examples: (examples,) ascending positions.
        components: (components,) ascending row numbers.
        n_examples: Number of all examples.
        n_components: Number of all components.
    """

    examples: np.ndarray
    components: np.ndarray
    n_examples: int
    n_components: int

    def sentences(self) -> list[str]:
        """Return what is left out; nothing for the whole."""
        shown = []
        if len(self.examples) < self.n_examples:
            shown.append(
                f"The page has {len(self.examples):,} of the run's {self.n_examples:,} examples, evenly spaced."
            )
        if len(self.components) < self.n_components:
            shown.append(
                f"The page has {len(self.components):,} of the run's {self.n_components:,} components: those that rank "
                f"highest by magnitude in any of these examples. Sums over a layer are over all its components."
            )
        return shown


def whole_part(n_examples: int, n_components: int, numbers: int = NUMBERS) -> Part:
    """Return as many evenly spaced examples as fit, with all components."""
    count = min(n_examples, max(EXAMPLES, numbers // n_components))
    examples = np.linspace(0, n_examples - 1, count).round().astype(np.int64)
    return Part(examples, np.arange(n_components), n_examples, n_components)


def part_of(attributions: Attributions, numbers: int = NUMBERS) -> Part:
    """Return the part of attributions that fits on a page: at most `numbers` weights.

    Examples are evenly spaced. If even 400 of them with all components are too many, components are left out: each is
    ranked by magnitude within each example, and those with the best rank in any example stay.
    """
    part = whole_part(len(attributions), len(attributions.components), numbers)
    kept = min(part.n_components, max(1, numbers // len(part.examples)))
    if kept == part.n_components:
        return part
    best = np.full(part.n_components, part.n_components)
    largest = np.zeros(part.n_components)
    for example in part.examples:
        magnitude = np.abs(attributions.weights(slice(int(example), int(example) + 1))[0])
        rank = np.empty(part.n_components, dtype=np.int64)
        rank[np.argsort(-magnitude, kind="stable")] = np.arange(part.n_components)
        best, largest = np.minimum(best, rank), np.maximum(largest, magnitude)
    chosen = np.lexsort((-largest, best))[:kept]
    return Part(part.examples, np.sort(chosen), part.n_examples, part.n_components)
