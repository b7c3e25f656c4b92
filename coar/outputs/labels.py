"""Outputs of classifiers that answer yes or no, for one label or for each of several."""

from typing import Any

from torch import Tensor

from coar.errors import OutputError
from coar.outputs.base import Margin, Output, find_logits


class BinaryMargin(Output):
    """Margin of a classifier with one logit per example.

    With the logit z, the target y (0 or 1) and the threshold t, the margin is (2y - 1) * (z - t): positive exactly
    where the prediction z > t equals the target. For t = 0 it is the log-odds of the correct answer, as
    `CorrectClassMargin` is for several classes.

    Attributes:
        threshold: The logit above which the model answers yes; log(p / (1 - p)) for a threshold p on probabilities.
    """

    reads_logits_of = "answers"
    threshold: float = 0.0

    def hard_and_smooth(self) -> tuple[Output, Output]:
        """Return this margin twice: its sign shows what is correct, and it is smooth."""
        return self, self

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) margins.

        Raises:
            OutputError: When the logits are not (examples,) or (examples, 1), or a target is neither 0 nor 1.
        """
        logits = find_logits(result)
        if logits.shape not in {targets.shape, (*targets.shape, 1)} or targets.ndim != 1:
            raise OutputError(
                f"the model's logits have shape {tuple(logits.shape)} and the targets {tuple(targets.shape)}; "
                f"(examples,) or (examples, 1), and (examples,), were expected: use CorrectClassMargin for several "
                f"classes of which one is correct, and MultiLabelMargin for several labels"
            )
        return signs(targets) * (logits.float().reshape(targets.shape) - self.threshold)


class MultiLabelMargin(Margin):
    """Margin of a classifier that answers yes or no for each of several labels.

    With the logits z_k and the targets y_k (0 or 1), the signed logits are m_k = (2 y_k - 1) * z_k. The margin is m_k
    for one label; for all labels it is the smallest m_k, positive exactly where all answers are correct, or its smooth
    lower bound -log(sum_k exp(-m_k)).

    Attributes:
        label: The label to read; by default all.
        against: For all labels, `logsumexp` for the smooth bound or `largest` for the smallest signed logit.
    """

    reads_logits_of = "answers"
    label: int | None = None

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) margins.

        Raises:
            OutputError: When logits and targets are not both (examples, labels), a target is neither 0 nor 1, or the
                label does not exist.
        """
        logits = find_logits(result)
        if logits.shape != targets.shape or logits.ndim != 2:
            raise OutputError(
                f"the model's logits have shape {tuple(logits.shape)} and the targets {tuple(targets.shape)}; both as "
                f"(examples, labels) were expected, with 1 in the targets where a label applies and 0 elsewhere"
            )
        margins = signs(targets) * logits.float()
        if self.label is None:
            return -(-margins).logsumexp(1) if self.against == "logsumexp" else margins.amin(1)
        if not 0 <= self.label < margins.shape[1]:
            raise OutputError(
                f"label {self.label} is outside the model's {margins.shape[1]} labels (0 to {margins.shape[1] - 1}); "
                f"give one of these"
            )
        return margins[:, self.label]


def signs(targets: Tensor) -> Tensor:
    """Return 1 where targets are 1 and -1 where they are 0, in float32; raise `OutputError` for other targets."""
    other = (targets != 0) & (targets != 1)
    if bool(other.any()):
        raise OutputError(
            f"the targets hold {targets[other][0].item()}; 0 or 1 was expected: use CorrectClassMargin for class "
            f"labels, and PredictedValue, SquaredError or ToleranceMargin for models that predict numbers"
        )
    return 2 * targets.float() - 1
