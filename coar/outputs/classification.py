"""Outputs of classifiers: margin, logit and loss."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from coar.errors import OutputError
from coar.outputs.base import Against, Margin, Output, find_logits, whole_numbers


class CorrectClassMargin(Margin):
    """Logit of the correct class minus what the other classes offer against it.

    Attributes:
        against: `logsumexp` of the other logits, which is smooth and is the log-odds of the correct class; or the
            `largest` of them, as published (Shah et al. 2024, section 3), positive exactly where the class is
            predicted.
    """

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) margins."""
        return margins(*class_logits(result, targets), self.against)


class ClassLogit(Output):
    """Logit of one class.

    Attributes:
        label: The class to read; by default each example's own target.
    """

    label: int | None = None

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) logits."""
        wanted = targets if self.label is None else torch.full_like(targets, self.label, dtype=torch.long)
        logits, labels = class_logits(result, wanted)
        return logits.gather(1, labels[:, None])[:, 0]


class CrossEntropy(Output):
    """Cross-entropy loss of the target class, in nats."""

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) losses."""
        logits, labels = class_logits(result, targets)
        return functional.cross_entropy(logits, labels, reduction="none")


def sides(output: Output) -> tuple[Output, Output]:
    """Return an output against the largest other offer, positive where right, and its smooth twin.

    The smooth one has a gradient everywhere.

    Raises:
        OutputError: When the output is no margin, so that its sign says nothing.
    """
    found = output.hard_and_smooth()
    if found is None:
        raise OutputError(
            f"{output!r} does not say what is right and wrong; an edit is tried out and judged by a margin: give "
            f"CorrectClassMargin, BinaryMargin, MultiLabelMargin, ToleranceMargin, TokenMargin(reduction='last'), "
            f"ChoiceMargin or ZeroShotMargin"
        )
    return found


def margins(logits: Tensor, labels: Tensor, against: Against) -> Tensor:
    """Return (rows,) logits of the labels minus what the other columns of (rows, columns) offer against them."""
    column = labels[:, None]
    others = logits.scatter(1, column, -torch.inf)
    rival = others.logsumexp(1) if against == "logsumexp" else others.amax(1)
    return logits.gather(1, column)[:, 0] - rival


def class_logits(result: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return (examples, classes) float32 logits from a model's result, and (examples,) int64 labels that fit them.

    Raises:
        OutputError: When the result holds no such logits, or a target is not one of their classes.
    """
    logits = find_logits(result)
    if logits.ndim == 3:
        raise OutputError(
            f"the model's logits have shape {tuple(logits.shape)}, as those of tokens, and (examples, classes) were "
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
