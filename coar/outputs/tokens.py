"""Outputs of causal language models: margins and log-probabilities of tokens, and choices between answers.

Targets are (examples, length): at each position the next token, or `UNREAD` where no logits are read, such as at
padding. With wrong answers they are (examples, length, 2, tokens): answers and wrong answers, filled up with `UNREAD`.
`coar.token_examples` makes them from a tokenizer's result, with padding on either side.

In the formulas of the classes, T is the set of positions of text x that have a target, y_t is the target at position t,
and l_{t,v} is the logit of token v at position t under the ablation.
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
    """The logits and targets at the positions that are read, those of all examples in one sequence.

    Attributes:
        logits: (positions, vocabulary) float32 logits.
        tokens: (positions,) targets.
        rows: (positions,) number of the example that each position belongs to.
        counts: (examples,) number of positions of each example.
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
    """Margin of the next token over all other tokens, averaged over a text.

    f_M(x, C') = (1 / |T|) sum_{t in T} (l_{t,y_t} - max_{v != y_t} l_{t,v}) with `against="largest"`, the model output
    of Shah et al. (2024) for GPT-2. With `against="logsumexp"`, log sum_{v != y_t} exp(l_{t,v}) replaces the maximum
    and each term is the log-odds of the token. With `reduction="last"`, only the last position of T counts.

    Attributes:
        reduction: `mean` over all tokens of a text, or its `last` token.
        against: `logsumexp` or `largest`, as in `CorrectClassMargin`.
    """

    reads_logits_of = "classes"
    reduction: Literal["mean", "last"] = "mean"

    def hard_and_smooth(self) -> tuple[Output, Output] | None:
        """Return both margins of the last token; None for a mean over tokens."""
        return super().hard_and_smooth() if self.reduction == "last" else None

    def positions_read(self, targets: Tensor) -> Tensor | None:
        """Return the positions that are read, as (examples, length) booleans."""
        return target_positions(targets, last=self.reduction == "last")

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) margins."""
        read = token_logits(result, targets, last=self.reduction == "last")
        return read.mean(margins(read.logits, read.tokens, self.against))


class TokenLogProbability(Output):
    """Log-probability of the next token, in nats.

    f_M(x, C') = sum_{t in T} log p_t(y_t) with `reduction="sum"`, where p_t is the softmax of l_t: the log-probability
    of the text given its first token. `mean` divides it by |T|, which gives the negative of the usual language model
    loss; with `last`, only the last position of T counts.

    Attributes:
        reduction: `mean`, `sum` or `last`.
    """

    reads_logits_of = "classes"

    reduction: Literal["mean", "sum", "last"] = "mean"

    def positions_read(self, targets: Tensor) -> Tensor | None:
        """Return the positions that are read, as (examples, length) booleans."""
        return target_positions(targets, last=self.reduction == "last")

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) log-probabilities."""
        read = token_logits(result, targets, last=self.reduction == "last")
        values = -functional.cross_entropy(read.logits, read.tokens, reduction="none")
        return read.total(values) if self.reduction == "sum" else read.mean(values)


class ChoiceMargin(Margin):
    """Margin of the correct answer over the other answers of a multiple-choice question.

    f_M(x, C') = l_{t,y} - max_{a in A, a != y} l_{t,a} with `against="largest"`, where t is the last position of the
    question, A are the tokens of all answers and y is the correct one: positive exactly where the model would choose
    the correct answer, as multiple choice is scored in Hendrycks et al. (2021, "Measuring massive multitask language
    understanding"). With `against="logsumexp"`, log sum_{a in A, a != y} exp(l_{t,a}) replaces the maximum.

    Attributes:
        answers: Tokens A of all answers; the correct one is each example's last target.
        against: `largest` or `logsumexp`, as in `CorrectClassMargin`.
    """

    answers: tuple[int, ...]
    against: Against = "largest"

    @field_validator("answers")
    @classmethod
    def _are_distinct(cls, answers: tuple[int, ...]) -> tuple[int, ...]:
        if len(answers) < 2 or len(set(answers)) < len(answers) or min(answers) < 0:
            raise ValueError(f"{answers} are not two or more different tokens")
        return answers

    @classmethod
    def of(cls, tokenizer: Any, answers: Sequence[str], *, against: Against = "largest") -> "ChoiceMargin":
        """Return the output for answers given as words.

        Args:
            tokenizer: A tokenizer of transformers; only its `encode` is used.
            answers: Words of one token each; for most tokenizers they need the space that precedes them in a text.
            against: As above.

        Raises:
            SettingsError: When an answer is not exactly one token, or two answers are the same token.
        """
        tokens = [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]
        for answer, ids in zip(answers, tokens, strict=True):
            if len(ids) != 1:
                raise SettingsError(
                    f"the answer {answer!r} is {len(ids)} tokens, {ids}, and one is expected; choose other words for "
                    f"the answers, such as letters, or add or remove a leading space"
                )
        return cls(answers=tuple(ids[0] for ids in tokens), against=against)

    def positions_read(self, targets: Tensor) -> Tensor | None:
        """Return the positions that are read, as (examples, length) booleans."""
        return target_positions(targets, last=True)

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) margins.

        Raises:
            OutputError: When a target is not one of the answers, or an answer is outside the vocabulary.
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


