"""The examples of a study: inputs, targets and metadata columns of equal length."""

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from coar.errors import ExamplesError
from coar.images import ImageFiles, ImageFolder, Transform
from coar.inputs import Inputs, as_inputs, as_targets, batch_of

log = logging.getLogger(__name__)
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
        positions: Named positions of texts, such as `subject_last`: the index of each example along the second axis of
            `input_ids`, padding included.

    Raises:
        ExamplesError: When there are no examples, lengths differ, a metadata column is not a vector of values, or a
            position is outside its text.
    """

    inputs: Inputs | Dataset[Any]
    targets: Tensor
    metadata: Mapping[str, Sequence[Any] | np.ndarray] = field(default_factory=dict)
    positions: Mapping[str, Sequence[int] | np.ndarray | Tensor] = field(default_factory=dict)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        group: str | None = None,
        label: str | None = None,
        classes: Sequence[str] | None = None,
        transform: Transform | None = None,
    ) -> Self:
        """Return the pictures of a folder, read on access, with one subfolder for each class as in torchvision.

        A file `metadata.csv` in the folder, with the path of each picture in its column `file_name`, adds its other
        columns, as in the image folders of Hugging Face's datasets. Columns `file` and `class_name` are added too.

        Args:
            folder: The folder.
            group: Metadata column of groups: of `metadata.csv`, or else the second level of subfolders, as in
                `class/group/1.jpg`.
            label: Column of `metadata.csv` with the classes, instead of subfolders.
            classes: Names of the classes in the order of the model's logits. By default all subfolders in alphabetical
                order, or all values of the column, so every folder then needs all of the classes.
            transform: Makes the model's input from a PIL image in RGB: the model's own, such as `weights.transforms()`
                of torchvision or `timm.data.create_transform(...)`. By default numbers from 0 to 1 at the picture's
                size, with a warning, since most models were trained on normalised pictures of one size.

        Raises:
            ExamplesError: When there are no pictures, or one has no class, no group or no row in the table.
        """
        place = Path(os.path.expanduser(folder))
        found = ImageFolder.read(place, group=group, label=label, classes=classes)
        if transform is None:
            log.warning(
                "pictures of %s are read without a transform, as numbers from 0 to 1; give the one that the model was "
                "trained with as transform=",
                place,
            )
        inputs = ImageFiles(found.files, transform)
        return cls(inputs=inputs, targets=torch.from_numpy(found.labels), metadata=found.columns)

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
                raise ExamplesError(
                    f"{name} has {length} entries but targets has {n}; give one entry per example{self._by_name(n)}"
                )
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
        object.__setattr__(self, "positions", {name: self._position(name, p) for name, p in self.positions.items()})

    def _position(self, name: str, given: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
        column = np.asarray(given)
        ids = self.inputs.get("input_ids") if isinstance(self.inputs, dict) else None
        length = ids.shape[1] if isinstance(ids, Tensor) and ids.ndim > 1 else 0
        if column.shape != (len(self),) or column.dtype.kind not in "iu" or not name.isidentifier():
            raise ExamplesError(
                f"the position {name!r} has shape {column.shape} and type {column.dtype}; give one whole number for "
                f"each of the {len(self)} examples, under a name of one word"
            )
        outside = np.flatnonzero((column < 0) | (column >= length))
        if len(outside):
            raise ExamplesError(
                f"the position {name!r} of example {outside[0]} is {column[outside[0]]}, outside of the {length} "
                f"positions of input_ids; coar.token_examples counts positions from the start or end of each text"
            )
        return column.astype(np.int64)

    def _lengths(self) -> dict[str, int | None]:
        parts: dict[str, Any] = {f"metadata[{name!r}]": column for name, column in self.metadata.items()}
        if isinstance(self.inputs, dict):
            parts |= {f"inputs[{name!r}]": value for name, value in self.inputs.items()}
        else:
            parts["inputs"] = self.inputs
        return {name: len(part) if hasattr(part, "__len__") else None for name, part in parts.items()}

    def _by_name(self, n: int) -> str:
        """Return advice where inputs is a list of the model's arguments."""
        given: Any = self.inputs
        if not isinstance(given, list) or any(tuple(getattr(one, "shape", ()))[:1] != (n,) for one in given):
            return ""
        return ", and the arguments of a model as a dict with their names, such as {'x': first, 'y': second}"

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
        positions = {name: np.asarray(column)[rows.numpy()] for name, column in self.positions.items()}
        return Examples(inputs=inputs, targets=self.targets[rows], metadata=metadata, positions=positions)

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
        """Return the SHA-256 of inputs, targets, metadata and positions, in hexadecimal; a data set is read once."""
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
        for name in sorted(self.positions):
            digest.update(f"positions:{name}:{np.asarray(self.positions[name]).tolist()}".encode())
        return digest.hexdigest()


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


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU where it has neither, as quantised ones may."""
    return next((held.device for held in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def devices_of(model: nn.Module) -> list[torch.device]:
    """Return the devices of parameters and buffers, in their order; weights that are not in memory have none."""
    return list(dict.fromkeys(held.device for held in (*model.parameters(), *model.buffers()) if not held.is_meta))


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """Run the model on inputs moved to its device: a tensor as the first argument, a dict by name."""
    device = device_of(model)
    if isinstance(inputs, dict):
        return model(**{name: value.to(device) for name, value in inputs.items()})
    return model(inputs.to(device))
