"""The choice of components for a goal: by attributions alone, or evaluated on examples within a bound on harm."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, get_args

import numpy as np
from pydantic import Field, field_validator, model_validator
from torch import nn

from coar.attributions import Attributions, attribution_moments, mean_standard_errors
from coar.editing.edit import Edit, check_budget, edit_of
from coar.editing.evaluate import SelectionContext, columns, for_all_examples
from coar.editing.goal import Bound, EditGoal, Objective, Outcome, TradeOff
from coar.editing.predict import best_predicted_set
from coar.editing.search import MAX_UNMET, EvaluatedSet, Search, checked_search
from coar.editing.train import CLOSED_GATE_COST, GATES, STRENGTHS, train_gates, train_strengths
from coar.errors import BoundError, GoalError, SettingsError
from coar.examples import Examples
from coar.forward.execution_plan import Precision
from coar.forward.malloc import memory_kept
from coar.outputs.base import Output
from coar.progress import progress_bar
from coar.renamed import no_attribute, refuse_arguments, refuse_value
from coar.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

RuleName = Literal["verified", "welch", "predicted"]
ConstantsName = Literal["goal", "run"]
StrengthName = Literal["full", "minimal", "per_component"]
CHOICES = {"rule": get_args(RuleName), "constants": get_args(ConstantsName), "strength": get_args(StrengthName)}


class Stage(NamedTuple):
    """One stage of a search: number of candidates, most components, and what a closed gate costs in usual costs."""

    candidates: int
    budget: int
    cost: float


STAGES = (Stage(160, 40, 1.0), Stage(1_000, 320, 0.1))
HARM_WEIGHTS = (1.0, 3.0, 10.0, 30.0)  # of references while strengths are trained, until the bound is kept
STRENGTH_FRACTIONS = (1.0, 0.85, 0.7, 0.5, 0.3)  # of trained strengths that are evaluated
SHORT_SEARCH = 3  # evaluations that even a short search takes, for the progress bar


class SelectionOptions(Settings):
    """How components are chosen.

    Attributes:
        rule: `verified` to search among sets of components by evaluating them on examples, `welch` for the published
            ranking, `predicted` for the set with the best predicted effect.
        budget: The most components to ablate. By default the trade-off decides, up to 320 components, 1,000 with
            strengths per component, and 40 by the rules `welch` and `predicted`.
        constants: By the rule `verified`, `goal` to train constants for the goal, and keep them where they are better;
            `run` for the constants of the attributions' run.
        strength: `full` to ablate components; `minimal` for the smallest strength at which as many targets change as
            under full ablation; `per_component` to train a strength for each component, together with its constants,
            instead of a search, by the rule `verified`.
        tradeoff: How gain and harm are weighed.
        bound: The most accuracy that references may lose on the choosing examples.
        max_loss: By the rule `predicted`, the most that the mean output of any group of references may fall by
            prediction, in units of the output.
        seed: Seed of the draws of examples for training.
        steps: Number of training steps of gates or strengths, by default 120 for gates and 300 for strengths.
        n_boundary_references: Evaluate sets on only so many references, those with the smallest margins, before the
            choice is checked on all; by default all.
        progress: Show a progress bar with the trade-off so far.
    """

    rule: RuleName = "verified"
    budget: int | None = None
    constants: ConstantsName = "goal"
    strength: StrengthName = "full"
    tradeoff: TradeOff = TradeOff()
    bound: Bound = Bound()
    max_loss: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)
    steps: int | None = Field(default=None, ge=1)
    n_boundary_references: int | None = Field(default=None, ge=1)
    progress: bool = True

    def __init__(self, **settings: Any) -> None:
        refuse_arguments("select", settings)
        super().__init__(**settings)

    @field_validator("rule", "constants", "strength", mode="before")
    @classmethod
    def _known(cls, value: Any, info: Any) -> Any:
        known = CHOICES[info.field_name]
        refuse_value(info.field_name, value)
        if value not in known:
            raise ValueError(f"unknown {info.field_name} {value!r}; choose {', '.join(known[:-1])} or {known[-1]}")
        return value

    @model_validator(mode="after")
    def _trained_by_search_only(self) -> Self:
        if self.strength == "per_component" and self.rule != "verified":
            raise ValueError(
                f"strength 'per_component' is trained by the rule 'verified', and the rule {self.rule!r} was given; "
                f"choose that rule, or strength 'full' or 'minimal'"
            )
        return self

    def updated(self, **changes: Any) -> Self:
        """Return these options with others for those named."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **changes})


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
    where: dict[str, Any] = {"choosing": choosing, "device": device, "precision": precision, "output": output}
    return select_by(SelectionOptions(**options), attributions, model, studied, goal, **where)


