"""Examples: what may be given, what is refused, and a fingerprint that differs between any two of them."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import coar
from coar.errors import ExamplesError
from coar.examples import HASH_BLOCK

N = 12


def drawn(n=N):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 4, generator=generator), torch.randint(5, (n,), generator=generator)


class Pictures(Dataset):
    """Items that are an input alone, a pair, or a list, as a data set's author may choose."""

    def __init__(self, x, y, shape):
        self.x, self.y, self.shape, self.read = x, y, shape, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.read.append(i)
        return {"alone": self.x[i], "pair": (self.x[i], self.y[i]), "list": [self.x[i], self.y[i]]}[self.shape]


def make(way, x, y, **settings):
    inputs = {
        "tensor": lambda: x,
        "alone": lambda: Pictures(x, y, "alone"),
        "pair": lambda: Pictures(x, y, "pair"),
        "list": lambda: Pictures(x, y, "list"),
        "tensor data set": lambda: TensorDataset(x, y),
        "dict": lambda: {"a": x, "b": x + 1},
    }[way]()
    return coar.Examples(inputs=inputs, targets=y, **settings)


WAYS = ["tensor", "alone", "pair", "list", "tensor data set"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("start", "stop"), [(0, 5), (5, 12), (9, 40), (3, 4)])
def test_blocks_are_slices_however_the_inputs_are_given(way, start, stop):
    x, y = drawn()
    inputs, targets = make(way, x, y).block(start, stop)
    assert torch.equal(inputs, x[start:stop])
    assert torch.equal(targets, y[start:stop])


def test_blocks_of_a_dict_hold_every_name():
    x, y = drawn()
    inputs, targets = make("dict", x, y).block(2, 7)
    assert set(inputs) == {"a", "b"}
    assert torch.equal(inputs["b"], x[2:7] + 1)
    assert torch.equal(targets, y[2:7])


def test_a_data_set_is_read_only_where_it_is_asked_for():
    x, y = drawn()
    examples = make("pair", x, y)
    assert examples.inputs.read == []
    examples.block(4, 6)
    assert examples.inputs.read == [4, 5]


class AtOnce(Pictures):
    """Pictures that can be read several at a time."""

    def __getitems__(self, rows):
        self.read.append(tuple(rows))
        return [(self.x[i], self.y[i]) for i in rows]


def test_a_data_set_that_reads_several_at_a_time_is_asked_once_per_block():
    x, y = drawn()
    examples = coar.Examples(inputs=AtOnce(x, y, "pair"), targets=y)
    assert torch.equal(examples.block(4, 99)[0], x[4:])
    assert examples.inputs.read == [tuple(range(4, N))]
    part = examples.subset([7, 2, 11])
    assert torch.equal(part.block(0, 2)[0], x[[7, 2]])
    assert examples.inputs.read[1:] == [(7, 2)]
    assert part.fingerprint() == make("tensor", x, y).subset([7, 2, 11]).fingerprint()


