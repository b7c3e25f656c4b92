"""Weights on disk: whole or not at all, and never somebody's code."""

import pickle
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import coar
from coar.errors import StorageError, WeightsError
from coar.weights import weights_fingerprint
from pipelines.digits import DigitsNet
from tests import nets, oracles


def small():
    return oracles.rough(nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)))


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


class Payload:
    """Creates a file when it is unpickled, as any code could be run."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


class Poisoned(nn.Linear):
    """A module whose pickle holds a payload."""

    def __init__(self, target):
        super().__init__(2, 2)
        self.extra = Payload(target)


@pytest.mark.parametrize("make", [small, DigitsNet, nets.PlanarNet])
def test_what_is_saved_is_loaded_bit_for_bit(make, tmp_path):
    model, other = oracles.rough(make(), seed=1), oracles.rough(make(), seed=2)
    coar.save_weights(model, tmp_path / "deep" / "down" / "net.safetensors")
    assert weights_fingerprint(model) != weights_fingerprint(other)
    assert coar.load_weights(other, tmp_path / "deep" / "down" / "net.safetensors") is other
    assert_equal_states(state_of(model), state_of(other))
    assert weights_fingerprint(model) == weights_fingerprint(other)
    assert [path.name for path in (tmp_path / "deep" / "down").iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_types_survive(dtype, tmp_path):
    model = small().to(dtype)
    coar.save_weights(model, tmp_path / "net.safetensors")
    other = coar.load_weights(small().to(dtype), tmp_path / "net.safetensors")
    assert_equal_states(state_of(model), state_of(other))


def test_channels_last_weights_are_saved_as_they_are(tmp_path):
    model = small()
    before = state_of(model)
    coar.save_weights(model.to(memory_format=torch.channels_last), tmp_path / "net.safetensors")
    assert_equal_states(load_file(tmp_path / "net.safetensors"), before)
    assert weights_fingerprint(model) == weights_fingerprint(coar.load_weights(small(), tmp_path / "net.safetensors"))


class Tied(nn.Module):
    """A decoder whose weight is the encoder's, and a view that starts where the weight does."""

    def __init__(self, view=slice(0, 2)):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("rows", self.encoder.weight.detach()[view])


@pytest.mark.parametrize("view", [slice(0, 2), slice(1, 3)], ids=["from the start", "from within"])
def test_tied_tensors_are_saved_under_every_name_and_stay_tied(view, tmp_path):
    model = Tied(view)
    coar.save_weights(model, tmp_path / "tied.safetensors")
    assert_equal_states(load_file(tmp_path / "tied.safetensors"), state_of(model))
    assert model.decoder.weight is model.encoder.weight
    other = coar.load_weights(Tied(view), tmp_path / "tied.safetensors")
    assert other.decoder.weight is other.encoder.weight
    assert_equal_states(state_of(model), state_of(other))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_tensors_are_read(suffix, nested, prefix, tmp_path):
    model = small()
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if nested else state, tmp_path / f"net{suffix}")
    other = coar.load_weights(oracles.rough(small(), seed=9), tmp_path / f"net{suffix}", prefix=prefix)
    assert_equal_states(state_of(model), state_of(other))


