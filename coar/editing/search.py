"""A search for the best set of components: prefixes of an order, then additions and drops, every set evaluated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from coar.editing.evaluate import GatedEvaluator
from coar.editing.goal import Objective, Outcome
from coar.editing.train import minimal_strengths, train_constants

SCREEN = (150, 300)  # targets and references that sets are evaluated on first
FULLY_EVALUATED = 3  # sets that are then evaluated on all examples
JOINED = 4  # single additions and drops that are also evaluated together
FLIPS = 12  # additions, and as many drops, per round
PREFIXES = 12  # of an order
ROUNDS = 14  # of additions and drops, and of training, at most
MAX_UNMET = 0.1  # share of targets that may stay unmet before a search is widened
PENALTY = 20.0  # of a broken bound in the first rounds, in units of the trade-off per unit of accuracy
GROWTH = 1.5  # of the penalty and of the weight of harm with every round that breaks the bound
FIRST_CHECKED = 8  # of the best sets are evaluated in float32 on all examples before the search goes on there
CONSTANT_FRACTIONS = (1.0, 0.6, 0.3)  # of the way to trained constants that are evaluated


@dataclass(frozen=True)
class EvaluatedSet:
    """A set of components that was evaluated on all choosing examples.

    Attributes:
        ablated: The components, the most important first.
        margins: (examples,) margins with them ablated.
        outcome: The trade-off and the harm at these margins.
        constants: (components.width,) constants that replaced them.
        strengths: (ablated,) how far each of them went towards its constants.
    """

    ablated: tuple[int, ...]
    margins: np.ndarray
    outcome: Outcome
    constants: np.ndarray
    strengths: np.ndarray


class Search:
    """Evaluates sets of components, and keeps all that were evaluated on all examples.

    Args:
        evaluator: Where sets are evaluated.
        objective: The trade-off and the bound.
        budget: The most components of a set.
        n_boundary_references: Evaluate sets on only so many references, those with the smallest margins; the others
            count as unchanged. By default all.
        minimal_strength: Evaluate every set at its minimal strength, see `minimal_strengths`, instead of full strength.
        penalty: Cost of a broken bound at the start, in units of the trade-off per unit of accuracy.
        on_step: Called with the best set so far after each evaluation.

    Attributes:
        evaluated: Every set evaluated on all examples; the first is the empty one.
    """

    def __init__(
        self,
        evaluator: GatedEvaluator,
        objective: Objective,
        budget: int,
        *,
        n_boundary_references: int | None = None,
        minimal_strength: bool = False,
        penalty: float = PENALTY,
        on_step: Callable[[EvaluatedSet], object] = lambda _: None,
    ) -> None:
        self.evaluator, self.objective = evaluator, objective
        self.n_boundary_references, self.minimal_strength = n_boundary_references, minimal_strength
        self._initial_penalty, self._on_step = penalty, on_step
        self._budget, self._penalty, self._harm_weight = budget, penalty, 1.0
        self._rows = self._boundary(objective.base, len(objective.targets), n_boundary_references)
        unablated = EvaluatedSet((), objective.base, objective.outcome(objective.base), evaluator.constants, np.ones(0))
        self.evaluated = [unablated]
        self._since = 0  # the search goes on from the sets evaluated from here on

    @property
    def budget(self) -> int:
        """The most components of a set."""
        return self._budget

    @property
    def penalty(self) -> float:
        """What breaking the bound costs now, in units of the trade-off per unit of accuracy."""
        return self._penalty

    @property
    def harm_weight(self) -> float:
        """By how much more harm weighs now when constants are trained."""
        return self._harm_weight

    @property
    def best(self) -> EvaluatedSet:
        """The best set within the bound."""
        return min((one for one in self.evaluated if one.outcome.excess == 0), key=lambda one: one.outcome.value)

    @property
    def leading(self) -> EvaluatedSet:
        """The best set of this stage when a broken bound only costs a penalty."""
        return min(self.evaluated[self._since :] or self.evaluated, key=lambda one: self.cost(one.outcome))

    def cost(self, outcome: Outcome) -> float:
        """Return the trade-off, with the penalty for a broken bound."""
        return outcome.value + self._penalty * outcome.excess

    def report(self) -> None:
        """Call `on_step` with the best set so far."""
        self._on_step(self.best)

    def evaluate(
        self, sets: Sequence[tuple[int, ...]], constants: np.ndarray, strengths: Sequence[np.ndarray] | None = None
    ) -> list[EvaluatedSet]:
        """Evaluate sets on all examples, with these constants, and at these strengths where they are given."""
        if not sets:
            return []
        margins, strengths = self._margins(sets, self._rows, self.objective.base, constants, strengths)
        found = [
            EvaluatedSet(ablated, row, self.objective.outcome(row), constants, strength)
            for ablated, row, strength in zip(sets, margins, strengths, strict=True)
        ]
        self.evaluated += found
        self.report()
        return found

    def evaluate_prefixes(self, order: Sequence[int] | np.ndarray, *, at_least: int = 1) -> None:
        """Evaluate first parts of an order, in a dozen numbers from `at_least` to all, and half a dozen below."""
        path = tuple(int(i) for i in order[: self._budget])
        if path:
            at_least = min(max(at_least, 1), len(path))
            below, above = np.linspace(0, at_least, PREFIXES // 2 + 2)[1:], np.linspace(at_least, len(path), PREFIXES)
            counts = np.unique(np.concatenate([below, above]).round().astype(int).clip(1))
            self._evaluate_best([path[:count] for count in counts], self.evaluated[0], self._screen())

    def start_again(self, budget: int) -> None:
        """Begin a new stage: no set leads, and the penalty and the weight of harm are the initial ones."""
        self._budget, self._since = budget, len(self.evaluated)
        self._penalty, self._harm_weight = self._initial_penalty, 1.0

    def take_over(self, other: "Search") -> None:
        """Take over the penalty of another search, and let any set lead but the empty one."""
        self._since, self._penalty = 1, other.penalty

    def improve(self, candidates: np.ndarray, *, seed: int | None = None) -> None:
        """Add and drop components around the leading set, and train its constants, while that pays beyond chance.

        While the bound is broken, the penalty grows, and so does the weight of harm when constants are trained.
        Candidates are ranked again in every round, by mask gradients of the model as it then is. With a `seed`,
        constants are trained, from the second round on.
        """
        for number in range(ROUNDS):
            now = self.leading
            found = self._add_and_drop(now, candidates)
            if seed is not None and number > 0:
                found += self._train_constants(seed)
            paid = any(self._pays(one, now) for one in found)
            broken = self.leading.outcome.excess > 0
            if not broken and not paid and (number > 0 or seed is None):
                return
            if broken:
                self._penalty *= GROWTH
                self._harm_weight *= GROWTH

    def _train_constants(self, seed: int) -> list[EvaluatedSet]:
        """Train the constants of the leading set, and evaluate it with them and with fractions of the way there."""
        now = self.leading
        if not now.ablated:
            return []
        objective = self.objective.with_harm_weight(self._harm_weight)
        at_present = {"start": now.constants, "strengths": now.strengths}
        trained = train_constants(self.evaluator, objective, now.ablated, **at_present, among=self._rows, seed=seed)
        return [
            one
            for fraction in CONSTANT_FRACTIONS
            for one in self.evaluate([now.ablated], now.constants + np.float32(fraction) * (trained - now.constants))
        ]

    def _add_and_drop(self, now: EvaluatedSet, candidates: np.ndarray) -> list[EvaluatedSet]:
        """Evaluate each promising addition and drop on few examples, and the best, alone and together, on all."""
        rows = self._screen()
        flips = self._flips(now, candidates, rows)
        alone = [_flipped(now.ablated, [flip]) for flip in flips]
        best = [flips[i] for i in np.argsort(self._costs(alone, now, rows), kind="stable")[:JOINED]]
        together = [_flipped(now.ablated, best[:count]) for count in range(1, len(best) + 1)]
        return self._evaluate_best([*together, *(_flipped(now.ablated, [flip]) for flip in best[1:])], now, rows)

    def _evaluate_best(
        self, sets: Sequence[tuple[int, ...]], now: EvaluatedSet, rows: np.ndarray
    ) -> list[EvaluatedSet]:
        """Evaluate sets on few examples, and those that did best there on all."""
        allowed = [one for one in sets if 0 < len(one) <= self._budget]
        order = np.argsort(self._costs(allowed, now, rows), kind="stable")
        return self.evaluate([allowed[i] for i in np.sort(order[:FULLY_EVALUATED])], now.constants)

    def _costs(self, sets: Sequence[tuple[int, ...]], now: EvaluatedSet, rows: np.ndarray) -> list[float]:
        """Return the cost of each set, evaluated on few examples; the others stay as they are now."""
        margins, _ = self._margins(sets, rows, now.margins, now.constants)
        return [self.cost(self.objective.outcome(row)) for row in margins]

    def _margins(
        self,
        sets: Sequence[tuple[int, ...]],
        rows: np.ndarray,
        others: np.ndarray,
        constants: np.ndarray,
        strengths: Sequence[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, Sequence[np.ndarray]]:
        """Return (sets, examples) margins, measured on these rows and taken from `others` elsewhere, and strengths."""
        margins = np.repeat(others[None], len(sets), axis=0)
        if strengths is None:
            levels = np.ones(len(sets))
            if self.minimal_strength:
                levels = minimal_strengths(self.evaluator, self.objective, sets, constants)
            strengths = [np.full(len(one), level) for one, level in zip(sets, levels, strict=True)]
        if len(sets):
            gates = np.stack([self.evaluator.gates(one, how) for one, how in zip(sets, strengths, strict=True)])
            margins[:, rows] = self.evaluator.margins(gates, rows, constants=constants)
        return margins, strengths

    def _pays(self, new: EvaluatedSet, old: EvaluatedSet) -> bool:
        """Say whether a set is better by more than a standard error of the difference over examples."""
        gain = self.cost(old.outcome) - self.cost(new.outcome)
        if gain <= 0:
            return False
        scale = self.objective.scales
        parts = self.objective.weights * (np.tanh(new.margins / scale / 2) - np.tanh(old.margins / scale / 2)) / 2
        return gain > self.objective.error(parts)

    def _flips(self, now: EvaluatedSet, candidates: np.ndarray, rows: np.ndarray) -> list[int]:
        """Return the components that pay most to add and those to drop, by mask gradients at the present set."""
        few = rows[np.linspace(0, len(rows) - 1, min(len(rows), 256)).round().astype(int)]
        gates = self.evaluator.gates(now.ablated, now.strengths)
        _, slopes = self.evaluator.slopes(gates, few, constants=now.constants)
        scales, weights = self.objective.scales[few], self.objective.weights[few]
        level = now.strengths.mean() if len(now.ablated) else 1.0
        steps = np.where(gates == 1, -level, 1 - gates)
        moved = now.margins[few, None] + slopes * steps  # (examples, components), by first order
        values = weights @ np.tanh(moved / scales[:, None] / 2)
        additions = np.setdiff1d(candidates, now.ablated) if len(now.ablated) < self._budget else candidates[:0]
        return [
            int(i)
            for side in (additions, np.array(now.ablated, dtype=np.int64))
            for i in side[np.argsort(values[side], kind="stable")[:FLIPS]]
        ]

    def _screen(self) -> np.ndarray:
        """Return the examples that distinguish sets best: targets, and references with small margins at present."""
        targets, references = SCREEN
        if self.n_boundary_references is not None:
            references = min(references, max(self.n_boundary_references // 4, 1))
        return self._boundary(np.minimum(self.leading.margins, self.objective.base), targets, references)

    def _boundary(self, margins: np.ndarray, targets: int, references: int | None) -> np.ndarray:
        """Return the first targets and, of all references, those with the smallest margins."""
        others = self.objective.references
        nearest = others[np.argsort(margins[others], kind="stable")[:references]]
        return np.sort(np.concatenate([self.objective.targets[:targets], nearest]))


def checked_search(search: Search, exact_evaluator: GatedEvaluator, found: np.ndarray) -> Search:
    """Evaluate the best sets in float32 on all examples, until one holds there too: within the bound, and of use.

    Where none of the first few does, or only one that leaves more targets unmet, the search goes on there from the set
    that is nearest to it.

    Args:
        search: The search that ended.
        exact_evaluator: Evaluates in float32.
        found: The candidates of the search, which goes on among them.
    """
    if search.evaluator is exact_evaluator and search.n_boundary_references is None:
        return search
    exact = Search(exact_evaluator, search.objective, search.budget, minimal_strength=search.minimal_strength)
    within = [one for one in search.evaluated if one.outcome.excess == 0 and one.ablated]
    promising = sorted(within, key=lambda one: one.outcome.value)
    _evaluate_until_one_holds(exact, promising[:FIRST_CHECKED])
    unmet_here, unmet_there = (search.objective.unmet_fraction(one.best.outcome) for one in (exact, search))
    if within and len(found) and (not exact.best.ablated or unmet_here > unmet_there + MAX_UNMET):
        exact.take_over(search)
        exact.improve(found)
    _evaluate_until_one_holds(exact, promising[FIRST_CHECKED:])
    return exact


def _evaluate_until_one_holds(exact: Search, sets: Sequence[EvaluatedSet]) -> None:
    for one in sets:
        if exact.best.ablated:
            return
        exact.evaluate([one.ablated], one.constants, None if exact.minimal_strength else [one.strengths])


def _flipped(ablated: tuple[int, ...], flips: Sequence[int]) -> tuple[int, ...]:
    """Return the set without those flips that are in it and with the others."""
    return (*(i for i in ablated if i not in flips), *(i for i in flips if i not in ablated))
