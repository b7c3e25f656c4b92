"""Rules that choose components for a goal, in one table: by attributions alone, or by evaluating sets on examples."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from coar.attributions import Attributions
from coar.editing.context import SelectionContext, columns, for_all_examples
from coar.editing.edit import check_budget
from coar.editing.evaluator import GatedEvaluator
from coar.editing.goal import EditGoal
from coar.editing.objective import Objective
from coar.editing.options import SelectionOptions
from coar.editing.predict import best_predicted_set
from coar.editing.rank import candidates, ranking, welch_t
from coar.editing.search import MAX_UNMET, EvaluatedSet, Search
from coar.editing.train import CLOSED_GATE_COST, GATES, STRENGTHS, train_gates, train_strengths
from coar.errors import BoundError, GoalError
from coar.progress import progress_bar


class Stage(NamedTuple):
    """One stage of a search: number of candidates, most components, and what a closed gate costs in usual costs."""

    candidates: int
    budget: int
    cost: float


STAGES = (Stage(160, 40, 1.0), Stage(1_000, 320, 0.1))
FIRST_CHECKED = 8  # of the best sets are evaluated in float32 on all examples before the search goes on there
HARM_WEIGHTS = (1.0, 3.0, 10.0, 30.0)  # of references while strengths are trained, until the bound is kept
STRENGTH_FRACTIONS = (1.0, 0.85, 0.7, 0.5, 0.3)  # of trained strengths that are evaluated
SHORT_SEARCH = 3  # evaluations that even a short search takes, for the progress bar


@dataclass(frozen=True)
class GoalContext:
    """What a choice by attributions alone is made from.

    Attributes:
        attributions: Attributions of the studied examples.
        goal: Targets, references and direction.
    """

    attributions: Attributions
    goal: EditGoal

    @cached_property
    def scores(self) -> np.ndarray:
        """(components,) t statistics; `GoalError` for a goal that does not fit the attributions."""
        return welch_t(self.attributions, self.goal)

    def budget(self, options: SelectionOptions) -> int:
        """Return the most components to ablate; raise `SettingsError` for a budget out of range."""
        components = len(self.attributions.components)
        if options.budget is not None:
            return check_budget(options.budget, components)
        if options.rule != "verified":
            return min(STAGES[0].budget, components)
        last = STAGES[-1]
        return min(last.candidates if options.strength == "per_component" else last.budget, components)


@dataclass(frozen=True)
class EvaluationContext(GoalContext):
    """What a choice by evaluation on examples is made from.

    Attributes:
        shared: The choosing examples with their evaluators.
    """

    shared: SelectionContext


@dataclass(frozen=True)
class Choice:
    """What a rule chose.

    Attributes:
        best: The chosen set, evaluated in float32 on all choosing examples.
        evaluated: All sets that the search evaluated, the first of them empty.
    """

    best: EvaluatedSet
    evaluated: tuple[EvaluatedSet, ...]


Ordering = Callable[[GoalContext, SelectionOptions], np.ndarray]
Rule = Callable[[EvaluationContext, SelectionOptions], Choice]


def order_by_t(context: GoalContext, options: SelectionOptions) -> np.ndarray:
    """Return the first components of the published ranking (COAR-Edit, Shah et al. 2024, section 5)."""
    return ranking(context.scores, context.goal)[: context.budget(options)]


def order_by_prediction(context: GoalContext, options: SelectionOptions) -> np.ndarray:
    """Return the set with the best predicted effect, see `best_predicted_set`."""
    budget = context.budget(options)
    return best_predicted_set(
        context.attributions, context.goal, context.scores, budget=budget, max_loss=options.max_loss
    )


ORDERINGS: dict[str, Ordering] = {"welch": order_by_t, "predicted": order_by_prediction}


def first_of(ordering: Ordering, context: EvaluationContext, options: SelectionOptions) -> Choice:
    """Choose the first components of an order, in the number that has the best trade-off."""
    order = ordering(context, options)
    with _search(context, options.updated(progress=False)) as search:
        search.evaluate_prefixes(order)
    return _checked(search, context, order[:0])


def verified(context: EvaluationContext, options: SelectionOptions) -> Choice:
    """Choose by a search among promising components, every set evaluated on examples."""
    with _search(context, options) as search:
        if options.strength == "per_component":
            _train_strengths(search, context, options)
            found: np.ndarray = np.zeros(0, dtype=np.int64)
        else:
            found = _search_in_stages(search, context, options)
    return _checked(search, context, found)


RULES: dict[str, Rule] = {"verified": verified}
RULES |= {name: partial(first_of, ordering) for name, ordering in ORDERINGS.items()}


@contextmanager
def _search(context: EvaluationContext, options: SelectionOptions) -> Iterator[Search]:
    """Begin a search, and show a bar that moves with every training step and every evaluation of sets.

    The number of rounds that pay is not known before, so the total grows where there are more than a few.
    """
    shared = context.shared
    objective = Objective.of(
        for_all_examples(context.goal, context.attributions, len(shared.examples)),
        columns(shared.examples),
        shared.base,
        tradeoff=options.tradeoff,
        bound=options.bound,
    )
    _check_unmet(objective, context.goal)
    with progress_bar(shown=options.progress, total=_steps(options) + SHORT_SEARCH, desc="select", unit="step") as bar:

        def on_step(best: EvaluatedSet) -> None:
            bar.update()
            bar.total = max(bar.total or 0, bar.n + 1)
            bar.set_postfix(components=len(best.ablated), trade_off=f"{best.outcome.value:.4f}", refresh=False)

        trained = options.strength == "per_component"
        yield Search(
            shared.exact if trained else shared.evaluator,  # few sets are evaluated then, so all in float32
            objective,
            context.budget(options),
            n_boundary_references=options.n_boundary_references,
            minimal_strength=options.strength == "minimal",
            on_step=on_step,
        )


def _steps(options: SelectionOptions) -> int:
    """Return the number of training steps."""
    usual = STRENGTHS if options.strength == "per_component" else GATES
    return options.steps or usual.steps


def _search_in_stages(search: Search, context: EvaluationContext, options: SelectionOptions) -> np.ndarray:
    """Search among few candidates, and among more where too many targets stay unmet; return the last candidates."""
    budget, found = search.budget, np.zeros(0, dtype=np.int64)
    for stage in STAGES:
        search.start_again(min(stage.budget, budget))
        found = np.sort(candidates(context.attributions, context.goal, stage.candidates))
        gates = train_gates(
            search.evaluator,
            search.objective,
            found,
            budget=search.budget,
            steps=_steps(options),
            cost=stage.cost * CLOSED_GATE_COST,
            seed=options.seed,
            on_step=search.report,
        )
        closed = np.argsort(gates, kind="stable")[: int((gates < 0.9).sum())]
        search.evaluate_prefixes(closed, at_least=int((gates < 0.3).sum()))
        search.improve(found, seed=options.seed if options.constants == "goal" else None)
        if search.objective.unmet_fraction(search.best.outcome) <= MAX_UNMET or budget <= stage.budget:
            break
    return found


def _train_strengths(search: Search, context: EvaluationContext, options: SelectionOptions) -> None:
    """Train strengths, and evaluate them and fractions of them; with more weight on harm until the bound is kept."""
    found = np.sort(candidates(context.attributions, context.goal, STAGES[-1].candidates))
    train = partial(
        train_strengths,
        search.evaluator,
        steps=_steps(options),
        seed=options.seed,
        with_constants=options.constants == "goal",
        on_step=search.report,
    )
    for weight in HARM_WEIGHTS:
        objective = search.objective.with_harm_weight(weight)
        gates, constants = train(objective, found)
        if (gates < 1).sum() > search.budget:  # the strongest are trained again without the others
            gates, constants = train(objective, np.sort(np.argsort(gates, kind="stable")[: search.budget]))
        order = np.argsort(gates, kind="stable")[: int((gates < 1).sum())]
        sets = [tuple(order.tolist())] * len(STRENGTH_FRACTIONS)
        strengths = [fraction * (1 - gates[order]) for fraction in STRENGTH_FRACTIONS]
        as_trained, *_ = search.evaluate(sets, constants, strengths)
        if as_trained.outcome.excess == 0:
            return


def _check_unmet(objective: Objective, goal: EditGoal) -> None:
    """Raise `GoalError` when all targets are as the goal requires already."""
    right = (objective.base[objective.targets] > 0).mean()
    if right == (0.0 if goal.direction == "decrease" else 1.0):
        state = "wrong" if goal.direction == "decrease" else "right"
        raise GoalError(
            f"the model gets all {len(objective.targets)} targets {state} already; there is nothing to edit, choose "
            f"other targets"
        )


def _checked(search: Search, context: EvaluationContext, found: np.ndarray) -> Choice:
    """Return the best set within the bound in float32 on all examples; raise `BoundError` where there is none."""
    exact = checked_search(search, context.shared.exact, found)
    if not exact.best.ablated:
        raise _nothing_within(exact if len(exact.evaluated) > 1 else search, context.goal)
    return Choice(exact.best, tuple(search.evaluated))


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


def _nothing_within(search: Search, goal: EditGoal) -> BoundError:
    """Return the error for a search that found nothing within the bound which is better than the model as it is."""
    bound = search.objective.bound
    nearest = min(search.evaluated[1:] or search.evaluated, key=lambda one: search.cost(one.outcome))
    return BoundError(
        f"no set of components was found that would {goal.direction} the targets' outputs within the bound, "
        f"{bound.mean:.1%} lost on average and {bound.group:.1%} in any group. The best found brings accuracy on "
        f"targets from {search.evaluated[0].outcome.targets:.1%} to {nearest.outcome.targets:.1%}, and loses "
        f"{nearest.outcome.lost:.1%} on average and {nearest.outcome.worst:.1%} in the worst group: widen the bound, "
        f"or give more choosing examples"
    )
