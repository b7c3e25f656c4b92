"""What every output function is, and where the logits are in what models return."""

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from coar.errors import OutputError
from coar.settings import Settings

Against = Literal["logsumexp", "largest"]


class Output(Settings):
    """Base of all output functions: settings that turn a model's result into one number per example."""

    @abstractmethod
    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) outputs from the model's result and the (examples, ...) targets."""

    def read(self, result: Any, targets: Tensor) -> Tensor:
        """Call the function, and raise `OutputError` when it does not return one real number per example."""
        values = self(result, targets)
        if not isinstance(values, Tensor) or values.shape != targets.shape[:1]:
            given = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise OutputError(
                f"{type(self).__name__} returned {given} for {len(targets)} examples; a tensor of shape "
                f"({len(targets)},) was expected: return one number per example, such as a mean over all other axes"
            )
        if values.is_complex():
            raise OutputError(
                f"{type(self).__name__} returned {values.dtype} numbers; real ones were expected: return their real "
                f"part or their size"
            )
        return values

    def positions_read(self, targets: Tensor) -> Tensor | None:  # noqa: ARG002
        """Return (examples, length) truth values, at which positions of a text logits are read, for its targets.

        Logits elsewhere need not be computed then. None, unless a class says otherwise, stands for all of them.
        """
        return None

    def hard_and_smooth(self) -> "tuple[Output, Output] | None":
        """Return a margin that is positive exactly where the example is correct, and one with a gradient everywhere.

        Edits are chosen and judged by these two. None, unless a class says otherwise, means that the output's sign
        does not say whether an example is correct.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """Return the name and settings that identify this function in a run's fingerprint."""
        return {"name": type(self).__name__, **self.model_dump(mode="json")}


class Margin(Output):
    """Base of margins that are taken against several competitors.

    Attributes:
        against: The `largest` competitor, which makes the margin positive exactly where the example is correct; or the
            `logsumexp` of all of them, which is smooth.
    """

    against: Against = "logsumexp"

    def hard_and_smooth(self) -> tuple[Output, Output] | None:
        """Return the margin against the largest competitor, and against their log-sum-exp."""
        return self.model_copy(update={"against": "largest"}), self.model_copy(update={"against": "logsumexp"})


def find_logits(result: Any) -> Tensor:
    """Return the logits in a model's result, of whatever shape.

    Raises:
        OutputError: When it holds none.
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
    return logits


def whole_numbers(targets: Tensor) -> Tensor:
    """Return targets as int64; raise `OutputError` when they are no labels."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise OutputError(f"the targets are {targets.dtype}; class labels must be whole numbers: use targets.long()")
    return targets.long()
