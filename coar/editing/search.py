"""A search for the best set of components: a path of sets, then steps forward and back, each of them tried out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from coar.editing.evaluator import GatedEvaluator
from coar.editing.minimal_strength import minimal_strengths
from coar.editing.objective import Objective, Outcome
from coar.editing.train import train_constants

SCREEN = (150, 300)  # targets and references on which sets are tried first
FULL, JOINED = 3, 4  # sets that are then tried on all examples, and single steps that are also taken together
FLIPS, PATH = 12, 12  # additions and drops per round, sets along a path
ROUNDS = 14  # of additions and drops, and of training, at most
MAX_UNMET = 0.1  # share of targets that may be left unchanged before a search is widened
PENALTY = 20.0  # of a broken bound in the first rounds, in units of the trade-off per unit of accuracy
SHARES = (1.0, 0.6, 0.3)  # of the way to trained constants that are tried
DEARER = 1.5  # by how much the penalty and the care for harm grow with every round that breaks the bound


@dataclass(frozen=True)
class EvaluatedSet:
    """A set of components that was tried on all choosing examples.

    Attributes:
        ablated: The components, the most important first.
        margins: (examples,) margins with them ablated.
        outcome: What that amounts to.
        constants: (components.width,) constants that replaced them.
        strengths: How far each of them went towards these.
    """

    ablated: tuple[int, ...]
    margins: np.ndarray
    outcome: Outcome
    constants: np.ndarray
    strengths: np.ndarray


@dataclass
class Search:
    """Tries sets of components, and remembers all that were tried on all examples.

    Attributes:
        trials: Where sets are tried.
        objective: The trade-off and the bound.
        budget: The most components of a set.
        tried: Every set tried on all examples; the first is the empty one.
        on_step: Called after each set of trials.
        penalty: What breaking the bound costs.
        since: From which of the sets tried the search goes on; a new stage does not go back to those before it.
        care: How much more harm weighs when constants are trained.
        near: How many references, those nearest to the edge, sets are tried on; the others count as unchanged. By
            default all.
        least: Try every set at the least strength that does to targets what whole ablations do.
    """

    trials: GatedEvaluator
    objective: Objective
    budget: int
    tried: list[EvaluatedSet] = field(default_factory=list)
    on_step: Callable[[], object] = lambda: None
    penalty: float = PENALTY
    since: int = 0
    harm_weight: float = 1.0
    n_boundary_references: int | None = None
    least: bool = False

    def __post_init__(self) -> None:
        self._rows = self._nearest(self.objective.base, len(self.objective.targets), self.n_boundary_references)
        outcome = self.objective.outcome(self.objective.base)
        self.tried.append(EvaluatedSet((), self.objective.base, outcome, self.trials.constants, np.ones(0)))

    @property
    def best(self) -> EvaluatedSet:
        """The best set within the bound."""
        return min((one for one in self.tried if one.outcome.excess == 0), key=lambda one: one.outcome.value)

    @property
    def leading(self) -> EvaluatedSet:
        """The best set when a broken bound only costs a penalty."""
        return min(self.tried[self.since :] or self.tried, key=lambda one: self.cost(one.outcome))

    def cost(self, outcome: Outcome) -> float:
        """Return the trade-off, with the penalty for a broken bound."""
        return outcome.value + self.penalty * outcome.excess

    def try_out(
        self, sets: Sequence[tuple[int, ...]], constants: np.ndarray, strengths: Sequence[np.ndarray] | None = None
    ) -> list[EvaluatedSet]:
        """Try sets on all examples, with constants in their place, and with strengths where these are given."""
        if not sets:
            return []
        margins, strengths = self._margins(sets, self._rows, self.objective.base, constants, strengths)
        found = [
            EvaluatedSet(one, row, self.objective.outcome(row), constants, how)
            for one, row, how in zip(sets, margins, strengths, strict=True)
        ]
        self.tried += found
        self.on_step()
        return found

    def follow(self, order: Sequence[int] | np.ndarray, *, least: int = 1) -> None:
        """Try the first components of an order: a dozen numbers from `least` to all of them, and half a dozen below."""
        path = tuple(int(i) for i in order[: self.budget])
        if path:
            least = min(max(least, 1), len(path))
            below, above = np.linspace(0, least, PATH // 2 + 2)[1:], np.linspace(least, len(path), PATH)
            counts = np.unique(np.concatenate([below, above]).round().astype(int).clip(1))
            self._try_best([path[:count] for count in counts], self.tried[0], self._screen())

    def start_again(self, budget: int) -> None:
        """Forget what leads, and what breaking the bound has come to cost; what was tried stays to be chosen from."""
        self.budget, self.since, self.penalty, self.harm_weight = budget, len(self.tried), PENALTY, 1.0

    def improve(self, free: np.ndarray, *, seed: int | None = None) -> None:
        """Add and drop components around the leading set, and train its constants, as long as that pays beyond chance.

        While the bound is broken, breaking it costs ever more, and harm weighs ever more when constants are trained.
        Candidates are ranked anew in every round, by a mask gradient of the model as it then is. With a `seed`,
        constants are trained, from the second round on.
        """
        for number in range(ROUNDS):
            now = self.leading
            found = self._step(now, free)
            if seed is not None and number > 0:
                found += self._tailor(seed)
            paid = any(self._pays(one, now) for one in found)
            broken = self.leading.outcome.excess > 0
            if not broken and not paid and (number > 0 or seed is None):
                return
            if broken:
                self.penalty *= DEARER
                self.harm_weight *= DEARER

    def _tailor(self, seed: int) -> list[EvaluatedSet]:
        """Train the constants of the leading set, and try what is found and parts of the way there."""
        now = self.leading
        if not now.ablated:
            return []
        objective = self.objective.with_harm_weight(self.harm_weight)
        parts = self.trials, objective, now.ablated
        trained = train_constants(*parts, start=now.constants, strengths=now.strengths, among=self._rows, seed=seed)
        return [
            one
            for share in SHARES
            for one in self.try_out([now.ablated], now.constants + np.float32(share) * (trained - now.constants))
        ]

    def _step(self, now: EvaluatedSet, free: np.ndarray) -> list[EvaluatedSet]:
        """Try each promising flip of a component on few examples, and the best, alone and together, on all."""
        rows = self._screen()
        flips = self._flips(now, free, rows)
        alone = [_flipped(now.ablated, [flip]) for flip in flips]
        best = [flips[i] for i in np.argsort(self._costs(alone, now, rows), kind="stable")[:JOINED]]
        together = [_flipped(now.ablated, best[:count]) for count in range(1, len(best) + 1)]
        return self._try_best([*together, *(_flipped(now.ablated, [flip]) for flip in best[1:])], now, rows)

    def _try_best(self, sets: Sequence[tuple[int, ...]], now: EvaluatedSet, rows: np.ndarray) -> list[EvaluatedSet]:
        """Try sets on few examples, and those that did best there on all."""
        allowed = [one for one in sets if 0 < len(one) <= self.budget]
        costs = self._costs(allowed, now, rows)
        return self.try_out([allowed[i] for i in np.sort(np.argsort(costs, kind="stable")[:FULL])], now.constants)

    def _costs(self, sets: Sequence[tuple[int, ...]], now: EvaluatedSet, rows: np.ndarray) -> list[float]:
        """Return the cost of each set, tried on few examples; the others stay as they are now."""
        margins, _ = self._margins(sets, rows, now.margins, now.constants)
        return [self.cost(self.objective.outcome(row)) for row in margins]

    def _margins(
        self,
        sets: Sequence[tuple[int, ...]],
        rows: np.ndarray,
        rest: np.ndarray,
        constants: np.ndarray,
        strengths: Sequence[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, Sequence[np.ndarray]]:
        """Return (sets, examples) margins, by trials on these rows and as given on the rest, and strengths."""
        margins = np.repeat(rest[None], len(sets), axis=0)
        if strengths is None:
            levels = (
                minimal_strengths(self.trials, self.objective, sets, constants) if self.least else np.ones(len(sets))
            )
            strengths = [np.full(len(one), level) for one, level in zip(sets, levels, strict=True)]
        if len(sets):
            gates = np.stack([self.trials.gates(one, how) for one, how in zip(sets, strengths, strict=True)])
            margins[:, rows] = self.trials.margins(gates, rows, constants=constants)
        return margins, strengths

    def _pays(self, new: EvaluatedSet, old: EvaluatedSet) -> bool:
        """Say whether a set is better by more than a standard error of the difference over examples."""
        gain = self.cost(old.outcome) - self.cost(new.outcome)
        if gain <= 0:
            return False
        scale = self.objective.scales
        parts = self.objective.weights * (np.tanh(new.margins / scale / 2) - np.tanh(old.margins / scale / 2)) / 2
        return gain > self.objective.error(parts)

    def _flips(self, now: EvaluatedSet, free: np.ndarray, rows: np.ndarray) -> list[int]:
        """Return the components that pay most to ablate or to take back, by a mask gradient at the present set."""
        few = rows[np.linspace(0, len(rows) - 1, min(len(rows), 256)).round().astype(int)]
        gates = self.trials.gates(now.ablated, now.strengths)
        _, slopes = self.trials.slopes(gates, few, constants=now.constants)
        scales, weights = self.objective.scales[few], self.objective.weights[few]
        level = now.strengths.mean() if len(now.ablated) else 1.0
        steps = np.where(gates == 1, -level, 1 - gates)
        moved = now.margins[few, None] + slopes * steps  # (examples, components), by first order
        values = weights @ np.tanh(moved / scales[:, None] / 2)
        additions = np.setdiff1d(free, now.ablated) if len(now.ablated) < self.budget else free[:0]
        return [
            int(i)
            for side in (additions, np.array(now.ablated, dtype=np.int64))
            for i in side[np.argsort(values[side], kind="stable")[:FLIPS]]
        ]

    def _screen(self) -> np.ndarray:
        """Return the examples that tell sets apart: targets, and references near the edge under the leading set."""
        targets, references = SCREEN
        few = (
            references
            if self.n_boundary_references is None
            else min(references, max(self.n_boundary_references // 4, 1))
        )
        return self._nearest(np.minimum(self.leading.margins, self.objective.base), targets, few)

    def _nearest(self, margins: np.ndarray, targets: int, references: int | None) -> np.ndarray:
        """Return the first targets and those references, of all that are tried, whose margins are smallest."""
        others = self.objective.references
        n_boundary_references = others[np.argsort(margins[others], kind="stable")[:references]]
        return np.sort(np.concatenate([self.objective.targets[:targets], n_boundary_references]))


def _flipped(ablated: tuple[int, ...], flips: Sequence[int]) -> tuple[int, ...]:
    """Return the set without those flips that are in it and with the others."""
    return (*(i for i in ablated if i not in flips), *(i for i in flips if i not in ablated))
