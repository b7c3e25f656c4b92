"""Outputs of causal language models: margins and log-probabilities of tokens, and choices between answers.

Targets are (examples, length): at each position the token that should come next, and `UNREAD` where nothing is read, as
at padding. `coar.token_examples` makes them from a tokenizer's result, with padding on either side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor
from torch.nn import functional

from coar.errors import OutputError, SettingsError
from coar.examples import UNREAD
from coar.outputs.base import Against, Margin, Output, find_logits, whole_numbers
from coar.outputs.classification import margins


@dataclass(frozen=True)
class TokensRead:
    """What a model says at the positions that are read.

    Attributes:
        logits: (positions, vocabulary) float32.
        tokens: (positions,) what should come next.
        rows: (positions,) which example each is of.
        counts: (examples,) how many positions each example has.
    """

    logits: Tensor
    tokens: Tensor
    rows: Tensor
    counts: Tensor

    def total(self, values: Tensor) -> Tensor:
        """Return (examples,) sums of (positions,) values."""
        return values.new_zeros(len(self.counts)).index_add(0, self.rows, values)

    def mean(self, values: Tensor) -> Tensor:
        """Return (examples,) means of (positions,) values."""
        return self.total(values) / self.counts


class TokenMargin(Margin):
    """Logit of the token that comes next minus what the other tokens offer against it.

    Attributes:
        reduction: `mean` over all tokens of a text, as published for GPT-2 (Shah et al. 2024), or its `last` token.
        against: `logsumexp` of the other tokens' logits, which makes it the log-odds of the token; or the `largest` of
            them, positive exactly where the token is predicted.
    """

    reduction: Literal["mean", "last"] = "mean"

    def hard_and_smooth(self) -> tuple[Output, Output] | None:
        """Return both margins of the last token; None for a mean over tokens, whose sign says nothing of any."""
        return super().hard_and_smooth() if self.reduction == "last" else None

    def positions_read(self, targets: Tensor) -> Tensor | None:
        """Return (examples, length) truth values, where a token is read."""
        return positions_read(targets, last=self.reduction == "last")

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) margins."""
        read = token_logits(result, targets, last=self.reduction == "last")
        return read.mean(margins(read.logits, read.tokens, self.against))


