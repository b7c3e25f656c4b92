"""The choice of components for a goal, tried out on examples: verified, or along the published ranking."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

import numpy as np
from torch import nn

from coar.attributions import Attributions
from coar.editing.context import SelectionContext, columns, widened
from coar.editing.edit import Edit, check_budget, edit_of
from coar.editing.evaluator import GatedEvaluator
from coar.editing.goal import EditGoal
from coar.editing.objective import Bound, Objective, Outcome, TradeOff
from coar.editing.rank import candidates, ranking, welch_t
from coar.editing.search import MAX_UNMET, EvaluatedSet, Search
from coar.editing.train import CLOSED_GATE_COST, GATES, STRENGTHS, train_gates, train_strengths
from coar.errors import BoundError, GoalError, SettingsError
from coar.examples import Examples
from coar.forward.execution_plan import Precision
from coar.forward.malloc import memory_kept
from coar.outputs.base import Output
from coar.progress import progress_bar
from coar.renamed import refuse_arguments, refuse_value

if TYPE_CHECKING:
    import pandas as pd

STAGES = ((160, 40, 1.0), (1_000, 320, 0.1))  # candidates, components, and the cost of each next to the usual one
FEW = 3  # sets of trials that even a short search takes
HOPEFUL = 8  # of the best sets are tried in float32 and on all examples, before the search goes on there
CARES = (1.0, 3.0, 10.0, 30.0)  # how much more harm weighs, until what is faded keeps within the bound
PARTS = (1.0, 0.85, 0.7, 0.5, 0.3)  # of trained strengths that are tried
CHOICES = {
    "rule": ("verified", "welch"),
    "constants": ("goal", "run"),
    "strength": ("full", "minimal", "per_component"),
}
Rule = Literal["verified", "welch"]
Constants = Literal["goal", "run"]
Strength = Literal["full", "minimal", "per_component"]


@dataclass(frozen=True)
class Selection:
    """A choice of components, and what it was made by.

    Attributes:
        edit: The edit.
        before: What the choosing examples were like.
        after: What they are like with the edit.
        steps: Every set that was tried on all choosing examples, in that order: number of components, trade-off,
            accuracy of targets, accuracy lost by references on average and in the worst group, and whether the set
            keeps within the bound.
        constants: `goal` where the edit has constants that were made for the goal, `run` where it has those of the run.
        passes: Forward passes of one example that the choice took; a forward and backward pass counts as three, and a
            pass of which the start was shared with others counts in full.
        examples: How many examples it was made on.
    """

    edit: Edit
    before: Outcome
    after: Outcome
    steps: "pd.DataFrame"
    constants: Constants
    passes: int
    examples: int


class SelectionOptions(TypedDict, total=False):
    """How to choose.

    Attributes:
        budget: The most components to ablate; by default as many as the trade-off asks for, 320 at most; 1,000
            with strengths of their own, and 40 by the rule `welch`.
        rule: `verified` or `welch`.
        constants: `goal` to train what the components become for the goal, by the rule `verified`, and keep that where
            it is better; `run` for the constants of the attributions' run.
        strength: `full` to ablate, `minimal` to move components towards their constants only as far as it takes to get
            as many targets as wanted as full ablations do, `per_component` to train for each, by the rule `verified`,
            how far it moves, together with its constants, instead of a search.
        tradeoff: How gain and harm are weighed.
        bound: The most accuracy that references may lose on the choosing examples.
        seed: Which examples the mask gradients draw.
        steps: How many mask gradients move the gates, by default 120, and 300 for strengths of their own.
        near: On how many references, those nearest to the edge, sets are tried before the choice is checked on all.
        progress: Show a progress bar with the trade-off so far.
    """

    budget: int | None
    rule: Rule
    constants: Constants
    strength: Strength
    tradeoff: TradeOff | None
    bound: Bound | None
    seed: int
    steps: int
    n_boundary_references: int | None
    progress: bool


def select(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    goal: EditGoal,
    *,
    choosing: Examples | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    output: Output | None = None,
    **options: Unpack[SelectionOptions],
) -> Selection:
    """Choose components by what their ablation really does to examples, within a bound on harm.

    `verified` takes the components that attributions find promising, moves gates on all of them at once down the slope
    of the trade-off by mask gradients around the partly edited model, tries the sets that this leads to, and goes on
    from the best by adding and dropping components and by training what they become, each step tried out. Where that
    leaves more than a tenth of the targets unchanged, it starts again with more candidates, each of which costs less.
    With strengths of their own it trains how far all of them go instead, and their constants. `welch` tries the first
    components of the published ranking (Shah et al. 2024, section 5) in different numbers. Of all that was tried on all
    choosing examples, what has the best trade-off within the bound is taken.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples.
        goal: Targets, references and direction.
        choosing: Further examples to choose on; they need no attributions.
        device: Where to compute.
        precision: Precision of the search; the choice itself is checked in float32.
        output: The margin that says what is right, such as `TokenMargin(reduction="last")` for a language model; by
            default that of classes.
        options: Any of `SelectionOptions`: budget, rule, constants, strength, tradeoff, bound, seed, steps, near,
            progress.

    Raises:
        GoalError: When the goal does not fit the examples, or is reached already.
        BoundError: When nothing within the bound comes nearer to the goal.
        OutputError: When the output is no margin, or does not fit the model.
        SettingsError: When the budget is out of range or there is no such rule, constants or strength.
    """
    _check_options(options, len(attributions.components))
    welch_t(attributions, goal)  # refuses a goal that does not fit before anything is run
    ground = SelectionContext.of(
        attributions, model, studied, choosing=choosing, device=device, precision=precision, output=output
    )
    return replace(choose(ground, goal, **options), passes=ground.passes)


@memory_kept()
def choose(ground: SelectionContext, goal: EditGoal, **options: Unpack[SelectionOptions]) -> Selection:
    """Choose components for a goal as `select` does, on examples that are there already."""
    attributions, spent = ground.attributions, ground.passes
    budget = _check_options(options, len(attributions.components))
    scores = welch_t(attributions, goal)
    objective = Objective.of(
        widened(goal, attributions, len(ground.examples)),
        columns(ground.examples),
        ground.base,
        tradeoff=options.get("tradeoff") or TradeOff(),
        bound=options.get("bound") or Bound(),
    )
    _check_open(objective, goal)
    strength = options.get("strength", "full")
    trials = ground.plain if strength == "per_component" else ground.trials  # few are tried then, so all in float32
    search = Search(
        trials,
        objective,
        budget,
        n_boundary_references=options.get("n_boundary_references"),
        least=strength == "minimal",
    )
    steps, free = (
        options.get("steps", (STRENGTHS if strength == "per_component" else GATES).steps),
        np.zeros(0, dtype=np.int64),
    )
    if options.get("rule", "verified") == "welch":
        search.follow(ranking(scores, goal))
    else:
        with _telling(search, steps, shown=options.get("progress", True)):
            seed, tailored = options.get("seed", 0), options.get("constants", "goal") == "goal"
            if strength == "per_component":
                _fade(search, ground, goal, steps=steps, seed=seed, tailored=tailored)
            else:
                free = _explore(search, goal, attributions, steps=steps, seed=seed, tailored=tailored)
    exact = _confirmed(search, ground.plain, free)
    best = exact.best
    _check_neared(exact if len(exact.tried) > 1 else search, best, goal)
    edit = edit_of(attributions, goal, best.ablated, scores, constants=best.constants, strengths=best.strengths)
    passes = ground.passes - spent
    usual = np.array_equal(best.constants, ground.plain.constants)
    return Selection(
        edit=edit.keep(ground.model),
        before=search.tried[0].outcome,
        after=best.outcome,
        steps=_steps(search),
        constants="run" if usual else "goal",
        passes=passes,
        examples=len(ground.examples),
    )


def _explore(
    search: Search, goal: EditGoal, attributions: Attributions, *, steps: int, seed: int, tailored: bool
) -> np.ndarray:
    """Search among few candidates, and among more where these do not bring the targets where they shall be.

    Return the candidates, the more where there were two searches.
    """
    budget, free = search.budget, np.zeros(0, dtype=np.int64)
    for count, most, share in STAGES:
        search.start_again(min(most, budget))
        free = np.sort(candidates(attributions, goal, count))
        gates = train_gates(
            search.trials,
            search.objective,
            free,
            budget=search.budget,
            steps=steps,
            cost=share * CLOSED_GATE_COST,
            seed=seed,
            on_step=search.on_step,
        )
        closed = np.argsort(gates, kind="stable")[: int((gates < 0.9).sum())]
        search.follow(closed, least=int((gates < 0.3).sum()))
        search.improve(free, seed=seed if tailored else None)
        if search.objective.unmet_fraction(search.best.outcome) <= MAX_UNMET or budget <= most:
            break
    return free


def _fade(search: Search, ground: SelectionContext, goal: EditGoal, *, steps: int, seed: int, tailored: bool) -> None:
    """Train strengths, and try them and parts of them; again with more care for harm while they break the bound."""
    free = np.sort(candidates(ground.attributions, goal, STAGES[-1][0]))
    faded = partial(
        train_strengths, ground.trials, steps=steps, seed=seed, with_constants=tailored, on_step=search.on_step
    )
    for harm_weight in CARES:
        objective = search.objective.with_harm_weight(harm_weight)
        gates, constants = faded(objective, free)
        if (gates < 1).sum() > search.budget:  # without the others, those that may move must do their part
            gates, constants = faded(objective, np.sort(np.argsort(gates, kind="stable")[: search.budget]))
        order = np.argsort(gates, kind="stable")[: int((gates < 1).sum())]
        sets = [tuple(order.tolist())] * len(PARTS)
        whole, *_ = search.try_out(sets, constants, [part * (1 - gates[order]) for part in PARTS])
        if whole.outcome.excess == 0:
            return


def _check_options(options: SelectionOptions, components: int) -> int:
    """Return the most components to ablate; raise `SettingsError` for options out of range or unknown."""
    refuse_arguments("select", options)
    refuse_value("strength", options.get("strength"))
    rule, budget = options.get("rule", "verified"), options.get("budget")
    for name, known in CHOICES.items():
        if (given := options.get(name, known[0])) not in known:
            raise SettingsError(f"unknown {name} {given!r}; choose {', '.join(known[:-1])} or {known[-1]}")
    if rule == "welch" and options.get("strength") == "per_component":
        raise SettingsError("strengths of their own are trained by the rule verified; choose that, or full or minimal")
    most = STAGES[0][1] if rule == "welch" else STAGES[-1][1]
    if options.get("strength") == "per_component":
        most = STAGES[-1][0]
    return min(most, components) if budget is None else check_budget(budget, components)


@contextmanager
def _telling(search: Search, steps: int, *, shown: bool) -> Iterator[None]:
    """Show a bar that moves with every mask gradient and every set of trials, with the trade-off so far.

    How many rounds will pay is not known before, so the end moves on where there are more than a few.
    """
    with progress_bar(shown=shown, total=steps + FEW, desc="select", unit="step") as bar:

        def on_step() -> None:
            bar.update()
            bar.total = max(bar.total or 0, bar.n + 1)
            best = search.best
            bar.set_postfix(components=len(best.ablated), trade_off=f"{best.outcome.value:.4f}", refresh=False)

        search.on_step = on_step
        yield


def _check_open(objective: Objective, goal: EditGoal) -> None:
    """Raise `GoalError` when nothing is left to be done."""
    right = (objective.base[objective.targets] > 0).mean()
    if right == (0.0 if goal.direction == "decrease" else 1.0):
        state = "wrong" if goal.direction == "decrease" else "right"
        raise GoalError(
            f"the model gets all {len(objective.targets)} targets {state} already; there is nothing to edit, choose "
            f"other targets"
        )


def _confirmed(search: Search, plain: GatedEvaluator, free: np.ndarray) -> Search:
    """Try the best sets by float32 and on all examples, until one holds there too: within the bound, and of use.

    Where none of a few does, or only one that leaves more targets unchanged, the search goes on there from the one that
    is nearest to it.
    """
    if search.trials is plain and search.n_boundary_references is None:
        return search
    exact = Search(plain, search.objective, search.budget, least=search.least)
    within = [one for one in search.tried if one.outcome.excess == 0 and one.ablated]
    hopeful = sorted(within, key=lambda one: one.outcome.value)
    _try_until_one_holds(exact, hopeful[:HOPEFUL])
    left, aimed = (search.objective.unmet_fraction(one.best.outcome) for one in (exact, search))
    if within and len(free) and (not exact.best.ablated or left > aimed + MAX_UNMET):
        exact.since, exact.penalty = 1, search.penalty
        exact.improve(free)
    _try_until_one_holds(exact, hopeful[HOPEFUL:])
    return exact


def _try_until_one_holds(exact: Search, sets: list[EvaluatedSet]) -> None:
    for one in sets:
        if exact.best.ablated:
            return
        exact.try_out([one.ablated], one.constants, None if exact.least else [one.strengths])


def _check_neared(search: Search, best: EvaluatedSet, goal: EditGoal) -> None:
    """Raise `BoundError` when nothing within the bound is better than to leave the model as it is."""
    if best.ablated:
        return
    bound = search.objective.bound
    least = min(search.tried[1:] or search.tried, key=lambda one: search.cost(one.outcome))
    raise BoundError(
        f"no set of components was found that would {goal.direction} the targets' outputs within the bound, "
        f"{bound.mean:.1%} lost on average and {bound.group:.1%} in any group. The best found brings accuracy on "
        f"targets from {search.tried[0].outcome.targets:.1%} to {least.outcome.targets:.1%}, and loses "
        f"{least.outcome.lost:.1%} on average and {least.outcome.worst:.1%} in the worst group: widen the bound, or "
        f"give more choosing examples"
    )


def _steps(search: Search) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(
        {
            "components": len(one.ablated),
            "trade_off": one.outcome.value,
            "targets": one.outcome.targets,
            "lost": one.outcome.lost,
            "worst_lost": one.outcome.worst,
            "within": one.outcome.excess == 0,
        }
        for one in search.tried
    )
