"""The goal of an edit: targets, references and direction, the bound on harm, and the trade-off between the two."""

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from coar.errors import CoarError, GoalError
from coar.settings import Settings

ExampleSelector = str | tuple[int, ...]
Columns = Mapping[str, np.ndarray]

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: np.isin,
    ast.NotIn: lambda column, values: ~np.isin(column, values),
}
GRAMMAR = "columns compared with numbers or quoted words by ==, !=, <, <=, >, >=, in [...], joined by and, or, not"
LONGEST_CONDITION = 10_000


class EditGoal(Settings):
    """Targets, references and a direction.

    Attributes:
        targets: The examples to change: positions, or a condition over metadata columns such as `label == 3`.
        references: The examples to leave alone, likewise.
        direction: Whether the targets' output must `decrease` or `increase`.
        groups: Metadata column of the groups of references over which harm is bounded; by default `label` where there
            is such a column, or else all references are one group.
        pairs: Metadata column that matches each target with one reference, such as the same picture without a trigger.
            Where strengths are trained per component, targets to increase are drawn to the margin of their partner.
        clusters: Metadata column of what several examples have in common, such as the picture that they are versions
            of. Standard errors over examples are then cluster-robust: the losses of a cluster are added up before they
            are squared. By default every example counts as independent.
    """

    mistake: ClassVar[type[CoarError]] = GoalError

    targets: ExampleSelector
    references: ExampleSelector
    direction: Literal["decrease", "increase"]
    groups: str | None = None
    pairs: str | None = None
    clusters: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_a_direction(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("direction") is None:
            raise ValueError(
                "no direction is given; add direction='decrease' to lower the targets' output, which makes a model "
                "fail on them, or direction='increase' to raise it"
            )
        return given

    @field_validator("targets", "references", mode="before")
    @classmethod
    def _as_positions(cls, value: Any) -> Any:
        """Turn booleans or positions, in any kind of sequence, into a tuple of positions."""
        if isinstance(value, str):
            return value
        rows = np.asarray(value)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "biu"):
            raise ValueError("give a condition, positions, or one boolean per example")
        return tuple(int(row) for row in (np.flatnonzero(rows) if rows.dtype == bool else rows))

    @property
    def general(self) -> bool:
        """Whether the goal consists of conditions, which apply to any examples with the same columns."""
        return isinstance(self.targets, str) and isinstance(self.references, str)

    def resolve(self, metadata: Columns) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of targets and references, ascending, or in the order of their pairs.

        References that are in no pair come last.

        Args:
            metadata: (examples,) columns.

        Raises:
            GoalError: When either is empty, the two overlap, a column or position is not there, or targets do not
                match one reference each.
        """
        targets = _positions("targets", self.targets, metadata)
        references = _positions("references", self.references, metadata)
        both = np.intersect1d(targets, references)
        if len(both):
            raise GoalError(
                f"{len(both)} examples are targets and references at once, first {both[0]}; take them out of one"
            )
        if self.pairs is None:
            return targets, references
        column = _column("pairs", self.pairs, metadata)
        return _paired(self.pairs, column, targets, references)

    def groups_of(self, metadata: Columns, rows: np.ndarray) -> np.ndarray:
        """Return the group of each of these examples; all the same where there are no groups.

        Raises:
            GoalError: When there is no such column.
        """
        if self.groups is not None:
            found: np.ndarray = _column("groups", self.groups, metadata)[rows]
            return found
        return np.asarray(metadata["label"])[rows] if "label" in metadata else np.zeros(len(rows), dtype=np.int64)

    def clusters_of(self, metadata: Columns) -> np.ndarray:
        """Return the number of each example's cluster, counted from 0; one each where there are no clusters.

        Raises:
            GoalError: When there is no such column.
        """
        if self.clusters is None:
            return np.arange(len(next(iter(metadata.values()))))
        return np.unique(_column("clusters", self.clusters, metadata), return_inverse=True)[1]


class TradeOff(Settings):
    """How gain and harm are weighed.

    The trade-off is the mean over targets of sigmoid(margin / target_scale), or of sigmoid(-margin / target_scale) for
    goals that increase the output, plus `harm_weight` times the mean over groups of references of
    sigmoid(-margin / reference_scale). Smaller is better.

    Attributes:
        harm_weight: How much a point lost on references weighs against a point gained on targets.
        target_scale: Margin over which a target counts as changed, in units of the margin.
        reference_scale: Margin over which a reference counts as kept, in units of the margin.
    """

    harm_weight: float = Field(default=12.0, gt=0)
    target_scale: float = Field(default=1.0, gt=0)
    reference_scale: float = Field(default=1.0, gt=0)


class Bound(Settings):
    """The most accuracy that references may lose on the choosing examples.

    Attributes:
        mean: Share lost on average over groups, with its standard error added, so that it is likely to hold on other
            examples.
        group: Share lost by any one group.
    """

    mean: float = Field(default=0.01, ge=0, le=1)
    group: float = Field(default=0.03, ge=0, le=1)


@dataclass(frozen=True)
class Outcome:
    """The effect of a set of ablated components on the choosing examples.

    Attributes:
        value: The trade-off; smaller is better.
        targets: Accuracy on targets.
        lost: Share of accuracy that references lost, averaged over groups; negative where they gained.
        worst: The same of the group that lost most.
        excess: By how much the bound is exceeded; 0 within it.
    """

    value: float
    targets: float
    lost: float
    worst: float
    excess: float


@dataclass(frozen=True)
class Objective:
    """A trade-off and a bound over fixed examples.

    Attributes:
        weights: (examples,) share of each example among targets, or `harm_weight` times its share among references.
        scales: (examples,) signed margins over which an example counts as changed; the sigmoid of margin over scale
            is what it adds.
        group: (examples,) number of the reference's group, -1 for targets.
        partners: (examples,) position of the reference whose margin a target should reach, -1 for all other examples.
        clusters: (examples,) number of the cluster that counts as one observation in standard errors.
        base: (examples,) margins of the unablated model.
        bound: The bound on harm.
    """

    weights: np.ndarray
    scales: np.ndarray
    group: np.ndarray
    partners: np.ndarray
    clusters: np.ndarray
    base: np.ndarray
    bound: Bound

    @classmethod
    def of(cls, goal: EditGoal, metadata: Columns, base: np.ndarray, *, tradeoff: TradeOff, bound: Bound) -> Self:
        """Set up the objective of a goal from (examples,) margins of the unablated model."""
        targets, references = goal.resolve(metadata)
        weights, scales = np.zeros(len(base)), np.ones(len(base))
        group, partners = np.full(len(base), -2), np.full(len(base), -1)
        weights[targets] = 1 / len(targets)
        scales[targets] = tradeoff.target_scale * (1 if goal.direction == "decrease" else -1)
        group[targets] = -1
        group[references] = np.unique(goal.groups_of(metadata, references), return_inverse=True)[1]
        sizes = np.bincount(group[references])
        weights[references] = tradeoff.harm_weight / len(sizes) / sizes[group[references]]
        scales[references] = -tradeoff.reference_scale
        if goal.pairs is not None and goal.direction == "increase":
            partners[targets] = references[: len(targets)]
        return cls(weights, scales, group, partners, goal.clusters_of(metadata), base, bound)

    def with_harm_weight(self, factor: float) -> Self:
        """Return the objective with references that weigh more by a factor."""
        return replace(self, weights=self.weights * np.where(self.group == -1, 1.0, factor))

    @property
    def targets(self) -> np.ndarray:
        """Positions of the targets."""
        return np.flatnonzero(self.group == -1)

    @property
    def references(self) -> np.ndarray:
        """Positions of the references."""
        return np.flatnonzero(self.group >= 0)

    def unmet_fraction(self, outcome: Outcome) -> float:
        """Return the share of targets that are not as the goal requires."""
        return outcome.targets if self.scales[self.targets[0]] > 0 else 1 - outcome.targets

    def values(self, margins: np.ndarray, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the trade-off from (..., examples) margins, of some of the examples where `rows` names them."""
        return np.asarray(_sigmoid(margins / self.scales[rows]) @ self.weights[rows])

    def slopes(self, margins: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return (examples,) derivatives of each example's part of the objective by its margin, without weights.

        For references this is the derivative of the trade-off. A sigmoid is flat for targets that are far from
        changing, which would then be ignored. For targets it is therefore the derivative of
        log(1 + exp(margin / scale)), which is the same for targets that have changed.
        """
        level = _sigmoid(margins / self.scales[rows])
        return np.asarray(level * np.where(self.group[rows] == -1, 1, 1 - level) / self.scales[rows])

    def required_margins(self, before: np.ndarray) -> np.ndarray:
        """Return the (examples,) margins that the goal requires, from those of the unablated model.

        References keep theirs, and a target with a partner gets the partner's; NaN for other targets.
        """
        found = np.where(self.group == -1, np.nan, before)
        paired = self.partners >= 0
        found[paired] = before[self.partners[paired]]
        return found

    def shortfall_slopes(self, margins: np.ndarray, required: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return (examples,) directions like `slopes`, but by how far margins are below the required ones.

        The shortfall counts up to one reference scale. References count in no other way: a larger margin than before
        gains nothing, since a choice with many free numbers would overfit to that. Targets also count as in `slopes`.

        Args:
            margins: (examples,) margins.
            required: (examples,) required margins, see `required_margins`.
            rows: Which examples these are.
        """
        scale = self.scales[self.references[0]]
        lacking = np.nan_to_num(np.clip((margins - required) / scale, 0, 1)) / scale
        wrong = _sigmoid(margins / self.scales[rows]) / self.scales[rows]
        return np.asarray(lacking + np.where(self.group[rows] == -1, wrong, 0))

    def outcome(self, margins: np.ndarray) -> Outcome:
        """Return the trade-off, the accuracies and the excess over the bound at (examples,) margins."""
        chosen = self.references
        lost = (self.base[chosen] > 0).astype(float) - (margins[chosen] > 0)
        group, sizes = self.group[chosen], np.bincount(self.group[chosen])
        by_group = np.bincount(group, lost) / sizes
        mean, worst = float(by_group.mean()), float(by_group.max())
        error = self.error((lost - by_group[group]) / sizes[group] / len(sizes), chosen)
        excess = max(mean + error - self.bound.mean, 0.0) + np.maximum(by_group - self.bound.group, 0).sum()
        right = float((margins[self.targets] > 0).mean())
        return Outcome(float(self.values(margins)), right, mean, worst, float(excess))

    def error(self, parts: np.ndarray, rows: np.ndarray | slice = slice(None)) -> float:
        """Return the standard error of a sum over some of the examples, whose parts are added up within a cluster."""
        return float(np.sqrt((np.bincount(self.clusters[rows], parts) ** 2).sum()))


def matching_rows(expression: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the (examples,) truth of a condition over metadata columns.

    Args:
        expression: Columns compared with constants by `==`, `!=`, `<`, `<=`, `>`, `>=`, `in [...]`, `not in [...]`,
            joined by `and`, `or`, `not` and brackets. Anything else is refused, and nothing is executed.
        columns: (examples,) values by name.

    Raises:
        GoalError: When the expression is malformed, or names a column that does not exist.
    """
    if len(expression) > LONGEST_CONDITION:
        raise GoalError(
            f"an expression of {len(expression)} characters was given; {LONGEST_CONDITION} is the most: use positions"
        )
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        result = _value_of(tree.body, columns)
    except (SyntaxError, TypeError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        if isinstance(error, GoalError):
            raise
        raise GoalError(f"cannot read the expression {expression!r} ({error}); write {GRAMMAR}") from None
    if not isinstance(result, np.ndarray) or result.dtype != bool or result.ndim != 1:
        raise GoalError(f"the expression {expression!r} is not a condition; write {GRAMMAR}")
    return result


def _value_of(node: ast.expr, columns: Mapping[str, np.ndarray]) -> Any:  # noqa: PLR0911
    match node:
        case ast.BoolOp(op=op, values=values):
            join = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return join.reduce([_condition(value, columns) for value in values])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_condition(operand, columns)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            sides = [_value_of(side, columns) for side in (left, *comparators)]
            pairs = zip(ops, sides, sides[1:], strict=False)
            return np.logical_and.reduce([_compare(op, a, b) for op, a, b in pairs])
        case ast.Name(id=name):
            if name not in columns:
                raise GoalError(f"there is no metadata column {name!r}; there are {', '.join(sorted(columns))}")
            return columns[name]
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            return [_constant(item, columns) for item in items]
    raise GoalError(f"{ast.unparse(node)!r} is not allowed in an expression; write {GRAMMAR}")


def _constant(node: ast.expr, columns: Mapping[str, np.ndarray]) -> Any:
    value = _value_of(node, columns)
    if isinstance(value, np.ndarray | list):
        raise GoalError(f"{ast.unparse(node)!r} is not allowed in a list; write {GRAMMAR}")
    return value


def _condition(node: ast.expr, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    value = _value_of(node, columns)
    if not isinstance(value, np.ndarray) or value.dtype != bool:
        raise GoalError(f"{ast.unparse(node)!r} is not a condition; compare it with something, as in 'label == 3'")
    return value


def _compare(op: ast.cmpop, left: Any, right: Any) -> np.ndarray:
    compare = COMPARISONS.get(type(op))
    if compare is None:
        raise GoalError(f"{type(op).__name__} is not allowed in an expression; write {GRAMMAR}")
    column = next((side for side in (left, right) if isinstance(side, np.ndarray)), None)
    if column is None:
        raise GoalError("a comparison needs a metadata column on one side, as in 'label == 3'")
    if isinstance(op, ast.In | ast.NotIn) != isinstance(right, list) or isinstance(left, list):
        raise GoalError("a list belongs on the right of 'in' or 'not in' and nowhere else, as in 'label in [3, 5]'")
    other = right if column is left else left
    flat = other if isinstance(other, list) else [other]
    words = [value.dtype.kind == "U" if isinstance(value, np.ndarray) else isinstance(value, str) for value in flat]
    if any(word != (column.dtype.kind == "U") for word in words):
        raise GoalError(
            f"a word is compared with a number: the column holds {column.dtype}; quote words, and nothing else"
        )
    return np.asarray(compare(left, right), dtype=bool)


def _positions(role: str, selection: ExampleSelector, metadata: Columns) -> np.ndarray:
    n = len(next(iter(metadata.values())))
    if isinstance(selection, str):
        found = np.flatnonzero(matching_rows(selection, metadata))
    else:
        outside = [row for row in selection if not 0 <= row < n]
        if outside:
            raise GoalError(f"{role} names example {outside[0]}, but there are {n}, counted from 0; correct it")
        found = np.unique(np.asarray(selection, dtype=np.int64))
    if not len(found):
        raise GoalError(f"{role}={selection!r} selects none of the {n} examples; widen it")
    return found


def _column(role: str, name: str, metadata: Columns) -> np.ndarray:
    if name not in metadata:
        raise GoalError(f"{role} names column {name!r}; there are {', '.join(sorted(metadata))}: choose one of them")
    return np.asarray(metadata[name])


def _paired(
    name: str, column: np.ndarray, targets: np.ndarray, references: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return targets and references in the order of their common values, and then references without a target."""
    sides = {"target": column[targets], "reference": column[references]}
    for role, values in sides.items():
        found, counts = np.unique(values, return_counts=True)
        if counts.max() > 1:
            twice = found[counts > 1][0].item()
            raise GoalError(
                f"{name} == {twice!r} belongs to {counts.max()} {role}s; pairs need one target and one reference each"
            )
    alone = np.setdiff1d(*sides.values())
    if len(alone):
        raise GoalError(
            f"{len(alone)} values of {name!r}, first {alone[0].item()!r}, belong to a target but to no reference; "
            f"select both of every pair"
        )
    order = np.argsort(sides["reference"])
    matched = np.isin(sides["reference"][order], sides["target"])
    return targets[np.argsort(sides["target"])], references[np.concatenate([order[matched], order[~matched]])]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)
