"""The base classes of output functions, and the logits in a model's result.

An output function is f_M(x, C') of Shah, Ilyas and Madry (2024, "Decomposing and editing predictions by modeling model
computation"): one number for example x and model M with the components C' ablated. In the formulas of the classes,
l_c is the logit that M gives class or token c for x under that ablation, and y is the target of x.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from coar.errors import OutputError
from coar.settings import Settings

Against = Literal["logsumexp", "largest"]


class Output(Settings):
    """Base of all output functions, which map a model's result to one number per example; fields are settings.

    Attributes:
        reads_logits_of: Whether it reads logits of `classes`, of which one is correct, or of `answers` of yes or no; a
            model that returns probabilities is refused then. None, the default, for outputs that read any numbers.
    """

    reads_logits_of: ClassVar[Literal["classes", "answers"] | None] = None

    @abstractmethod
    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) outputs from the model's result and the (examples, ...) targets."""

    def read(self, result: Any, targets: Tensor) -> Tensor:
        """Call the function and check its result.

        Returns:
            (examples,) real outputs.

        Raises:
            OutputError: When the function does not return one real number per example.
        """
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
        """Return the positions of each text at which logits are read, as (examples, length) booleans.

        The model need not compute logits at other positions. None, the default, stands for all positions.
        """
        return None

    def hard_and_smooth(self) -> "tuple[Output, Output] | None":
        """Return a margin that is positive exactly where the example is correct, and one with a gradient everywhere.

        Edits are chosen and judged by these two. None, the default, means that the output's sign does not show whether
        an example is correct.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """Return the name and settings that identify this function in a run's fingerprint."""
        return {"name": type(self).__name__, **self.model_dump(mode="json")}


class RelativeOutput(Output):
    """Base of outputs that compare the ablated model with the unablated one.

    Before any mask, the unablated model is run once on each block of examples, and `reference` says what is kept of its
    result. The function gets this in place of the targets.
    """

    @abstractmethod
    def reference(self, result: Any, targets: Tensor) -> Tensor:
        """Return what is kept of the unablated model's result, a tensor (examples, ...).

        Args:
            result: The result of the unablated model.
            targets: (examples, ...) targets of the examples.
        """


class Margin(Output):
    """Base of margins against several competitors.

    Attributes:
        against: The `largest` competitor, which makes the margin positive exactly where the example is correct; or the
            `logsumexp` of all of them, which is smooth.
    """

    against: Against = "logsumexp"

    def hard_and_smooth(self) -> tuple[Output, Output] | None:
        """Return the margin against the largest competitor, and against their log-sum-exp."""
        return self.model_copy(update={"against": "largest"}), self.model_copy(update={"against": "logsumexp"})


def find_logits(result: Any) -> Tensor:
    """Return the logits in a model's result, a tensor of any shape.

    Raises:
        OutputError: When the result has none.
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
    """Return targets as int64; raise `OutputError` when they are not whole numbers."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise OutputError(f"the targets are {targets.dtype}; class labels must be whole numbers: use targets.long()")
    return targets.long()
