"""A search for the best set of components: a path of sets, then steps forward and back, each of them tried out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from coar.editing.tradeoff import Objective, Outcome
from coar.editing.trials import Trials

SCREEN = (150, 300)  # targets and references on which candidates are tried first
FULL = 4  # of them are then tried on all examples
ADDED, PATH = 12, 12  # additions per round, sets along a path
ROUNDS, RESCUES = 2, 4  # rounds of additions and drops, and further ones as long as the bound is broken
PENALTY = 20.0  # of a broken bound in the first rounds, in units of the trade-off per unit of accuracy
DEARER = 4.0  # by how much the penalty grows with every further round


@dataclass(frozen=True)
class Tried:
    """A set of components that was tried on all choosing examples.

    Attributes:
        ablated: The components, the most important first.
        margins: (examples,) margins with them ablated.
        outcome: What that amounts to.
    """

    ablated: tuple[int, ...]
    margins: np.ndarray
    outcome: Outcome


@dataclass
class Search:
    """Tries sets of components, and remembers all that were tried on all examples.

    Attributes:
        trials: Where sets are tried.
        objective: The trade-off and the bound.
        budget: The most components of a set.
        tried: Every set tried on all examples; the first is the empty one.
        told: Called after each set of trials.
        penalty: What breaking the bound costs.
    """

    trials: Trials
    objective: Objective
    budget: int
    tried: list[Tried] = field(default_factory=list)
    told: Callable[[], object] = lambda: None
    penalty: float = PENALTY

    def __post_init__(self) -> None:
        self.tried.append(Tried((), self.objective.base, self.objective.outcome(self.objective.base)))

    @property
    def best(self) -> Tried:
        """The best set within the bound."""
        return min((one for one in self.tried if one.outcome.excess == 0), key=lambda one: one.outcome.value)

    @property
    def leading(self) -> Tried:
        """The best set when a broken bound only costs a penalty."""
        return min(self.tried, key=lambda one: self.cost(one.outcome))

    def cost(self, outcome: Outcome) -> float:
        """Return the trade-off, with the penalty for a broken bound."""
        return outcome.value + self.penalty * outcome.excess

    def try_out(self, sets: Sequence[tuple[int, ...]]) -> list[Tried]:
        """Try sets on all examples."""
        if not sets:
            return []
        margins = self.trials.margins(np.stack([self.trials.mask(one) for one in sets]))
        found = [Tried(one, row, self.objective.outcome(row)) for one, row in zip(sets, margins, strict=True)]
        self.tried += found
        self.told()
        return found

    def follow(self, order: Sequence[int] | np.ndarray, *, least: int = 1) -> None:
        """Try the first components of an order, in up to a dozen numbers from `least` to all of them."""
        path = tuple(int(i) for i in order[: self.budget])
        counts = np.unique(np.linspace(min(least, len(path)), len(path), PATH).round().astype(int))
        if not path:
            return
        rows = self._screen()
        values = self.objective.values(
            self.trials.margins(np.stack([self.trials.mask(path[:n]) for n in counts]), rows), rows
        )
        nearest = np.argsort(values, kind="stable")[:FULL]
        self.try_out([path[:n] for n in counts[np.sort(nearest)]])

    def refine(self, free: np.ndarray) -> None:
        """Add and drop components around the leading set, as long as that pays beyond chance or mends the bound."""
        for number in range(ROUNDS + RESCUES):
            now = self.leading
            broken = now.outcome.excess > 0
            if number >= ROUNDS:
                if not broken:
                    return
                self.penalty *= DEARER
            found = self._step(now, free)
            if not broken and not any(self._pays(one, now) for one in found):
                return

    def _step(self, now: Tried, free: np.ndarray) -> list[Tried]:
        """Try each promising flip of a component on few examples, and the best, alone and together, on all."""
        rows = self._screen()
        flips = [*self._additions(now, free, rows), *now.ablated]
        if not flips:
            return []
        masks = np.stack([self.trials.mask(_flipped(now.ablated, [flip])) for flip in flips])
        costs = []
        for few in self.trials.margins(masks, rows):
            margins = now.margins.copy()  # examples far from the edge stay as they are
            margins[rows] = few
            costs.append(self.cost(self.objective.outcome(margins)))
        best = [flips[i] for i in np.argsort(costs, kind="stable")[:FULL]]
        sets = dict.fromkeys(_flipped(now.ablated, chosen) for chosen in _joint(best))
        return self.try_out([one for one in sets if 0 < len(one) <= self.budget])

    def _pays(self, new: Tried, old: Tried) -> bool:
        """Say whether a set is better by more than a standard error of the difference over examples."""
        gain = self.cost(old.outcome) - self.cost(new.outcome)
        if gain <= 0:
            return False
        scale = self.objective.scales
        parts = self.objective.weights * (np.tanh(new.margins / scale / 2) - np.tanh(old.margins / scale / 2)) / 2
        return gain > float(np.sqrt((parts**2).sum()))

    def _additions(self, now: Tried, free: np.ndarray, rows: np.ndarray) -> Iterator[int]:
        """Yield the components whose ablation, by a probe at the present set, would help most."""
        if len(now.ablated) >= self.budget:
            return
        few = rows[np.linspace(0, len(rows) - 1, min(len(rows), 256)).round().astype(int)]
        _, slopes = self.trials.slopes(self.trials.mask(now.ablated).astype(float), few)
        moved = now.margins[few, None] - slopes[:, free]  # (examples, free), by first order
        scales, weights = self.objective.scales[few], self.objective.weights[few]
        values = weights @ np.tanh(moved / scales[:, None] / 2)
        left = [int(free[i]) for i in np.argsort(values, kind="stable") if int(free[i]) not in now.ablated]
        yield from left[:ADDED]

    def _screen(self) -> np.ndarray:
        """Return the examples that tell sets apart: targets, and references near the edge under the leading set."""
        most_targets, most_references = SCREEN
        targets, references = self.objective.targets, self.objective.references
        edge = np.minimum(self.leading.margins, self.objective.base)[references]
        near = references[np.argsort(edge, kind="stable")[:most_references]]
        return np.sort(np.concatenate([targets[:most_targets], near]))


def _flipped(ablated: tuple[int, ...], flips: Sequence[int]) -> tuple[int, ...]:
    """Return the set without those flips that are in it and with the others."""
    return (*(i for i in ablated if i not in flips), *(i for i in flips if i not in ablated))


def _joint(best: Sequence[int]) -> list[list[int]]:
    """Return the best flips alone, and the best two, three, ... together."""
    return [*([one] for one in best), *(list(best[:n]) for n in range(2, len(best) + 1))]