def test_a_prefix_is_cut_off_where_it_is_and_missed_where_it_is_not(tmp_path):
    model = small()
    coar.save_weights(nn.ModuleDict({"net": model}), tmp_path / "net.safetensors")
    other = coar.load_weights(oracles.rough(small(), seed=9), tmp_path / "net.safetensors", prefix="net.")
    assert_equal_states(state_of(model), state_of(other))
    with pytest.raises(WeightsError, match="do not fit"):
        coar.load_weights(small(), tmp_path / "net.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_whole_pickled_model_is_refused_and_its_code_is_not_run(suffix, tmp_path):
    target, file = tmp_path / "executed", tmp_path / f"model{suffix}"
    torch.save(Poisoned(target), file)
    with pytest.raises(WeightsError):
        coar.load_weights(nn.Linear(2, 2), file)
    assert not target.exists()
    torch.load(file.rename(tmp_path / "again.pt"), weights_only=False)  # the payload is a real one
    assert target.exists()


def test_payloads_beside_tensors_and_bare_pickles_are_not_run(tmp_path):
    target = tmp_path / "executed"
    state = nn.Linear(2, 2).state_dict()
    torch.save({**state, "hook": Payload(target)}, tmp_path / "beside.pt")
    torch.save({"state_dict": state, "optimizer": Payload(target)}, tmp_path / "around.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Payload(target), protocol=2))
    for name in ("beside", "around", "bare"):
        with pytest.raises(WeightsError, match="not read"):
            coar.load_weights(nn.Linear(2, 2), tmp_path / f"{name}.pt")
    assert not target.exists()


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], torch.zeros(2), {"weight": 3}, {"state_dict": 3}, {0: torch.zeros(2)}, {}], ids=repr
)
def test_what_is_no_state_dict_is_an_error(content, tmp_path):
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(WeightsError):
        coar.load_weights(nn.Linear(2, 2), tmp_path / "net.pt")


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt"])
def test_a_file_cut_short_anywhere_is_an_error(name, tmp_path):
    model, file = small(), tmp_path / name
    if name == "net.pt":
        torch.save(model.state_dict(), file)
    else:
        coar.save_weights(model, file)
    whole = file.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, *range(0, len(whole), len(whole) // 15 + 1), len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=name):
            coar.load_weights(small(), file)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@given(content=st.binary(max_size=60) | st.binary(max_size=60).map(lambda tail: b"\x80\x02" + tail))
@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_other_bytes_are_an_error(suffix, content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    file.write_bytes(content)
    with pytest.raises(WeightsError):
        coar.load_weights(nn.Linear(2, 2), file)


def test_other_archives_are_an_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(WeightsError):
        coar.load_weights(nn.Linear(2, 2), tmp_path / "other.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_missing_file_or_a_folder_is_an_error(suffix, tmp_path):
    (tmp_path / f"folder{suffix}").mkdir()
    for name in ("nothing", "folder"):
        with pytest.raises(WeightsError, match=f"no weights at .*{name}{suffix}"):
            coar.load_weights(nn.Linear(2, 2), tmp_path / f"{name}{suffix}")


@pytest.mark.parametrize("other", [lambda: nn.Linear(2, 3), lambda: nn.Linear(2, 2, bias=False), DigitsNet])
def test_weights_of_another_model_are_an_error(other, tmp_path):
    coar.save_weights(nn.Linear(2, 2), tmp_path / "net.safetensors")
    model = other()
    with pytest.raises(WeightsError, match=f"do not fit {type(model).__name__}"):
        coar.load_weights(model, tmp_path / "net.safetensors")


def test_a_write_that_fails_half_way_is_an_error_and_keeps_what_was_there(tmp_path):
    file = tmp_path / "net.safetensors"
    coar.save_weights(small(), file)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))  # bytes per file, for root too
    try:
        with pytest.raises(StorageError, match="cannot write weights"):
            coar.save_weights(oracles.rough(small(), seed=9), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_a_path_below_a_file_is_an_error(tmp_path):
    (tmp_path / "plain").write_text("a file where a folder should be")
    with pytest.raises(StorageError):
        coar.save_weights(small(), tmp_path / "plain" / "net.safetensors")


def test_a_folder_that_takes_no_files_is_an_error():
    with pytest.raises(StorageError):  # nobody, root included, may make files there
        coar.save_weights(small(), Path("/proc/self/task") / "net.safetensors")


def test_the_fingerprint_depends_on_names_types_shapes_and_values():
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    last = torch.zeros(4)
    last[-1] = 1e-30
    every = [
        base,
        {"a": torch.zeros(4), "c": torch.zeros(4)},
        {"a": torch.zeros(4)},
        {"a": torch.zeros(4), "b": last},
        {"a": last, "b": torch.zeros(4)},
        {"a": torch.zeros(2, 2), "b": torch.zeros(4)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.zeros(4)},
        {"a": -torch.zeros(4), "b": torch.zeros(4)},
    ]

    def model(state):
        net = nn.Module()
        for name, value in state.items():
            net.register_buffer(name, value)
        return net

    assert len({weights_fingerprint(model(state)) for state in every}) == len(every)
    assert weights_fingerprint(model(base)) == weights_fingerprint(model({"b": torch.zeros(4), "a": torch.zeros(4)}))
