"""What people give as inputs and targets, as tensors; what cannot be taken without a guess is refused."""

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
    type. A mapping, such as what a tokenizer returns, becomes a dict.

    Raises:
        ExamplesError: When the inputs are of a kind that says nothing sure about single examples.
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
            "batches are cut to what the device holds"
        )
    if isinstance(given, tuple | str | bytes | set | frozenset):
        raise ExamplesError(
            f"inputs is a {type(given).__name__} of {len(given)}; give a tensor, a data set, or for a model with "
            f"several inputs a dict with the names of its arguments, such as {{'x': first, 'y': second}}"
        )
    if isinstance(given, IterableDataset) or not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        raise ExamplesError(
            f"inputs is a {type(given).__name__} without a length or without items by position; give a tensor, a dict "
            f"of tensors, or a data set with __len__ and __getitem__, such as a list of what it yields"
        )
    return given  # type: ignore[no-any-return]


def as_targets(given: Any) -> Tensor:
    """Return targets as a tensor with one entry per example.

    Raises:
        ExamplesError: When they are no numbers, or a single one.
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
    """Return a dense tensor with at least one axis, the examples', of what a tensor can be made of.

    Args:
        given: A tensor, an array, a column or a table of numbers.
        name: What it is called in messages.

    Raises:
        ExamplesError: When it is of another kind, holds no numbers, or has no axis of examples.
    """
    if not _is_array(given):
        raise ExamplesError(
            f"{name} is a {type(given).__name__}; give a tensor with one entry per example (what is the same for all "
            f"examples belongs into the model: wrap it in a module that passes it on)"
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
            f"{name} is a single number; give one entry per example, or wrap the model in a module that passes on what "
            f"is the same for all"
        )
    return tensor


def batch_of(items: list[Any], named: str) -> Inputs:
    """Return items of a data set as one batch, as torch's own loader does.

    Args:
        items: Inputs, dicts of inputs, or tuples that start with one.
        named: What these items are called in messages.

    Raises:
        ExamplesError: When they do not fit into tensors.
    """
    inputs = [item[0] if isinstance(item, tuple | list) else item for item in items]
    inputs = [dict(item) if isinstance(item, Mapping) else item for item in inputs]
    try:
        batch = default_collate(inputs)
    except RuntimeError as error:
        raise ExamplesError(
            f"{named} do not fit into one tensor ({error}); let the data set return all in one shape: scale or crop "
            f"pictures, pad tokens and give their attention_mask"
        ) from None
    except TypeError as error:
        raise ExamplesError(
            f"{named} cannot be made a tensor ({error}); let the data set return tensors: give it a transform, such as "
            f"torchvision.transforms.ToTensor(), or with_format('torch')"
        ) from None
    for name, part in batch.items() if isinstance(batch, dict) else [("", batch)]:
        if not isinstance(part, Tensor):
            raise ExamplesError(
                f"{named} are a {type(part).__name__}{f' in {name!r}' if name else ''} once they are put together; let "
                f"the data set return tensors, or a dict of tensors by the names of the model's arguments"
            )
    return batch  # type: ignore[no-any-return]


def _is_array(given: Any) -> bool:
    """Whether a value is a tensor, an array of NumPy, or a column or table of pandas or the like."""
    return isinstance(given, Tensor | np.ndarray | np.generic) or (
        hasattr(given, "to_numpy") and hasattr(given, "shape")
    )


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise ExamplesError(f"inputs has the key {name!r}; the names of the model's arguments were expected")
    return name