def select_by(
    options: SelectionOptions,
    attributions: Attributions,
    model: nn.Module,
    studied: Examples,
    goal: EditGoal,
    *,
    choosing: Examples | None,
    device: str,
    precision: Precision,
    output: Output | None,
) -> Selection:
    """Choose components by options; for the other arguments and errors see `select`."""
    check = GoalContext(attributions, goal)
    check.budget(options)
    _ = check.scores  # refuses a goal that does not fit before anything is run
    context = SelectionContext.of(
        attributions, model, studied, choosing=choosing, device=device, precision=precision, output=output
    )
    return replace(select_in(context, goal, options), passes=context.passes)


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


def welch_t(attributions: Attributions, goal: EditGoal) -> np.ndarray:
    """Return (components,) t statistics of the targets' attributions against the references' (COAR-Edit).

    This is Welch's t, (mean_T - mean_R) / sqrt(var_T / n_T + var_R / n_R), as published (Shah et al. 2024, section 5),
    or the t of the differences where the goal has pairs. A single target has no variance; its share of the standard
    error is taken as zero, so the score is its distance from the references' mean in standard errors of that mean.

    Raises:
        GoalError: When there are fewer than two references.
    """
    targets, references = goal.resolve(attributions.metadata)
    if len(references) < 2:
        raise GoalError("there is one reference, and a variance needs two; give two or more references")
    if goal.pairs is not None:
        mean, variance = attribution_moments(attributions, targets, references[: len(targets)])
        difference, error = mean, np.sqrt(variance / len(targets))
    else:
        (mean, variance), (other_mean, other_variance) = (
            attribution_moments(attributions, rows) for rows in (targets, references)
        )
        difference = mean - other_mean
        error = np.sqrt(variance / len(targets) + other_variance / len(references))
    return difference / np.maximum(error, np.finfo(np.float64).tiny)


def ranking(scores: np.ndarray, goal: EditGoal) -> np.ndarray:
    """Return component indices, the first to ablate first: largest t to decrease an output, smallest to increase it."""
    return np.argsort(-scores if goal.direction == "decrease" else scores, kind="stable")


def candidates(attributions: Attributions, goal: EditGoal, count: int) -> np.ndarray:
    """Return about `count` components worth a search, the best first.

    They are taken in turn from three rankings: by t, which finds components specific to the targets; by the targets'
    mean attribution less its noise, which finds strong components; and by the difference of means less its noise. Noise
    is the mean standard error of the fit's weights, where it has any.
    """
    if count >= len(attributions.components):
        return ranking(welch_t(attributions, goal), goal)
    targets, references = goal.resolve(attributions.metadata)
    sign = 1.0 if goal.direction == "decrease" else -1.0
    mean = sign * attribution_moments(attributions, targets)[0]
    difference = mean - sign * attribution_moments(attributions, references)[0]
    error = mean_standard_errors(attributions, targets)
    orders = (ranking(welch_t(attributions, goal), goal), np.argsort(error - mean), np.argsort(error - difference))
    in_turn = np.stack(orders, axis=1).ravel()
    _, first = np.unique(in_turn, return_index=True)
    return in_turn[np.sort(first)[:count]]


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
    budget, order = context.budget(options), ranking(context.scores, context.goal)
    return best_predicted_set(context.attributions, context.goal, order, budget=budget, max_loss=options.max_loss)


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