class TokenLogProbability(Output):
    """Log-probability of the token that comes next, in nats.

    Attributes:
        reduction: `mean` over all tokens of a text, their `sum`, which is the log-probability of the text after its
            first token, or its `last` token.
    """

    reduction: Literal["mean", "sum", "last"] = "mean"

    def positions_read(self, targets: Tensor) -> Tensor | None:
        """Return (examples, length) truth values, where a token is read."""
        return positions_read(targets, last=self.reduction == "last")

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) log-probabilities."""
        read = token_logits(result, targets, last=self.reduction == "last")
        values = -functional.cross_entropy(read.logits, read.tokens, reduction="none")
        return read.total(values) if self.reduction == "sum" else read.mean(values)


class ChoiceMargin(Margin):
    """Logit of the correct answer's token minus what the other answers offer against it, after a question's last token.

    Attributes:
        answers: Tokens of all answers; the correct one is each example's last target.
        against: The `largest` of the other answers' logits, positive exactly where the correct answer would be chosen;
            or their `logsumexp`, which is smooth.
    """

    answers: tuple[int, ...]
    against: Against = "largest"

    @field_validator("answers")
    @classmethod
    def _can_be_told_apart(cls, answers: tuple[int, ...]) -> tuple[int, ...]:
        if len(answers) < 2 or len(set(answers)) < len(answers) or min(answers) < 0:
            raise ValueError(f"{answers} are not two or more different tokens")
        return answers

    @classmethod
    def of(cls, tokenizer: Any, answers: Sequence[str], *, against: Against = "largest") -> "ChoiceMargin":
        """Make the output for answers in words.

        Args:
            tokenizer: A tokenizer of transformers; all that is used is `encode`.
            answers: One token each; for most tokenizers with the space in front that stands before them in a text.
            against: As above.

        Raises:
            SettingsError: When an answer is no token or more than one, or two are the same.
        """
        tokens = [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]
        for answer, ids in zip(answers, tokens, strict=True):
            if len(ids) != 1:
                raise SettingsError(
                    f"the answer {answer!r} is {len(ids)} tokens, {ids}, and one is expected; choose other words for "
                    f"the answers, such as letters, or with or without a space in front"
                )
        return cls(answers=tuple(ids[0] for ids in tokens), against=against)

    def positions_read(self, targets: Tensor) -> Tensor | None:
        """Return (examples, length) truth values, where a token is read."""
        return positions_read(targets, last=True)

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) margins.

        Raises:
            OutputError: When a target is none of the answers, or an answer is outside the vocabulary.
        """
        read = token_logits(result, targets, last=True)
        answers = torch.tensor(self.answers, device=read.logits.device)
        if int(answers.max()) >= read.logits.shape[1]:
            raise OutputError(
                f"the answer {int(answers.max())} is outside the model's vocabulary of {read.logits.shape[1]} tokens; "
                f"take the answers from this model's tokenizer"
            )
        correct = read.tokens[:, None] == answers  # (examples, answers)
        if not bool(correct.any(1).all()):
            row = int((~correct.any(1)).nonzero()[0, 0])
            raise OutputError(
                f"the token {int(read.tokens[row])} that example {row} of this batch should end with is none of the "
                f"answers {self.answers}; give the correct answers to coar.token_examples, or correct these"
            )
        return margins(read.logits[:, answers], correct.int().argmax(1), self.against)


def token_logits(result: Any, targets: Tensor, *, last: bool = False) -> TokensRead:
    """Return what a model says at the positions that have a target, or at the last of these in every example.

    Args:
        result: What the model returned, with (examples, length, vocabulary) logits.
        targets: (examples, length) tokens that should come next, `UNREAD` where nothing is read.
        last: Whether to read the last such position alone.

    Raises:
        OutputError: When shapes do not fit, an example has no target, or a target is outside the vocabulary.
    """
    logits = find_logits(result)
    if logits.ndim != 3 or targets.ndim != 2 or logits.shape[:2] != targets.shape:
        raise OutputError(
            f"the model's logits have shape {tuple(logits.shape)} and the targets {tuple(targets.shape)}; (examples, "
            f"length, vocabulary) and (examples, length) were expected: make the examples with coar.token_examples, "
            f"and let the model return the logits of all positions"
        )
    tokens = whole_numbers(targets)
    read = tokens != UNREAD
    counts = read.sum(1)
    if not bool(counts.all()):
        raise OutputError(
            f"example {int((counts == 0).nonzero()[0, 0])} of this batch has no token to read; make the examples with "
            f"coar.token_examples, which refuses such texts"
        )
    wrong = read & ((tokens < 0) | (tokens >= logits.shape[2]))
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise OutputError(
            f"token {int(tokens[row, column])} is outside the model's vocabulary of {logits.shape[2]} tokens, first in "
            f"example {row} of this batch; use the tokenizer that belongs to the model"
        )
    if last:
        read, counts = _last(read), torch.ones_like(counts)
    rows, columns = read.nonzero(as_tuple=True)
    return TokensRead(logits[rows, columns].float(), tokens[rows, columns], rows, counts)


def positions_read(targets: Tensor, *, last: bool) -> Tensor | None:
    """Return (examples, length) truth values, where there is a target, or the last one; None for other targets."""
    if targets.ndim != 2:
        return None
    read = targets != UNREAD
    return _last(read) if last else read


def _last(read: Tensor) -> Tensor:
    """Return truth values of which only the last true one in every row is left."""
    return read & (read.flip(1).cumsum(1).flip(1) == 1)
