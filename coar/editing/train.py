"""Gates, constants and strengths of components, trained on the trade-off by one Adam loop, and minimal strengths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from coar.editing.evaluate import GatedEvaluator
from coar.editing.goal import Objective

BATCH = (48, 112)  # targets and references per step
DECAY = (0.8, 0.99)  # of Adam's running means of slopes and of their squares

CLOSED_GATE_COST = 0.002  # of each closed gate, in units of the trade-off, unless another cost is given
PUSH = 0.02  # towards open or closed at the last steps; nothing in the first quarter
CONSTANTS_PULL = 0.01  # towards the initial constants: slope of the trade-off per standard deviation away from them
STRENGTH_COST = 0.0003  # of strength, in units of the trade-off, so that components without effect stay as they are
STRENGTHS_PULL = 0.002  # as CONSTANTS_PULL, times the strength of the component
MIN_STRENGTH = 0.02  # smaller trained strengths are set to zero

CLEAR_MARGIN = 0.2  # beyond which a target counts as clearly changed, in units of the trade-off's scale
STRENGTH_ROUNDS = 6  # of regula falsi between a strength that is too small and one that suffices


@dataclass(frozen=True)
class Schedule:
    """How long to train, and how far each step goes.

    Attributes:
        steps: Number of steps, each a forward and a backward pass of a few examples.
        rate: Length of the first steps; it falls linearly to a tenth of that. Gates are in units of their range from 0
            to 1, constants in standard deviations of their channels.
        averaged: Share of the steps, the last ones, whose values are averaged; the last step alone where it is 0.
    """

    steps: int
    rate: float
    averaged: float


GATES = Schedule(steps=120, rate=0.05, averaged=0.0)
CONSTANTS = Schedule(steps=40, rate=0.2, averaged=0.5)
STRENGTHS = Schedule(steps=300, rate=0.05, averaged=0.25)


def train_gates(
    evaluator: GatedEvaluator,
    objective: Objective,
    candidates: np.ndarray,
    *,
    budget: int | None = None,
    steps: int = GATES.steps,
    cost: float = CLOSED_GATE_COST,
    seed: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Return (components,) gates, near 0 for components that an edit should ablate and 1 for those it should keep.

    Each step takes mask gradients of a few examples at the present gates, which give the slope of the trade-off for
    all components at once. Gates may have values between 0 and 1 on the way, so that components are tried together,
    dropped and taken back; the last steps push them to either end.

    Args:
        evaluator: Computes mask gradients.
        objective: The trade-off.
        candidates: Components whose gates may move.
        budget: The most gates that may be closed; closing a gate costs more while there are more.
        steps: Number of steps.
        cost: Cost of a closed gate, in units of the trade-off.
        seed: Seed of the draws of examples.
        on_step: Called after each step.
    """
    gates, present_cost = np.ones(evaluator.components), cost
    trained = _Variable(gates[candidates], low=0, high=1)

    def slopes(step: int, rows: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
        nonlocal present_cost
        gates[candidates] = trained.values
        margins, by_gate = evaluator.slopes(gates, rows)
        found = (shares * objective.slopes(margins, rows)) @ by_gate[:, candidates]
        push = PUSH * max(0.0, (step / steps - 0.25) / 0.75)
        if budget is not None and step > steps // 5:
            present_cost *= 1.05 if (trained.values < 0.5).sum() > budget else 0.98
            present_cost = max(present_cost, cost)
        return [found - present_cost + push * (1 - 2 * trained.values)]

    schedule, draw = replace(GATES, steps=steps), ExampleDraws(objective, seed)
    (gates[candidates],) = _train([trained], slopes, draw, schedule, on_step)
    return gates


def train_constants(
    evaluator: GatedEvaluator,
    objective: Objective,
    ablated: tuple[int, ...],
    *,
    start: np.ndarray,
    strengths: float | np.ndarray = 1.0,
    among: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Return the (components.width,) constants for which ablating these components has the best trade-off.

    This is optimal ablation (Li and Janson 2024) with the goal's trade-off in the place of the expected loss, and one
    set of ablated components in the place of random ones. Steps are in units of each channel's standard deviation. A
    pull draws constants back to their initial values. Experts of a mixture keep their constants, since weights without
    biases could not hold others.

    Args:
        evaluator: Computes gradients.
        objective: The trade-off.
        ablated: The components.
        start: (components.width,) initial constants; those of components that are kept do not change.
        strengths: How far the components go towards their constants, one number or one each.
        among: Examples that references are drawn from; by default all.
        seed: Seed of the draws of examples.
    """
    constants = _Constants(evaluator, ablated, start)
    if not len(constants.channels):
        return start.copy()
    gates = evaluator.gates(ablated, strengths)

    def slopes(_: int, rows: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
        def weights(margins: np.ndarray) -> np.ndarray:
            return np.asarray(shares * objective.slopes(margins, rows))

        by_constant, _by_gate = evaluator.weighted_gradients(gates, rows, constants=constants.present(), slopes=weights)
        return [constants.slopes(by_constant) + CONSTANTS_PULL * constants.moved.values]

    (moved,) = _train([constants.moved], slopes, ExampleDraws(objective, seed, among), CONSTANTS)
    return constants.at(moved)


def train_strengths(
    evaluator: GatedEvaluator,
    objective: Objective,
    candidates: np.ndarray,
    *,
    steps: int = STRENGTHS.steps,
    seed: int = 0,
    with_constants: bool = True,
    on_step: Callable[[], object] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the (components,) gates and (components.width,) constants that have the best trade-off together.

    Gates are 1 less the strengths, and stay between 0, ablated, and 1. Each step follows the gradients by all gates
    and constants at once. References count by how much margin they lose, and targets also by how far they are below
    their partners' margins, see `Objective.shortfall_slopes`. Experts of a mixture keep their constants, since weights
    without biases could not hold others.

    Args:
        evaluator: Computes gradients.
        objective: The trade-off.
        candidates: Components whose gates may move.
        steps: Number of steps.
        seed: Seed of the draws of examples.
        with_constants: Whether constants are trained too.
        on_step: Called after each step.
    """
    required = objective.required_margins(evaluator.smooth_margins())
    constants = _Constants(evaluator, candidates if with_constants else (), evaluator.constants)
    gates = np.ones(evaluator.components, dtype=np.float32)
    trained = _Variable(gates[candidates], low=0, high=1)

    def slopes(_: int, rows: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
        def weights(margins: np.ndarray) -> np.ndarray:
            return np.asarray(shares * objective.shortfall_slopes(margins, required[rows], rows))

        gates[candidates] = trained.values
        by_constant, by_gate = evaluator.weighted_gradients(gates, rows, constants=constants.present(), slopes=weights)
        pull = STRENGTHS_PULL * constants.moved.values * (1 - gates[constants.component])
        return [by_gate[candidates] - STRENGTH_COST, constants.slopes(by_constant) + pull]

    schedule, draw = replace(STRENGTHS, steps=steps), ExampleDraws(objective, seed)
    gates[candidates], moved = _train([trained, constants.moved], slopes, draw, schedule, on_step)
    gates[gates > 1 - MIN_STRENGTH] = 1
    return gates, constants.at(moved)


def minimal_strengths(
    evaluator: GatedEvaluator, objective: Objective, sets: Sequence[tuple[int, ...]], constants: np.ndarray
) -> np.ndarray:
    """Return the (sets,) smallest strengths at which sets of components change as many targets as full ablation does.

    Each of these targets must be changed by `CLEAR_MARGIN`. The strength is found between 0 and 1 by regula falsi (the
    Illinois rule), which assumes that the effect grows with the strength. The result is a strength that was tried and
    suffices, or 1 where full ablation changes no more targets than are changed already.

    Args:
        evaluator: Where strengths are tried, on targets alone.
        objective: The trade-off.
        sets: Components that are ablated together.
        constants: (components.width,) constants in their place.
    """
    if not sets:
        return np.ones(0)
    rows, scales = objective.targets, objective.scales[objective.targets]

    def levels_at(strengths: np.ndarray) -> np.ndarray:
        """Return (sets, targets) margins in units of the scale, negative where a target is changed."""
        gates = np.stack([evaluator.gates(one, strength) for one, strength in zip(sets, strengths, strict=True)])
        return np.asarray(evaluator.margins(gates, rows, constants=constants) / scales)

    unablated, full = objective.base[rows] / scales, levels_at(np.ones(len(sets)))
    required = (full < 0).sum(1)
    low, high = np.zeros(len(sets)), np.ones(len(sets))
    at_low, at_high = (_shortfall(levels, required) for levels in (np.broadcast_to(unablated, full.shape), full))
    partial = (required > (unablated < 0).sum()) & (at_high <= 0)
    raised = lowered = np.zeros(len(sets), dtype=bool)  # which end the last round moved
    for _ in range(STRENGTH_ROUNDS):
        between = high + (high - low) * at_high / np.where(partial, at_low - at_high, 1)
        middle = np.where(partial, between, 1)
        found = _shortfall(levels_at(middle), required)
        enough = found <= 0
        # an end that stays for a second time weighs half, or the other would approach the root too slowly
        at_low = np.where(enough, np.where(lowered, at_low / 2, at_low), found)
        at_high = np.where(enough, found, np.where(raised, at_high / 2, at_high))
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        raised, lowered = ~enough, enough
    return np.where(partial, high, 1.0)


class ExampleDraws:
    """Draws targets and references for one step after another, each with the share of the trade-off it stands for.

    Args:
        objective: The trade-off.
        seed: Seed of the draws.
        among: Examples that references are drawn from; by default all.
    """

    def __init__(self, objective: Objective, seed: int, among: np.ndarray | None = None) -> None:
        references = objective.references if among is None else np.intersect1d(among, objective.references)
        self._rng = np.random.default_rng(seed)
        self._sides = [(rows, objective.weights[rows]) for rows in (objective.targets, references)]

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the next (examples,) rows and their shares."""
        parts = [self._draw(*side, count) for side, count in zip(self._sides, BATCH, strict=True)]
        rows, shares = (np.concatenate(part) for part in zip(*parts, strict=True))
        return rows, shares

    def _draw(self, rows: np.ndarray, weights: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `count` of these examples, drawn by their weights, or all there are, and their shares."""
        total = weights.sum()
        chances = weights / total
        if count >= len(rows):
            return rows, total * chances
        return self._rng.choice(rows, count, replace=False, p=chances), np.full(count, total / count)


class _Variable:
    """(numbers,) values that are trained, with the running means that size their steps (Adam, Kingma and Ba 2015).

    Attributes:
        values: The present values.
        total: Sum of the values of the last steps.
    """

    def __init__(self, values: np.ndarray, *, low: float = -np.inf, high: float = np.inf) -> None:
        self.values, self.total = values.copy(), np.zeros(len(values))
        self._low, self._high = low, high
        self._slope, self._square, self._count = np.zeros(len(values)), np.zeros(len(values)), 0

    def step(self, slopes: np.ndarray, rate: float) -> None:
        """Move the values against these slopes, by about `rate` while slopes agree, within the limits."""
        first, second = DECAY
        self._count += 1
        self._slope = first * self._slope + (1 - first) * slopes
        self._square = second * self._square + (1 - second) * slopes**2
        mean, square = self._slope / (1 - first**self._count), self._square / (1 - second**self._count)
        moved = self.values + rate * (-mean / (np.sqrt(square) + 1e-8))
        self.values[:] = np.clip(moved, self._low, self._high)


class _Constants:
    """Constants of some components in standard deviations of their channels, from initial values.

    Attributes:
        channels: (channels,) positions of these constants among all.
        component: (channels,) the component of each.
        moved: How far each is from its initial value, in standard deviations.
    """

    def __init__(self, evaluator: GatedEvaluator, components: Sequence[int] | np.ndarray, start: np.ndarray) -> None:
        held = [int(i) for i in components if evaluator.table[int(i)].side != "expert"]
        self.channels = evaluator.table.channels_of(held)
        self.component = np.repeat(held, [evaluator.table[i].size for i in held]).astype(np.int64)
        self.moved = _Variable(np.zeros(len(self.channels)))
        self._start = start
        self._spread = evaluator.spread[self.channels] if held else np.zeros(0)

    def at(self, moved: np.ndarray) -> np.ndarray:
        """Return all (components.width,) constants, these as far from their initial values."""
        found: np.ndarray = self._start.copy()
        found[self.channels] = self._start[self.channels] + self._spread * moved
        return found

    def present(self) -> np.ndarray:
        """Return all (components.width,) constants as they are now."""
        return self.at(self.moved.values)

    def slopes(self, by_constant: np.ndarray) -> np.ndarray:
        """Return (channels,) slopes per standard deviation, from (components.width,) slopes by constants."""
        return np.asarray(self._spread * by_constant[self.channels])


def _train(
    variables: Sequence[_Variable],
    slopes: Callable[[int, np.ndarray, np.ndarray], Sequence[np.ndarray]],
    draw: ExampleDraws,
    schedule: Schedule,
    on_step: Callable[[], object] = lambda: None,
) -> list[np.ndarray]:
    """Move variables down the slopes of an objective; return the average of each over the last steps.

    Args:
        variables: The numbers to train.
        slopes: Returns the slopes by each variable, from the number of the step, rows of examples and their shares.
        draw: Draws the examples of a step.
        schedule: How many steps there are, and how long they are.
        on_step: Called after each step.
    """
    last = max(round(schedule.averaged * schedule.steps), 1)
    for step in range(schedule.steps):
        rate = schedule.rate * (1 - 0.9 * step / schedule.steps)
        for variable, slope in zip(variables, slopes(step, *draw()), strict=True):
            variable.step(slope, rate)
        if step >= schedule.steps - last:
            for variable in variables:
                variable.total += variable.values
        on_step()
    return [variable.total / last for variable in variables]


def _shortfall(levels: np.ndarray, required: np.ndarray) -> np.ndarray:
    """Return (sets,) by how much the last of the required targets falls short, from (sets, targets) scaled margins."""
    last = np.take_along_axis(np.sort(levels, axis=1), np.maximum(required, 1)[:, None] - 1, axis=1)
    return np.asarray(last[:, 0] + CLEAR_MARGIN)
