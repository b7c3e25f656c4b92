"""What people give as inputs: taken as tensors with the same numbers, or refused in words."""

from collections import UserDict

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import coar
from coar.errors import ExamplesError

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


@pytest.mark.parametrize(
    "given",
    [X, X.numpy(), X.double().numpy(), pd.DataFrame(X.numpy()), X.clone().requires_grad_(), TensorDataset(X, Y)],
    ids=["tensor", "float32", "float64", "frame", "requires grad", "data set"],
)
def test_what_holds_the_same_numbers_is_the_same_input(given):
    examples = coar.Examples(inputs=given, targets=Y)
    inputs, _ = examples.block(0, 8)
    assert inputs.dtype == torch.float32
    assert not inputs.requires_grad
    assert torch.equal(inputs, X)


@pytest.mark.parametrize("given", [{"input": X.numpy()}, UserDict(input=X), {"input": pd.DataFrame(X.numpy())}])
def test_mappings_become_dicts_of_tensors(given):
    inputs, _ = coar.Examples(inputs=given, targets=Y).block(2, 5)
    assert isinstance(inputs, dict)
    assert torch.equal(inputs["input"], X[2:5])


def test_float64_tensors_and_whole_numbers_keep_their_type():
    for given in (X.double(), (X * 10).to(torch.uint8), (X * 10).long()):
        assert coar.Examples(inputs=given, targets=Y).block(0, 8)[0].dtype == given.dtype


@pytest.mark.parametrize("targets", [Y, Y.numpy(), Y.tolist(), pd.Series(Y.numpy()), tuple(Y.tolist())])
def test_targets_may_be_a_list_or_a_column(targets):
    examples = coar.Examples(inputs=X, targets=targets)
    assert torch.equal(examples.targets, Y)
    assert examples.metadata["label"].tolist() == Y.tolist()


def test_the_fingerprint_knows_numbers_and_not_what_they_came_in():
    first, second = (coar.Examples(inputs=given, targets=Y).fingerprint() for given in (X, pd.DataFrame(X.numpy())))
    assert first == second


class Items(list):
    """Items as data sets of plain Python values give them."""


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (DataLoader(X, 4), "loader.dataset"),
        ((X, X), "names of its arguments"),
        ("digits", "is a str"),
        (Stream(), "without a length"),
        (iter(X), "without a length"),
        ({"input": X, "t": torch.tensor(2.0)}, "single number"),
        ({"input": X, "flag": True}, "is a bool"),
        ({0: X}, "names of the model's arguments"),
        (pd.DataFrame({"a": list("abcdefgh")}), "numbers were expected"),
        (X.to_sparse(), "dense"),
        (torch.tensor(1.0), "single number"),
        (np.array(["a"] * 8), "numbers were expected"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_what_to_give(given, word):
    with pytest.raises(ExamplesError, match=word):
        coar.Examples(inputs=given, targets=Y)


@pytest.mark.parametrize(
    ("items", "word"),
    [
        ([object()] * 8, "transform"),
        ([{"text": "a"}] * 8, "in 'text'"),
        (["a"] * 8, "are a list"),
        ([torch.zeros(2), torch.zeros(3)] * 4, "do not fit into one tensor"),
    ],
)
def test_items_that_are_no_tensors_are_refused_when_they_are_read(items, word):
    with pytest.raises(ExamplesError, match=word):
        coar.Examples(inputs=Items(items), targets=Y).block(0, 8)


@pytest.mark.parametrize(("targets", "word"), [("abc", "is a str"), ([[1], [1, 2]], "unequal"), (3, "is a int")])
def test_targets_of_another_kind_are_refused(targets, word):
    with pytest.raises(ExamplesError, match=word):
        coar.Examples(inputs=X, targets=targets)
