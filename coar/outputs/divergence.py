"""Outputs that compare the ablated model with the unablated one."""

from typing import Any, Literal

import torch
from torch import Tensor

from coar.errors import OutputError
from coar.examples import UNREAD
from coar.outputs.base import RelativeOutput, find_logits

UNREAD_LOG_PROBABILITY = torch.inf  # in a reference, at positions whose logits are not read


class KLDivergence(RelativeOutput):
    """Kullback-Leibler divergence of the ablated model's predictions from the unablated model's, in nats.

    f_M(x, C') = (1 / |T|) sum_{t in T} sum_v q_{t,v} (log q_{t,v} - log p_{t,v}), where q_t and p_t are the softmax of
    the unablated and of the ablated model's logits, and T are the positions of text x that have a target; which token
    the target is does not matter. For a classifier with (examples, classes) logits T is one. `sum` leaves out the
    division; with `last`, only the last position of T counts.

    A smaller output is better here, as with losses: it is 0 for the unablated model, so `Optimal(loss=KLDivergence())`
    is possible, and a component that keeps predictions as they are has a negative attribution. The unablated model is
    the minimum, so all gradients by gates are 0 there: take mask gradients under random masks, or of another output.

    Attributes:
        reduction: `mean`, `sum` or `last`, over the positions of a text.
    """

    reads_logits_of = "classes"

    reduction: Literal["mean", "sum", "last"] = "mean"

    def positions_read(self, targets: Tensor) -> Tensor | None:
        """Return the positions that are read, as (examples, length) booleans."""
        if targets.ndim < 2:
            return None
        read = (targets != UNREAD).flatten(2).any(2) if targets.ndim > 2 else targets != UNREAD
        return read & (read.flip(1).cumsum(1).flip(1) == 1) if self.reduction == "last" else read

    def reference(self, result: Any, targets: Tensor) -> Tensor:
        """Return the unablated model's log-probabilities.

        Returns:
            (examples, classes), or (examples, length, vocabulary) that are inf at positions that are not read.

        Raises:
            OutputError: When logits and targets do not fit, or an example has no position to read.
        """
        logits, read = find_logits(result), self.positions_read(targets)
        positions = logits.shape[:2] if logits.ndim == 3 else logits.shape[:1]
        if logits.ndim not in (2, 3) or positions != (targets if read is None else read).shape:
            raise OutputError(
                f"the model's logits have shape {tuple(logits.shape)} and the targets {tuple(targets.shape)}; "
                f"(examples, classes) and (examples,), or (examples, length, vocabulary) and (examples, length) were "
                f"expected: choose another output function, or wrap the model"
            )
        if read is None:
            return logits.float().log_softmax(-1)
        if not bool(read.any(1).all()):
            raise OutputError(
                f"example {int((~read.any(1)).nonzero()[0, 0])} of this batch has no position to read; make the "
                f"examples with coar.token_examples, which refuses such texts"
            )
        found = torch.full(logits.shape, UNREAD_LOG_PROBABILITY, device=logits.device)
        found[read] = logits[read].float().log_softmax(-1)
        return found

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) divergences.

        Args:
            result: The ablated model's result.
            targets: What `reference` returned of the unablated model's.

        Raises:
            OutputError: When `targets` are not such log-probabilities.
        """
        logits = find_logits(result)
        if not targets.is_floating_point() or logits.shape != targets.shape:
            raise OutputError(
                f"the model's logits have shape {tuple(logits.shape)} and the unablated model's log-probabilities are "
                f"{targets.dtype} of shape {tuple(targets.shape)}; give KLDivergence what its reference(result, "
                f"targets) returned for the unablated model's result on the same inputs"
            )
        read = targets[..., 0] != UNREAD_LOG_PROBABILITY
        values = _divergences(targets[read], logits[read].float().log_softmax(-1))
        if read.ndim == 1:
            return values
        totals = values.new_zeros(len(read)).index_add(0, read.nonzero()[:, 0], values)
        return totals if self.reduction == "sum" else totals / read.sum(1)


def _divergences(expected: Tensor, found: Tensor) -> Tensor:
    """Return (rows,) divergences of the second log-probabilities, (rows, classes), from the first.

    Since probabilities sum to 1, sum q (log q - log p) = sum q (exp(d) - 1 - d) with d = log p - log q. No term of the
    second sum is negative, so small divergences are no difference of large numbers.
    """
    possible = expected != -torch.inf
    d = (found - expected).where(possible, 0)
    q, p = expected.exp(), found.exp()
    near = d.clamp(max=1.0)  # beyond, exp(d) might overflow
    terms = torch.where(d < 1, q * (near.expm1() - near), p - q - q * d)
    return terms.where(possible, p).sum(-1)
