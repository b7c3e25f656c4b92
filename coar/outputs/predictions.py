"""Outputs of models that predict numbers: the prediction, its squared error, and its margin within a tolerance."""

from typing import Any

from pydantic import Field
from torch import Tensor

from coar.errors import OutputError
from coar.outputs.base import Margin, Output, find_logits

SCALE = 10.0  # b of the margin within a tolerance


class PredictedValue(Output):
    """One predicted number; targets are not read.

    Attributes:
        index: Which of several predicted numbers to read.
    """

    index: int = Field(default=0, ge=0)

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) predictions.

        Raises:
            OutputError: When the model did not return (examples,) or (examples, values) numbers, or too few values.
        """
        values = _columns(find_logits(result), len(targets))
        if self.index >= values.shape[1]:
            raise OutputError(
                f"index {self.index} is outside the model's {values.shape[1]} predicted values (0 to "
                f"{values.shape[1] - 1}); give one of these"
            )
        return values[:, self.index]


class SquaredError(Output):
    """Squared error of a prediction: the mean over k of (p_k - y_k)^2 for predictions p and targets y."""

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) squared errors, in squared units of the targets."""
        return _errors(result, targets).square().mean(1)


class ToleranceMargin(Margin):
    """Margin of a prediction within a tolerance, on the scale of logits.

    With the predictions p, targets y, tolerance t and b = 10, the margin is b - max_k b * |p_k - y_k| / t: 10 for an
    exact prediction, positive exactly where every predicted number is less than t away from its target. So edits of
    models that predict numbers count an example as correct if it is within the tolerance. Edits weigh gains and harms
    by sigmoids of the margin; the factor b makes these as steep as for margins of logits. The smooth bound
    b - log(sum_k exp(b * |p_k - y_k| / t)) has a gradient for every k; for one predicted number both are equal.

    Attributes:
        tolerance: t, the smallest error that counts as wrong, in units of the targets.
        against: `logsumexp` for the smooth bound, `largest` for the largest error.
    """

    tolerance: float = Field(gt=0)

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) margins."""
        errors = SCALE / self.tolerance * _errors(result, targets).abs()
        return SCALE - (errors.amax(1) if self.against == "largest" else errors.logsumexp(1))


def _errors(result: Any, targets: Tensor) -> Tensor:
    """Return (examples, values) float32 predictions minus targets.

    Raises:
        OutputError: When the predictions and the targets differ in shape.
    """
    values, expected = _columns(find_logits(result), len(targets)), _columns(targets, len(targets))
    if values.shape != expected.shape:
        raise OutputError(
            f"the model predicts {values.shape[1]} values per example and the targets have {expected.shape[1]}; "
            f"equal numbers were expected: give targets of shape (examples, {values.shape[1]})"
        )
    return values - expected


def _columns(values: Tensor, count: int) -> Tensor:
    """Return (examples, values) float32 numbers; (examples,) numbers become one column."""
    if values.ndim not in {1, 2} or len(values) != count or values.is_complex():
        raise OutputError(
            f"predictions or targets are {values.dtype} of shape {tuple(values.shape)} for {count} examples; real "
            f"numbers of shape ({count},) or ({count}, values) were expected: wrap the model so that it returns these"
        )
    return values.float().reshape(count, -1)