class Texts(Dataset):
    """Items that are tokens and their mask."""

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        ids = torch.tensor(self.texts[i])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def test_items_may_be_tokens_and_must_be_of_one_length():
    examples = coar.Examples(inputs=Texts([[1, 2, 0], [3, 4, 5], [6, 0, 0]]), targets=torch.arange(3))
    inputs, _ = examples.block(0, 2)
    assert {name: value.tolist() for name, value in inputs.items()} == {
        "input_ids": [[1, 2, 0], [3, 4, 5]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
    }
    plain = {"input_ids": torch.tensor([[1, 2, 0], [3, 4, 5], [6, 0, 0]])}
    plain["attention_mask"] = (plain["input_ids"] > 0).long()
    assert examples.fingerprint() == coar.Examples(inputs=plain, targets=torch.arange(3)).fingerprint()
    ragged = coar.Examples(inputs=Texts([[1, 2], [3, 4, 5]]), targets=torch.arange(2))
    with pytest.raises(ExamplesError, match=r"examples 0 to 1 do not fit into one tensor .* pad tokens and give their"):
        ragged.fingerprint()


def test_id_and_label_are_added_and_given_columns_stay():
    x, y = drawn()
    examples = make("tensor", x, y)
    assert examples.metadata["id"].tolist() == list(range(N))
    assert examples.metadata["label"].tolist() == y.tolist()
    names = [f"picture {i}" for i in range(N)]
    own = make(
        "tensor", x, y, metadata={"id": names, "label": [0] * N, "weight": np.linspace(0, 1, N), "odd": y % 2 == 1}
    )
    assert own.metadata["id"].tolist() == names
    assert own.metadata["label"].tolist() == [0] * N
    assert own.metadata["odd"].dtype == bool
    regression = coar.Examples(inputs=x, targets=torch.randn(N))
    assert set(regression.metadata) == {"id"}
    assert len(examples) == len(own) == N


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"inputs": drawn(11)[0]}, "inputs has 11 entries but targets has 12"),
        ({"inputs": {"a": drawn()[0], "b": drawn(13)[0]}}, r"inputs\['b'\] has 13"),
        ({"inputs": Pictures(*drawn(3), "pair")}, "inputs has 3"),
        ({"targets": drawn(7)[1]}, "targets has 7"),
        ({"metadata": {"group": [1, 2]}}, r"metadata\['group'\] has 2"),
        ({"metadata": {"group": 3}}, "group"),
        ({"metadata": {"group": np.zeros((N, 2))}}, "'group' has shape"),
        ({"metadata": {"group": [[1]] * N}}, "'group' has shape"),
        ({"metadata": {"group": [None] * N}}, "object"),
        ({"metadata": {"group": np.array(["2020-01-01"] * N, dtype="datetime64[D]")}}, "datetime64"),
        ({"metadata": {"group": [1j] * N}}, "complex"),
        ({"metadata": {"my column": [1] * N}}, "not a valid name"),
        ({"metadata": {"a/b": [1] * N}}, "not a valid name"),
        ({"inputs": drawn(0)[0], "targets": drawn(0)[1]}, "no examples"),
        ({"inputs": {}}, "input"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_so(change, named):
    x, y = drawn()
    with pytest.raises(ExamplesError, match=named):
        coar.Examples(**{"inputs": x, "targets": y} | change)


@pytest.mark.parametrize("way", [*WAYS, "dict"])
def test_a_subset_has_the_examples_in_the_order_asked_for(way):
    x, y = drawn()
    rows = [7, 2, 11, 2]
    part = make(way, x, y, metadata={"id": np.arange(100, 100 + N)}).subset(rows)
    assert len(part) == 4
    inputs, targets = part.block(0, 4)
    assert torch.equal(inputs["a"] if way == "dict" else inputs, x[rows])
    assert torch.equal(targets, y[rows])
    assert part.metadata["id"].tolist() == [107, 102, 111, 102]
    assert part.metadata["label"].tolist() == y[rows].tolist()
    again = part.subset(np.array([1, 0]))
    assert again.metadata["id"].tolist() == [102, 107]
    with pytest.raises(ExamplesError, match="no examples"):
        part.subset([])


def test_a_subset_by_truth_values_selects_where_true():
    x, y = drawn()
    chosen = (y == y[0]).numpy()
    part = make("tensor", x, y).subset(chosen)
    assert part.metadata["id"].tolist() == np.flatnonzero(chosen).tolist()


def test_the_fingerprint_does_not_depend_on_how_inputs_are_given():
    x, y = drawn(HASH_BLOCK + 30)
    fingerprints = {make(way, x, y).fingerprint() for way in WAYS}
    assert len(fingerprints) == 1
    assert len(fingerprints.pop()) == 64
    rows = list(range(len(y)))
    assert make("pair", x, y).subset(rows).fingerprint() == make("tensor", x, y).fingerprint()
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert make("tensor", strided, y).fingerprint() == make("tensor", x, y).fingerprint()


def test_the_fingerprint_depends_on_order_values_and_metadata():
    x, y = drawn(HASH_BLOCK + 30)
    nudged, late = x.clone(), x.clone()
    nudged[0, 0, 0] += 1e-6
    late[-1, -1, -1] += 1e-6
    other = y.clone()
    other[-1] = (other[-1] + 1) % 5
    swapped = list(range(len(y)))
    swapped[0], swapped[-1] = swapped[-1], swapped[0]
    same = {"id": np.arange(len(y)), "label": y.numpy()}
    every = {
        "as it is": make("tensor", x, y),
        "value": make("tensor", nudged, y),
        "last value": make("tensor", late, y),
        "type": make("tensor", x.double(), y),
        "shape": make("tensor", x.flatten(1), y),
        "target": make("tensor", x, other, metadata=same),
        "order": make("tensor", x[swapped], y[swapped], metadata={"id": np.arange(len(y))}),
        "id": make("tensor", x, y, metadata={"id": np.arange(len(y)) + 1}),
        "last id": make("tensor", x, y, metadata={"id": [*range(len(y) - 1), 1000]}),
        "text id": make("tensor", x, y, metadata={"id": [str(i) for i in range(len(y))]}),
        "column": make("tensor", x, y, metadata={"group": [0] * len(y)}),
        "other column": make("tensor", x, y, metadata={"block": [0] * len(y)}),
        "fewer": make("tensor", x[:-1], y[:-1]),
        "named": coar.Examples(inputs={"a": x}, targets=y),
        "named otherwise": coar.Examples(inputs={"b": x}, targets=y),
        "named and swapped": coar.Examples(inputs={"a": x, "b": nudged}, targets=y),
        "named and swapped back": coar.Examples(inputs={"a": nudged, "b": x}, targets=y),
    }
    fingerprints = {name: examples.fingerprint() for name, examples in every.items()}
    assert len(set(fingerprints.values())) == len(every), fingerprints
    assert make("tensor", x, y).fingerprint() == fingerprints["as it is"]
    assert make("tensor", x, y, metadata=same).fingerprint() == fingerprints["as it is"]


def test_dicts_are_fingerprinted_whatever_the_order_of_their_names():
    x, y = drawn()
    one = coar.Examples(inputs={"a": x, "b": x + 1}, targets=y)
    other = coar.Examples(inputs={"b": x + 1, "a": x}, targets=y)
    assert one.fingerprint() == other.fingerprint()
