"""Examples of texts for causal language models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coar.errors import ExamplesError
from coar.examples import UNREAD, Examples

Answers = Tensor | Sequence[int] | Sequence[Sequence[int]]
Positions = Mapping[str, Sequence[int] | np.ndarray | Tensor]


def token_examples(
    tokens: Mapping[str, Any],
    *,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    positions: Positions | None = None,
    read: str | None = None,
    metadata: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
) -> Examples:
    """Return examples for a causal language model, whose targets are the next tokens.

    At every position that has a token and a next token, the target is that next token; elsewhere it is -100, and no
    logits are read. Where texts have padding on the left, `position_ids` that count from their first tokens are added
    to the inputs, as in transformers' generation; pad on the right for models that take none.

    Args:
        tokens: The result of a tokenizer with `return_tensors="pt"`: `input_ids` and `attention_mask` (examples,
            length), 1 where there is a token, and other inputs of the model.
        answers: The token of the correct answer after each text; it is then the only target, at the text's last token.
            With `wrong`, one or several tokens for each text, which need not be as many for all.
        wrong: One or several tokens of wrong answers for each text. Targets are then (examples, length, 2, tokens):
            answers and wrong answers, filled up with -100. `LogitDifference` compares them; outputs that read one
            token read the answer.
        positions: Named positions, such as `{"subject_last": [4, 2]}`: for each example the number of a token of its
            text, from 0, or from -1 backwards; padding does not count.
        read: The named position that alone is read, instead of all positions or the last one.
        metadata: Columns of one value per example.

    Raises:
        ExamplesError: When there is no attention mask, tokens are missing between others, a text is too short, answers
            are not whole numbers, or a position is outside its text.
    """
    ids, mask = _tokens_and_mask(tokens)
    lengths = mask.sum(1)
    shortest = 2 if answers is None else 1
    if int(lengths.min()) < shortest:
        raise ExamplesError(
            f"example {int(lengths.argmin())} has {int(lengths.min())} tokens and at least {shortest} are needed; "
            f"leave such texts out"
        )
    named = {name: _columns(name, given, mask) for name, given in (positions or {}).items()}
    if read is not None and read not in named:
        raise ExamplesError(
            f"the position to read, {read!r}, has no numbers; give positions={{{read!r}: [...]}}, or one of "
            f"{sorted(named)}"
        )
    at = None if read is None else named[read]
    if answers is not None:
        targets = _answer_targets(answers, wrong, _last(mask) if at is None else at, mask)
    elif wrong is not None:
        raise ExamplesError("wrong answers were given without the correct ones; give answers= too")
    else:
        targets = _next_tokens(ids, mask, at)
    inputs = dict(tokens)
    if not bool(mask[:, 0].all()):
        inputs.setdefault("position_ids", (mask.long().cumsum(1) - 1).clamp(min=0))
    columns = {name: column.numpy() for name, column in named.items()}
    return Examples(inputs=inputs, targets=targets, metadata=metadata or {}, positions=columns)


def _next_tokens(ids: Tensor, mask: Tensor, at: Tensor | None) -> Tensor:
    """Return (examples, length) next tokens, at all positions that have one or at one position of each example."""
    targets = torch.full_like(ids, UNREAD, dtype=torch.long)
    follows = mask[:, :-1] & mask[:, 1:]
    if at is not None:
        last = (at == _last(mask)).nonzero()
        if len(last):
            raise ExamplesError(
                f"the position to read is the last token of example {int(last[0])}, which has no next token; give "
                f"answers=, or another position"
            )
        follows &= torch.arange(mask.shape[1] - 1) == at[:, None]
    targets[:, :-1][follows] = ids[:, 1:][follows].long()
    return targets


def _answer_targets(answers: Answers, wrong: Answers | None, at: Tensor, mask: Tensor) -> Tensor:
    """Return targets with answers at one position of each example, and with wrong answers if there are any."""
    right = _token_lists("answers", answers, len(mask))
    rows = torch.arange(len(mask))
    if wrong is None:
        several = next((i for i, row in enumerate(right) if len(row) > 1), None)
        if several is not None:
            raise ExamplesError(
                f"example {several} has {len(right[several])} answers, {right[several]}, and one is expected; give one "
                f"token for each example, or the tokens that LogitDifference compares them with as wrong="
            )
        targets = torch.full(mask.shape, UNREAD)
        targets[rows, at] = torch.tensor([row[0] for row in right])
        return targets
    against = _token_lists("wrong", wrong, len(mask))
    for i, (own, others) in enumerate(zip(right, against, strict=True)):
        if set(own) & set(others):
            raise ExamplesError(
                f"token {min(set(own) & set(others))} of example {i} is both an answer and a wrong answer; remove it "
                f"from one of them"
            )
    most = max(map(len, right + against))
    targets = torch.full((*mask.shape, 2, most), UNREAD)
    filled = [[row + [UNREAD] * (most - len(row)) for row in side] for side in (right, against)]
    targets[rows, at] = torch.tensor(filled).transpose(0, 1)
    return targets


def _token_lists(name: str, given: Answers, examples: int) -> list[list[int]]:
    """Return the tokens of every example; raise `ExamplesError` when they are not one or more whole numbers each."""
    kind = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
    rows: Sequence[Any] = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    lists = [list(row) if isinstance(row, list | tuple) else [row] for row in rows]
    whole = all(row and all(isinstance(token, int | np.integer) and token >= 0 for token in row) for row in lists)
    if len(lists) != examples or not whole:
        raise ExamplesError(
            f"{name} are {kind}; give one token, a whole number, or with wrong= a list of tokens, for each of the "
            f"{examples} examples"
        )
    return lists


def _columns(name: str, given: Sequence[int] | np.ndarray | Tensor, mask: Tensor) -> Tensor:
    """Return (examples,) columns of `input_ids` for the numbers of tokens in each text."""
    array, lengths = np.asarray(given), mask.sum(1)
    if array.shape != lengths.shape or array.dtype.kind not in "iu":
        raise ExamplesError(
            f"the position {name!r} has shape {array.shape} and type {array.dtype}; give the number of a token for "
            f"each of the {len(lengths)} examples"
        )
    numbers = torch.from_numpy(array.astype(np.int64))
    outside = ((numbers < -lengths) | (numbers >= lengths)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ExamplesError(
            f"the position {name!r} of example {row} is {int(numbers[row])}, and its text has {int(lengths[row])} "
            f"tokens; count them from 0, or from -1 backwards"
        )
    return mask.int().argmax(1) + numbers % lengths


def _last(mask: Tensor) -> Tensor:
    """Return (examples,) columns of the last tokens."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


def _tokens_and_mask(tokens: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return (examples, length) tokens, and where they are text; raise `ExamplesError` when that is unknown."""
    for name in ("input_ids", "attention_mask"):
        if not isinstance(tokens.get(name), Tensor):
            raise ExamplesError(
                f"{name} is a {type(tokens.get(name)).__name__} and a tensor is expected; without it text and padding "
                f"cannot be distinguished; give the result of a tokenizer with padding=True and "
                f"return_tensors='pt' (or ones for texts of one length)"
            )
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    if ids.ndim != 2 or ids.shape != mask.shape or len(ids) == 0 or not bool(((mask == 0) | (mask == 1)).all()):
        raise ExamplesError(
            f"input_ids have shape {tuple(ids.shape)} and attention_mask {tuple(mask.shape)}; give both as (examples, "
            f"length), the mask 1 where there is a token and 0 where there is padding"
        )
    mask = mask.bool()
    interrupted = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0].int() > 1  # tokens begin more than once
    if bool(interrupted.any()):
        raise ExamplesError(
            f"the attention_mask of example {int(interrupted.int().argmax())} has zeros between ones; put padding "
            f"before a text or after it"
        )
    return ids, mask
