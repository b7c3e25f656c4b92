"""Conditions over metadata columns, such as `label == 3 and group != "land"`, parsed and never executed."""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from coar.errors import GoalError

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
LONGEST = 10_000


def matching_rows(expression: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the (examples,) truth of a condition over metadata columns.

    Args:
        expression: Columns compared with constants by `==`, `!=`, `<`, `<=`, `>`, `>=`, `in [...]`, `not in [...]`,
            joined by `and`, `or`, `not` and brackets. Anything else is refused, and nothing is executed.
        columns: (examples,) values by name.

    Raises:
        GoalError: When the expression is malformed, or names a column that does not exist.
    """
    if len(expression) > LONGEST:
        raise GoalError(
            f"an expression of {len(expression)} characters was given; {LONGEST} is the most: use positions"
        )
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        result = _evaluate(tree.body, columns)
    except (SyntaxError, TypeError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        if isinstance(error, GoalError):
            raise
        raise GoalError(f"cannot read the expression {expression!r} ({error}); write {GRAMMAR}") from None
    if not isinstance(result, np.ndarray) or result.dtype != bool or result.ndim != 1:
        raise GoalError(f"the expression {expression!r} is not a condition; write {GRAMMAR}")
    return result


def _evaluate(node: ast.expr, columns: Mapping[str, np.ndarray]) -> Any:  # noqa: PLR0911
    match node:
        case ast.BoolOp(op=op, values=values):
            join = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return join.reduce([_condition(value, columns) for value in values])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_condition(operand, columns)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            sides = [_evaluate(side, columns) for side in (left, *comparators)]
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
    value = _evaluate(node, columns)
    if isinstance(value, np.ndarray | list):
        raise GoalError(f"{ast.unparse(node)!r} is not allowed in a list; write {GRAMMAR}")
    return value


def _condition(node: ast.expr, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    value = _evaluate(node, columns)
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