class LogitDifference(Output):
    """Logits of the answers less those of wrong answers, at one position of each text.

    f_M(x, C') = (1 / |A|) sum_{a in A} l_{t,a} - (1 / |W|) sum_{w in W} l_{t,w}, where A are the answers and W the
    wrong answers of x, and t is the position that is read. With one of each it is the logit difference of Wang et al.
    (2023, "Interpretability in the wild"), which is positive exactly where the model prefers the answer. Targets are
    those of `coar.token_examples` with `answers=` and `wrong=`.
    """

    def hard_and_smooth(self) -> tuple[Output, Output] | None:
        """Return the difference itself, which is both."""
        return self, self

    def positions_read(self, targets: Tensor) -> Tensor | None:
        """Return the positions that are read, as (examples, length) booleans."""
        return target_positions(targets, last=True)

    def __call__(self, result: Any, targets: Tensor) -> Tensor:
        """Return (examples,) differences of logits.

        Raises:
            OutputError: When targets have no wrong answers, or one is outside the vocabulary.
        """
        logits, tokens, read = _checked(result, targets)
        if tokens.ndim != 4:
            raise OutputError(
                f"the targets have shape {tuple(targets.shape)}, one token for each position, and LogitDifference "
                f"compares answers with wrong answers; make the examples with coar.token_examples(answers=..., "
                f"wrong=...)"
            )
        read = _last(read)
        found = tokens[read]  # (examples, 2, tokens)
        given = found != UNREAD
        values = logits[read].float().gather(1, found.where(given, 0).flatten(1)).view(found.shape)
        means = values.where(given, 0).sum(2) / given.sum(2)
        return means[:, 0] - means[:, 1]


def token_logits(result: Any, targets: Tensor, *, last: bool = False) -> TokensRead:
    """Return the logits at the positions that have a target, or at the last of these in every example.

    Args:
        result: The model's result, with (examples, length, vocabulary) logits.
        targets: (examples, length) next tokens, or (examples, length, 2, tokens) with one answer for each example;
            `UNREAD` where no logits are read.
        last: Whether to read only the last such position.

    Raises:
        OutputError: When shapes do not fit, an example has no target or several answers, or a target is outside the
            vocabulary.
    """
    logits, tokens, read = _checked(result, targets)
    if tokens.ndim == 4:
        several = (tokens[:, :, 0, 1:] != UNREAD).flatten(1).any(1).nonzero()
        if len(several):
            raise OutputError(
                f"example {int(several[0])} of this batch has several answers, and this output reads one; use "
                f"coar.LogitDifference, or give one answer for each example"
            )
        tokens = tokens[:, :, 0, 0]
    if last:
        read = _last(read)
    rows, columns = read.nonzero(as_tuple=True)
    return TokensRead(logits[rows, columns].float(), tokens[rows, columns], rows, read.sum(1))


def target_positions(targets: Tensor, *, last: bool) -> Tensor | None:
    """Return (examples, length) booleans: the positions that have a target, or the last of them.

    None for targets that are not (examples, length) or (examples, length, 2, tokens).
    """
    if targets.ndim not in (2, 4):
        return None
    read = _with_target(targets)
    return _last(read) if last else read


def _with_target(targets: Tensor) -> Tensor:
    """Return (examples, length) booleans: the positions that have a target."""
    return (targets != UNREAD).view(*targets.shape[:2], -1).any(2)


def _checked(result: Any, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, targets as int64, and the (examples, length) positions that have a target.

    Raises:
        OutputError: When shapes do not fit, an example has no target, or a target is outside the vocabulary.
    """
    logits = find_logits(result)
    if logits.ndim != 3 or targets.ndim not in (2, 4) or logits.shape[:2] != targets.shape[:2]:
        raise OutputError(
            f"the model's logits have shape {tuple(logits.shape)} and the targets {tuple(targets.shape)}; (examples, "
            f"length, vocabulary) and (examples, length) were expected: make the examples with coar.token_examples, "
            f"and let the model return the logits of all positions"
        )
    tokens = whole_numbers(targets)
    read = _with_target(tokens)
    if not bool(read.any(1).all()):
        raise OutputError(
            f"example {int((~read.any(1)).nonzero()[0, 0])} of this batch has no token to read; make the examples with "
            f"coar.token_examples, which refuses such texts"
        )
    wrong = (tokens != UNREAD) & ((tokens < 0) | (tokens >= logits.shape[2]))
    if bool(wrong.any()):
        at = wrong.nonzero()[0]
        raise OutputError(
            f"token {int(tokens[tuple(at)])} is outside the model's vocabulary of {logits.shape[2]} tokens, first in "
            f"example {int(at[0])} of this batch; use the tokenizer that belongs to the model"
        )
    return logits, tokens, read


def _last(read: Tensor) -> Tensor:
    """Return booleans that keep only the last true one of every row."""
    return read & (read.flip(1).cumsum(1).flip(1) == 1)
