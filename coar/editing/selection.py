"""The choice of components for a goal, tried out on examples: verified, or along the published ranking."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import nn

from coar.attributions import Attributions
from coar.editing.choosing import choosing_examples, columns
from coar.editing.descent import STEPS, descend
from coar.editing.edits import Edit, check_budget, edit_of
from coar.editing.goals import EditGoal
from coar.editing.ranking import candidates, ranking, welch_t
from coar.editing.search import ROUNDS, Search, Tried
from coar.editing.tradeoff import Bound, Objective, Outcome, TradeOff
from coar.editing.trials import Trials
from coar.errors import GoalError, SettingsError
from coar.examples import Examples
from coar.progress import progress_bar
from coar.worker import Precision

if TYPE_CHECKING:
    import pandas as pd

CANDIDATES = 160  # components that a verified search considers
MOST = 40  # components that are tried without a budget
Rule = Literal["verified", "welch"]


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
        passes: Forward passes of one example that the choice took; a forward and backward pass counts as three.
        examples: How many examples it was made on.
    """

    edit: Edit
    before: Outcome
    after: Outcome
    steps: "pd.DataFrame"
    passes: int
    examples: int


def select(
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    goal: EditGoal,
    *,
    choosing: Examples | None = None,
    budget: int | None = None,
    rule: Rule = "verified",
    tradeoff: TradeOff | None = None,
    bound: Bound | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    seed: int = 0,
    steps: int = STEPS,
    progress: bool = True,
) -> Selection:
    """Choose components by what their ablation really does to examples, within a bound on harm.

    `verified` takes the components that attributions find promising, moves gates on all of them at once down the slope
    of the trade-off by probes around the partly edited model, tries the sets that this leads to, and goes on from the
    best by adding and dropping components, each tried out. `welch` tries the first components of the published
    ranking (Shah et al. 2024, section 5) in different numbers. Of all sets tried on all choosing examples, the one
    with the best trade-off within the bound is taken.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples.
        goal: Targets, references and direction.
        choosing: Further examples to choose on; they need no attributions.
        budget: The most components to ablate; by default as many as the trade-off asks for, 40 at most.
        rule: `verified` or `welch`.
        tradeoff: How gain and harm are weighed.
        bound: The most accuracy that references may lose on the choosing examples.
        device: Where to compute.
        precision: Precision of the search; the choice itself is checked in float32.
        seed: Which examples the probes draw.
        steps: How many probes move the gates.
        progress: Show a progress bar with the trade-off so far.

    Raises:
        GoalError: When the goal does not fit the examples, is reached already, or cannot be neared within the bound.
        SettingsError: When the budget is out of range or there is no such rule.
    """
    d = len(attributions.components)
    most = min(MOST, d) if budget is None else check_budget(budget, d)
    if rule not in ("verified", "welch"):
        raise SettingsError(f"unknown rule {rule!r}; choose verified or welch")
    scores = welch_t(attributions, goal)
    examples, wide = choosing_examples(attributions, goal, studied, choosing)
    plain = Trials(attributions, model, examples, device=device)
    base = plain.margins(plain.mask([])[None])[0]
    objective = Objective.of(wide, columns(examples), base, tradeoff=tradeoff or TradeOff(), bound=bound or Bound())
    _check_open(objective, goal)
    trials = (
        plain if precision == "float32" else Trials(attributions, model, examples, device=device, precision=precision)
    )
    search = Search(trials, objective, most)
    with _telling(search, steps, shown=progress and rule == "verified") as told:
        if rule == "welch":
            search.follow(ranking(scores, goal))
        else:
            free = np.sort(candidates(attributions, goal, CANDIDATES))
            gates = descend(trials, objective, free, budget=most, steps=steps, seed=seed, told=told)
            closed = np.argsort(gates, kind="stable")[: int((gates < 0.9).sum())]
            search.follow(closed, least=int((gates < 0.3).sum()))
            search.refine(free)
    best = _confirmed(search, plain)
    _check_neared(search, best, goal)
    edit = edit_of(attributions, goal, best.ablated, scores)
    passes = trials.passes + (plain.passes if plain is not trials else 0)
    return Selection(edit.keep(model), search.tried[0].outcome, best.outcome, _steps(search), passes, len(examples))


@contextmanager
def _telling(search: Search, steps: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """Show a bar that moves with every probe and every set of trials, with the trade-off so far."""
    with progress_bar(shown=shown, total=steps + ROUNDS + 1, desc="select", unit="step") as bar:

        def told() -> None:
            bar.update()
            best = search.best
            bar.set_postfix(components=len(best.ablated), trade_off=f"{best.outcome.value:.4f}", refresh=False)

        search.told = told
        yield told


def _check_open(objective: Objective, goal: EditGoal) -> None:
    """Raise `GoalError` when nothing is left to be done."""
    right = (objective.base[objective.targets] > 0).mean()
    if right == (0.0 if goal.direction == "decrease" else 1.0):
        state = "wrong" if goal.direction == "decrease" else "right"
        raise GoalError(
            f"the model gets all {len(objective.targets)} targets {state} already; there is nothing to edit, choose "
            f"other targets"
        )


def _confirmed(search: Search, plain: Trials) -> Tried:
    """Return the best set within the bound by float32, whatever the search was done in."""
    if search.trials is plain:
        return search.best
    exact = Search(plain, search.objective, search.budget)
    within = [one for one in search.tried if one.outcome.excess == 0 and one.ablated]
    for one in sorted(within, key=lambda one: one.outcome.value):
        (found,) = exact.try_out([one.ablated])
        if found.outcome.excess == 0:
            break
    return exact.best


def _check_neared(search: Search, best: Tried, goal: EditGoal) -> None:
    """Raise `GoalError` when nothing within the bound is better than to leave the model as it is."""
    if best.ablated:
        return
    bound = search.objective.bound
    least = min(search.tried[1:] or search.tried, key=lambda one: search.cost(one.outcome))
    raise GoalError(
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
