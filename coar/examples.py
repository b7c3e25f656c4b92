"""The examples a study is about: inputs, targets and metadata columns of equal length."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from coar.errors import ExamplesError

Inputs = Tensor | dict[str, Tensor]
HASH_BLOCK = 256  # examples hashed at a time, so that a data set on disk is never held in memory whole


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Inputs, targets and metadata, in one fixed order.

    Attributes:
        inputs: A tensor (examples, ...), a dict of such tensors passed to the model by name, or a torch data set
            whose items are an input or a tuple that starts with one; a data set is read one block at a time.
        targets: (examples,) class labels, or whatever the output function reads.
        metadata: Columns of one value per example; `id` (0, 1, ...) and `label` (integer targets) are added when
            missing.

    Raises:
        ExamplesError: When there are no examples or the lengths differ.
    """

    inputs: Inputs | Dataset[Any]
    targets: Tensor
    metadata: Mapping[str, Sequence[Any] | np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.targets, Tensor) or self.targets.ndim == 0:
            raise ExamplesError(f"targets is a {type(self.targets).__name__}; give a tensor with one entry per example")
        if isinstance(self.inputs, dict) and not self.inputs:
            raise ExamplesError("inputs is an empty dict; give at least one input tensor by its name")
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
                    f"truth value or string per example"
                )
            if not name.isidentifier():
                raise ExamplesError(f"metadata column {name!r} is not a plain word; rename it, as in 'my_column'")
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
        """Return inputs and targets of examples `start` up to `stop`."""
        targets = self.targets[start:stop]
        if isinstance(self.inputs, dict):
            return {name: value[start:stop] for name, value in self.inputs.items()}, targets
        if isinstance(self.inputs, Tensor):
            return self.inputs[start:stop], targets
        items = [self.inputs[i] for i in range(start, min(stop, len(self)))]
        return default_collate([item[0] if isinstance(item, tuple | list) else item for item in items]), targets

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """Return the examples at these positions, in this order, or those where a boolean array is true."""
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
        """Return a hash of each example's inputs, by which the same example is known again; a data set is read once."""
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
        """Return the SHA-256 of inputs, targets and metadata in order; a data set is read through once."""
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


def update_digest(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Add a tensor's name, type, shape and bytes to a running hash."""
    digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
