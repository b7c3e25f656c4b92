"""Outputs of classifiers: margin, logit and loss."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from coar.errors import OutputError
from coar.outputs.base import Against, Margin, Output, find_logits, whole_numbers


class CorrectClassMargin(Margin):
    """Margin of the correct class over the other classes.

    With `against="largest"`, f_M(x, C') = l_y - max_{c != y} l_c: the logit of the correct class less the runner-up
    logit, the model output of Shah et al. (2024) for classifiers. It is positive exactly where the class is predicted.

    With `against="logsumexp"`, f_M(x, C') = l_y - log sum_{c != y} exp(l_c) = log(p_y / (1 - p_y)), where p is the
    softmax of l: the log-odds of the correct class, the model output of Park et al. (2023, "TRAK"). It is
    differentiable everywhere.

    Attributes:
        against: `logsumexp` or `largest`.
    """

    reads_logits_of = "classes"

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) margins."""
        return margins(*class_logits(result, targets), self.against)


class ClassLogit(Output):
    """Logit of one class: f_M(x, C') = l_c.

    Attributes:
        label: The class c; by default the target y of each example.
    """

    label: int | None = None

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) logits."""
        classes = targets if self.label is None else torch.full_like(targets, self.label, dtype=torch.long)
        logits, labels = class_logits(result, classes)
        return logits.gather(1, labels[:, None])[:, 0]


class CrossEntropy(Output):
    """Cross-entropy loss of the target, in nats: f_M(x, C') = log sum_c exp(l_c) - l_y = -log p_y.

    p is the softmax of l. A smaller output is better here, unlike for margins.
    """

    reads_logits_of = "classes"

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) losses."""
        logits, labels = class_logits(result, targets)
        return functional.cross_entropy(logits, labels, reduction="none")


def margin_pair(output: Output) -> tuple[Output, Output]:
    """Return a margin over the runner-up logit, and the same margin over the log-sum-exp of the other logits.

    The first is positive exactly where the model is right; the second is differentiable everywhere.

    Raises:
        OutputError: When the sign of the output does not mean right or wrong.
    """
    found = output.hard_and_smooth()
    if found is None:
        raise OutputError(
            f"{output!r} does not say what is right and wrong; an edit is chosen and judged by a margin: give "
            f"CorrectClassMargin, BinaryMargin, MultiLabelMargin, ToleranceMargin, TokenMargin(reduction='last'), "
            f"ChoiceMargin, LogitDifference or ZeroShotMargin"
        )
    return found


def margins(logits: Tensor, labels: Tensor, against: Against) -> Tensor:
    """Return (rows,) margins of labels over the other columns.

    Args:
        logits: (rows, columns) logits.
        labels: (rows,) columns of the correct answers.
        against: As in `CorrectClassMargin`.
    """
    column = labels[:, None]
    others = logits.scatter(1, column, -torch.inf)
    opposing = others.logsumexp(1) if against == "logsumexp" else others.amax(1)
    return logits.gather(1, column)[:, 0] - opposing


def class_logits(result: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return (examples, classes) float32 logits from a model's result, and the targets as (examples,) int64 labels.

    Raises:
        OutputError: When the result has no such logits, or a target is not one of their classes.
    """
    logits = find_logits(result)
    if logits.ndim == 3:
        raise OutputError(
            f"the model's logits have shape {tuple(logits.shape)}, like logits of tokens, and (examples, classes) was "
            f"expected: read tokens with coar.TokenMargin or coar.TokenLogProbability, and give an edit of a language "
            f"model output=coar.TokenMargin(reduction='last') or a coar.ChoiceMargin"
        )
    if logits.ndim != 2 or len(logits) != len(targets) or targets.ndim != 1:
        raise OutputError(
            f"the model's logits have shape {tuple(logits.shape)} and the targets {tuple(targets.shape)}; "
            f"(examples, classes) and (examples,) were expected: choose another output function, or wrap the model"
        )
    if logits.shape[1] == 1:
        raise OutputError(
            f"the model has one logit per example, {tuple(logits.shape)}, and several classes were expected: read it "
            f"with coar.BinaryMargin where it answers yes or no (targets 0 and 1), or with coar.PredictedValue, "
            f"coar.SquaredError or coar.ToleranceMargin where it predicts a number"
        )
    labels = whole_numbers(targets)
    wrong = ((labels < 0) | (labels >= logits.shape[1])).nonzero()
    if len(wrong):
        raise OutputError(
            f"label {int(labels[wrong[0, 0]])} is outside the model's {logits.shape[1]} classes (0 to "
            f"{logits.shape[1] - 1}), first at position {int(wrong[0, 0])} of this batch; correct the targets"
        )
    return logits.float(), labels
