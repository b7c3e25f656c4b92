"""The choice of components for a goal: by attributions alone, or evaluated on examples within a bound on harm."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from coar.attributions import Attributions
from coar.editing.context import SelectionContext
from coar.editing.edit import Edit, edit_of
from coar.editing.goal import EditGoal
from coar.editing.objective import Outcome
from coar.editing.options import ConstantsName, RuleName, SelectionOptions
from coar.editing.rules import ORDERINGS, RULES, EvaluationContext, GoalContext
from coar.editing.search import EvaluatedSet
from coar.errors import SettingsError
from coar.examples import Examples
from coar.forward.execution_plan import Precision
from coar.forward.malloc import memory_kept
from coar.outputs.base import Output
from coar.renamed import no_attribute

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Selection:
    """A choice of components that was evaluated on examples.

    Attributes:
        edit: The edit.
        before: What the choosing examples were like.
        after: What they are like with the edit.
        evaluated: Every set evaluated on all choosing examples, in that order: number of components, trade-off,
            accuracy of targets, accuracy lost by references on average and in the worst group, and whether the set
            is within the bound.
        constants: `goal` where the edit has constants trained for the goal, `run` where it has those of the run.
        passes: Forward passes of one example that the choice took. A forward and backward pass counts as three, and a
            pass whose prefix was cached counts in full.
        examples: Number of choosing examples.
    """

    edit: Edit
    before: Outcome
    after: Outcome
    evaluated: "pd.DataFrame"
    constants: ConstantsName
    passes: int
    examples: int

    if not TYPE_CHECKING:  # a type checker knows the attributes

        def __getattr__(self, name: str) -> Any:
            raise no_attribute(self, name)


def edit(
    attributions: Attributions, goal: EditGoal, *, budget: int, rule: RuleName = "welch", max_loss: float = 0.5
) -> Edit:
    """Choose components by attributions alone, without the model.

    The rule `welch` ranks components by Welch's t between the targets' and the references' attributions, and takes as
    many as the budget (COAR-Edit, Shah et al. 2024, section 5). The rule `predicted` takes the set that changes the
    targets' mean output most by prediction, at most as many components as the budget, while no group of references
    loses more than `max_loss`; see `coar.editing.predict.best_predicted_set`.

    Args:
        attributions: The attributions of the examples that the goal names.
        goal: Targets, references and direction.
        budget: The most components to ablate.
        rule: `welch` or `predicted`.
        max_loss: By the rule `predicted`, the most that the mean output of any group of references may fall by
            prediction, in units of the output.

    Raises:
        GoalError: When the goal selects no targets, no or too few references, or overlapping ones; by the rule
            `predicted`, when no component is predicted to help within `max_loss`.
        EditError: When a component has no constant, as under resampling.
        SettingsError: When the budget is not between 1 and the number of components, or there is no such rule.
    """
    options, context = SelectionOptions(rule=rule, budget=budget, max_loss=max_loss), GoalContext(attributions, goal)
    if rule not in ORDERINGS:
        raise SettingsError(
            f"the rule {rule!r} evaluates sets of components on examples; call coar.select with the model and the "
            f"studied examples, or choose the rule 'welch' or 'predicted'"
        )
    return edit_of(attributions, goal, ORDERINGS[rule](context, options), context.scores)


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
    **options: Any,
) -> Selection:
    """Choose components by the measured effect of their ablation on examples, within a bound on harm.

    The rule `verified` takes the components that attributions find promising, trains gates on all of them together
    along the slope of the trade-off, evaluates the sets that this leads to, and goes on from the best by adding and
    dropping components and by training their constants, each step evaluated. Where that leaves more than a tenth of the
    targets unchanged, it starts again with more candidates, each of which costs less. With `strength="per_component"`
    it trains the strengths of all of them instead, and their constants. The rules `welch` and `predicted` evaluate
    first parts of an order that attributions alone give, see `edit`. Of all sets evaluated on all choosing examples the
    result is the one with the best trade-off within the bound.

    Args:
        attributions: Attributions of the studied examples.
        model: The model they were collected from.
        studied: The study's examples.
        goal: Targets, references and direction.
        choosing: Further examples to choose on; they need no attributions.
        device: Where to compute.
        precision: Precision of the search; the choice itself is checked in float32.
        output: The margin by which correctness is judged, such as `TokenMargin(reduction="last")` for a language model;
            by default that of classes.
        options: Fields of `SelectionOptions`.

    Raises:
        GoalError: When the goal does not fit the examples, or is reached already.
        BoundError: When no set within the bound comes nearer to the goal.
        OutputError: When the output is no margin, or does not fit the model.
        SettingsError: When an option is unknown or out of range.
    """
    chosen = SelectionOptions(**options)
    check = GoalContext(attributions, goal)
    check.budget(chosen)
    _ = check.scores  # refuses a goal that does not fit before anything is run
    context = SelectionContext.of(
        attributions, model, studied, choosing=choosing, device=device, precision=precision, output=output
    )
    return replace(select_in(context, goal, chosen), passes=context.passes)


@memory_kept()
def select_in(context: SelectionContext, goal: EditGoal, options: SelectionOptions) -> Selection:
    """Choose components as `select` does, on examples that several goals share."""
    attributions, passes = context.attributions, context.passes
    goal_context = EvaluationContext(attributions, goal, context)
    choice = RULES[options.rule](goal_context, options)
    best, scores = choice.best, goal_context.scores
    edit = edit_of(attributions, goal, best.ablated, scores, constants=best.constants, strengths=best.strengths)
    return Selection(
        edit=edit.keep(context.model),
        before=choice.evaluated[0].outcome,
        after=best.outcome,
        evaluated=_table(choice.evaluated),
        constants="run" if np.array_equal(best.constants, context.exact.constants) else "goal",
        passes=context.passes - passes,
        examples=len(context.examples),
    )


def _table(sets: tuple[EvaluatedSet, ...]) -> "pd.DataFrame":
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
        for one in sets
    )
