"""User-supplied inputs and targets, as tensors; ambiguous ones are refused."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from coar.errors import ExamplesError

Inputs = Tensor | dict[str, Tensor]


def as_inputs(given: Any) -> "Inputs | Dataset[Any]":
    """Return inputs as a tensor, a dict of tensors, or a data set with a length and items by position.

    Arrays and data frames become tensors; NumPy's default type, float64, becomes torch's, float32. Tensors keep their
    type. A mapping, such as the result of a tokenizer, becomes a dict.

    Raises:
        ExamplesError: When the inputs are of a kind that does not determine single examples.
    """
    if isinstance(given, Mapping):
        if not given:
            raise ExamplesError("inputs is an empty dict; give at least one input tensor by its name")
        return {_name(name): as_tensor(value, f"inputs[{name!r}]") for name, value in given.items()}
    if _is_array(given):
        return as_tensor(given, "inputs")
    if isinstance(given, DataLoader):
        raise ExamplesError(
            "inputs is a DataLoader, which may shuffle and returns batches; give the data set itself, loader.dataset: "
            "batches of a size that fits the device are made from it"
        )
    if isinstance(given, tuple | str | bytes | set | frozenset):
        raise ExamplesError(
            f"inputs is a {type(given).__name__} of {len(given)}; give a tensor, a data set, or for a model with "
            f"several inputs a dict with the names of its arguments, such as {{'x': first, 'y': second}}"
        )
    if isinstance(given, IterableDataset) or not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        raise ExamplesError(
            f"inputs is a {type(given).__name__} without a length or without items by position; give a tensor, a dict "
            f"of tensors, or a data set with __len__ and __getitem__, such as a list of its items"
        )
    return given  # type: ignore[no-any-return]


def as_targets(given: Any) -> Tensor:
    """Return targets as a tensor with one entry per example.

    Raises:
        ExamplesError: When they are not numbers, or are a single number.
    """
    if isinstance(given, list | tuple):
        try:
            given = np.asarray(given)
        except ValueError:
            raise ExamplesError("targets is a list of unequal parts; give one entry per example") from None
    if not _is_array(given):
        raise ExamplesError(f"targets is a {type(given).__name__}; give a tensor with one entry per example")
    return as_tensor(given, "targets")


def as_tensor(given: Any, name: str) -> Tensor:
    """Return numbers as a dense tensor whose first axis is that of examples.

    Args:
        given: A tensor, an array, a column or a table of numbers.
        name: Its name in messages.

    Raises:
        ExamplesError: When it is of another kind, does not hold numbers, or has no axis of examples.
    """
    if not _is_array(given):
        raise ExamplesError(
            f"{name} is a {type(given).__name__}; give a tensor with one entry per example; to pass one value for all "
            f"examples, wrap the model in a module that adds it"
        )
    if isinstance(given, Tensor):
        tensor = given.detach()
        if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ExamplesError(f"{name} is a {tensor.layout} or nested tensor; give a dense one, padded where needed")
    else:
        array = given.to_numpy() if hasattr(given, "to_numpy") else np.asarray(given)
        if array.dtype.kind not in "biuf":
            raise ExamplesError(
                f"{name} has values of type {array.dtype}, and numbers were expected; encode or leave out such columns"
            )
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        tensor = torch.tensor(array)
    if tensor.ndim == 0:
        raise ExamplesError(
            f"{name} is a single number; give one entry per example, or wrap the model in a module that adds this "
            f"number"
        )
    return tensor


def batch_of(items: list[Any], named: str) -> Inputs:
    """Return items of a data set as one batch, as torch's own loader does.

    Args:
        items: Inputs, dicts of inputs, or tuples that start with one.
        named: Name of these items in messages.

    Raises:
        ExamplesError: When they do not fit into tensors.
    """
    inputs = [item[0] if isinstance(item, tuple | list) else item for item in items]
    inputs = [dict(item) if isinstance(item, Mapping) else item for item in inputs]
    try:
        batch = default_collate(inputs)
    except RuntimeError as error:
        raise ExamplesError(
            f"{named} do not fit into one tensor ({error}); let the data set return one shape for all: scale or crop "
            f"pictures, pad tokens and give their attention_mask"
        ) from None
    except TypeError as error:
        raise ExamplesError(
            f"{named} cannot be converted to a tensor ({error}); let the data set return tensors: give it a transform, "
            f"such as torchvision.transforms.ToTensor(), or use with_format('torch')"
        ) from None
    for name, part in batch.items() if isinstance(batch, dict) else [("", batch)]:
        if not isinstance(part, Tensor):
            raise ExamplesError(
                f"{named} are a {type(part).__name__}{f' in {name!r}' if name else ''} after collation; let the data "
                f"set return tensors, or a dict of tensors by the names of the model's arguments"
            )
    return batch  # type: ignore[no-any-return]


def described(inputs: Inputs) -> str:
    """Return the types and shapes of inputs in words, such as `x: float32 (2, 3, 32, 32)`."""
    parts = inputs.items() if isinstance(inputs, dict) else [("inputs", inputs)]
    return ", ".join(f"{name}: {str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}" for name, part in parts)


def _is_array(given: Any) -> bool:
    """Return whether a value is a tensor, a NumPy array, or a column or table of a data frame library."""
    return isinstance(given, Tensor | np.ndarray | np.generic) or (
        hasattr(given, "to_numpy") and hasattr(given, "shape")
    )


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise ExamplesError(f"inputs has the key {name!r}; the names of the model's arguments were expected")
    return name
