"""Which scalar is read off the model for each example."""

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from coar.errors import OutputError
from coar.settings import Settings


class Output(Settings):
    """Base of all output functions: settings that turn a model's result into one number per example."""

    @abstractmethod
    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) outputs from the model's result and the (examples, ...) targets."""

    def settings(self) -> dict[str, Any]:
        """Return the name and settings that identify this function in a run's fingerprint."""
        return {"name": type(self).__name__, **self.model_dump(mode="json")}


class CorrectClassMargin(Output):
    """Logit of the correct class minus what the other classes offer against it.

    Attributes:
        against: `logsumexp` of the other logits, which is smooth and is the log-odds of the correct class; or the
            `largest` of them, as published (Shah et al. 2024, section 3), positive exactly where the class is
            predicted.
    """

    against: Literal["logsumexp", "largest"] = "logsumexp"

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) margins."""
        logits, labels = class_logits(result, targets)
        column = labels[:, None]
        others = logits.scatter(1, column, -torch.inf)
        rival = others.logsumexp(1) if self.against == "logsumexp" else others.amax(1)
        return logits.gather(1, column)[:, 0] - rival


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


class CosineSimilarity(Output):
    """Cosine similarity of the two embeddings of a pair, between -1 and 1; targets are not read."""

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) similarities from the model's (examples, 2, width) embeddings.

        Raises:
            OutputError: When the model returned something else.
        """
        shape = tuple(result.shape) if isinstance(result, Tensor) else None
        if shape is None or len(shape) != 3 or shape[:2] != (len(targets), 2):
            given = f"a tensor of shape {shape}" if shape is not None else f"a {type(result).__name__}"
            raise OutputError(
                f"the model returned {given} for {len(targets)} pairs; a tensor of shape (pairs, 2, width) was "
                f"expected: wrap the model so that it returns both embeddings of each pair"
            )
        first, second = result.float().unbind(1)
        return functional.cosine_similarity(first, second, dim=1)


def class_logits(result: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return (examples, classes) float32 logits from a model's result, and (examples,) int64 labels that fit them.

    Raises:
        OutputError: When the result holds no such logits, or a target is not one of their classes.
    """
    if isinstance(result, dict):
        logits = result.get("logits")
    else:
        logits = getattr(result, "logits", result[0] if isinstance(result, tuple) and result else result)
    if not isinstance(logits, Tensor):
        raise OutputError(
            f"the model returned a {type(result).__name__} without logits; a tensor, a tuple that starts with one, or "
            f"an object or dict with a 'logits' tensor was expected: wrap the model so that it returns one of these"
        )
    if logits.ndim != 2 or len(logits) != len(targets) or targets.ndim != 1:
        raise OutputError(
            f"the model's logits have shape {tuple(logits.shape)} and the targets {tuple(targets.shape)}; "
            f"(examples, classes) and (examples,) were expected: choose another output function, or wrap the model"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise OutputError(f"the targets are {targets.dtype}; class labels must be whole numbers: use targets.long()")
    labels = targets.long()
    wrong = ((labels < 0) | (labels >= logits.shape[1])).nonzero()
    if len(wrong):
        raise OutputError(
            f"label {int(labels[wrong[0, 0]])} is outside the model's {logits.shape[1]} classes (0 to "
            f"{logits.shape[1] - 1}), first at position {int(wrong[0, 0])} of this batch; correct the targets"
        )
    return logits.float(), labels
