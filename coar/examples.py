"""The examples of a study: inputs, targets and metadata columns of equal length."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from coar.errors import ExamplesError
from coar.inputs import Inputs, as_inputs, as_targets, batch_of

UNREAD = -100  # the target of a position whose logits are not read, as in torch's cross entropy
HASH_BLOCK = 256  # examples hashed at a time, so that a data set on disk is never in memory as a whole


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Inputs, targets and metadata, in one fixed order.

    Attributes:
        inputs: A tensor (examples, ...), a dict of such tensors that the model receives by name, or a torch data set
            whose items are an input, a dict of inputs, or a tuple that starts with one. A data set is read block by
            block, with one call for a block where it has `__getitems__`, as torch's loader does. Arrays and data frames
            become tensors, float64 ones of NumPy float32; a mapping, such as a tokenizer's result, becomes a dict.
        targets: (examples,) class labels, or other targets that the output function reads; a tensor, an array or a
            list.
        metadata: Columns of one value per example; `id` (0, 1, ...) and `label` (integer targets) are added when
            missing.

    Raises:
        ExamplesError: When there are no examples, lengths differ, or a metadata column is not a vector of values.
    """

    inputs: Inputs | Dataset[Any]
    targets: Tensor
    metadata: Mapping[str, Sequence[Any] | np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", as_inputs(self.inputs))
        object.__setattr__(self, "targets", as_targets(self.targets))
        n = len(self.targets)
        if n == 0:
            raise ExamplesError("there are no examples; give at least one input with its target")
        for name, length in self._lengths().items():
            if length is None:
                raise ExamplesError(f"{name} has no length; give one entry per example")
            if length != n:
                raise ExamplesError(f"{name} has {length} entries but targets has {n}; give one entry per example")
        columns = {name: np.asarray(column) for name, column in self.metadata.items()}
        columns.setdefault("id", np.arange(n))
        if self.targets.ndim == 1 and not self.targets.is_floating_point():
            columns.setdefault("label", self.targets.cpu().numpy())
        for name, column in columns.items():
            if column.ndim != 1 or column.dtype.kind not in "biufU":
                raise ExamplesError(
                    f"metadata column {name!r} has shape {column.shape} and type {column.dtype}; give one number, "
                    f"boolean or string per example"
                )
            if not name.isidentifier():
                raise ExamplesError(
                    f"metadata column {name!r} is not a valid name; rename it to one word, such as 'my_column'"
                )
        object.__setattr__(self, "metadata", columns)

    def _lengths(self) -> dict[str, int | None]:
        parts: dict[str, Any] = {f"metadata[{name!r}]": column for name, column in self.metadata.items()}
        if isinstance(self.inputs, dict):
            parts |= {f"inputs[{name!r}]": value for name, value in self.inputs.items()}
        else:
            parts["inputs"] = self.inputs
        return {name: len(part) if hasattr(part, "__len__") else None for name, part in parts.items()}

    def __len__(self) -> int:
        return len(self.targets)

    def block(self, start: int, stop: int) -> tuple[Inputs, Tensor]:
        """Return inputs and targets of examples `start` up to `stop`, which is excluded.

        Raises:
            ExamplesError: When the inputs of a data set differ in shape.
        """
        targets = self.targets[start:stop]
        if isinstance(self.inputs, dict):
            return {name: value[start:stop] for name, value in self.inputs.items()}, targets
        if isinstance(self.inputs, Tensor):
            return self.inputs[start:stop], targets
        rows = list(range(start, min(stop, len(self))))
        at_once = getattr(self.inputs, "__getitems__", None)
        items = at_once(rows) if at_once else [self.inputs[i] for i in rows]
        return batch_of(items, f"the inputs of examples {start} to {start + len(items) - 1}"), targets

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """Return the examples at these positions, in this order, or where a boolean array is true.

        Raises:
            ExamplesError: When a position is outside the examples.
        """
        chosen = np.asarray(indices)
        rows = torch.as_tensor(np.flatnonzero(chosen) if chosen.dtype == bool else chosen, dtype=torch.long)
        if len(rows) and not -len(self) <= int(rows.min()) <= int(rows.max()) < len(self):
            raise ExamplesError(f"a subset reaches beyond the {len(self)} examples; positions are counted from 0")
        inputs: Inputs | Dataset[Any]
        if isinstance(self.inputs, dict):
            inputs = {name: value[rows] for name, value in self.inputs.items()}
        elif isinstance(self.inputs, Tensor):
            inputs = self.inputs[rows]
        else:
            inputs = torch.utils.data.Subset(self.inputs, rows.tolist())
        metadata = {name: np.asarray(column)[rows.numpy()] for name, column in self.metadata.items()}
        return Examples(inputs=inputs, targets=self.targets[rows], metadata=metadata)

    def input_hashes(self) -> list[bytes]:
        """Return a hash of each example's inputs, equal for equal inputs; a data set is read once."""
        hashes = []
        for start in range(0, len(self), HASH_BLOCK):
            inputs, targets = self.block(start, start + HASH_BLOCK)
            parts = inputs if isinstance(inputs, dict) else {"": inputs}
            for i in range(len(targets)):
                digest = hashlib.sha256()
                for name in sorted(parts):
                    update_digest(digest, name, parts[name][i])
                hashes.append(digest.digest())
        return hashes

    def fingerprint(self) -> str:
        """Return the SHA-256 of inputs, targets and metadata in order, in hexadecimal; a data set is read once."""
        digest = hashlib.sha256()
        for start in range(0, len(self), HASH_BLOCK):
            inputs, targets = self.block(start, start + HASH_BLOCK)
            parts = inputs if isinstance(inputs, dict) else {"": inputs}
            for name in sorted(parts):
                update_digest(digest, name, parts[name])
            update_digest(digest, "targets", targets)
        for name in sorted(self.metadata):
            column = np.asarray(self.metadata[name])
            digest.update(f"{name}:{column.tolist()}".encode())
        return digest.hexdigest()


def token_examples(
    tokens: Mapping[str, Any],
    *,
    answers: Tensor | None = None,
    metadata: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
) -> Examples:
    """Return examples for a causal language model, whose targets are the next tokens.

    At every position that has a token and a next token, the target is that next token; elsewhere it is -100, and no
    logits are read. Where texts have padding on the left, `position_ids` that count from their first tokens are added
    to the inputs, as in transformers' generation; pad on the right for models that take none.

    Args:
        tokens: The result of a tokenizer with `return_tensors="pt"`: `input_ids` and `attention_mask` (examples,
            length), 1 where there is a token, and other inputs of the model.
        answers: (examples,) tokens of the correct answers, one after each text; they are then the only targets, each
            at its text's last token.
        metadata: Columns of one value per example.

    Raises:
        ExamplesError: When there is no attention mask, tokens are missing between others, or a text is too short.
    """
    ids, mask = _tokens_and_mask(tokens)
    lengths = mask.sum(1)
    shortest = 2 if answers is None else 1
    if int(lengths.min()) < shortest:
        raise ExamplesError(
            f"example {int(lengths.argmin())} has {int(lengths.min())} tokens and at least {shortest} are needed; "
            f"leave such texts out"
        )
    targets = torch.full_like(ids, UNREAD, dtype=torch.long)
    if answers is None:
        follows = mask[:, :-1] & mask[:, 1:]
        targets[:, :-1][follows] = ids[:, 1:][follows].long()
    else:
        if answers.shape != lengths.shape or answers.is_floating_point():
            raise ExamplesError(
                f"answers are {answers.dtype} of shape {tuple(answers.shape)}; give one token, a whole number, for "
                f"each of the {len(ids)} examples"
            )
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        targets[torch.arange(len(ids)), last] = answers.long()
    inputs = dict(tokens)
    if not bool(mask[:, 0].all()):
        inputs.setdefault("position_ids", (mask.long().cumsum(1) - 1).clamp(min=0))
    return Examples(inputs=inputs, targets=targets, metadata=metadata or {})


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


@overload
def rows_of(inputs: dict[str, Tensor], part: slice | Tensor) -> dict[str, Tensor]: ...
@overload
def rows_of(inputs: Inputs, part: slice | Tensor) -> Inputs: ...
def rows_of(inputs: Inputs, part: slice | Tensor) -> Inputs:
    """Return the rows of inputs that a slice or a tensor of positions selects."""
    return {name: value[part] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[part]


def update_digest(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Add a tensor's name, type, shape and bytes to a running hash."""
    digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """Run the model on inputs moved to its device: a tensor as the first argument, a dict by name."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(inputs, dict):
        return model(**{name: value.to(device) for name, value in inputs.items()})
    return model(inputs.to(device))
