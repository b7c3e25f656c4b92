"""Models that people bring every day: views, padded encoders, pruned weights and whatever else they hold."""

import logging
import threading
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers.modeling_outputs import BaseModelOutput

import coar
from coar.errors import ExamplesError, WeightsError
from coar.forward.copies import device_copy
from coar.model_copy import independent_copy
from tests import oracles

CPU = torch.device("cpu")
MASKS = 8


def masks_and_outputs(model, inputs, components, folder, ablation=None, gradients=0, **settings):
    """Masks of a new run, its outputs, and its targets."""
    count = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
    examples = coar.Examples(inputs=inputs, targets=torch.arange(count) % 4)
    study = coar.Study(
        model=model,
        examples=examples,
        components=components,
        ablation=ablation or coar.ZeroActivation(),
        sampler=coar.BernoulliSampler(ablated_fraction=0.4),
    )
    run = coar.collect(study, folder, masks=MASKS, gradients=gradients, device="cpu", progress=False, **settings)
    return run.plan.masks(run.sampler, len(components), 0, MASKS), run.array("outputs")[:], examples.targets


def hooked(model, inputs, components, mask):
    """Logits of the user's own model, with zeros at what the mask ablates, by plain hooks."""
    handles = []
    for row, keep in zip(components, mask, strict=True):
        if keep:
            continue

        def zero(y, row=row):
            y = y.clone()
            y.movedim(row.axis, -1)[..., row.position : row.position + row.size] = 0
            return y

        module = model.get_submodule(row.site)
        if row.side == "input":
            handles.append(module.register_forward_pre_hook(lambda _m, args, zero=zero: (zero(args[0]), *args[1:])))
        else:
            handles.append(module.register_forward_hook(lambda _m, _args, y, zero=zero: zero(y)))
    with torch.no_grad():
        logits = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    for handle in handles:
        handle.remove()
    return logits


def assert_exact(model, inputs, components, folder, **settings):
    masks, found, targets = masks_and_outputs(model, inputs, components, folder, **settings)
    expected = [
        oracles.read_outputs(hooked(model.eval(), inputs, components, mask), targets, "logsumexp") for mask in masks
    ]
    assert np.std(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


class TutorialNet(nn.Module):
    """The net of PyTorch's own CIFAR-10 tutorial, whose view needs contiguous activations."""

    def __init__(self):
        super().__init__()
        self.conv1, self.pool, self.conv2 = nn.Conv2d(3, 6, 5), nn.MaxPool2d(2, 2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(torch.relu(self.conv2(self.pool(torch.relu(self.conv1(x))))))
        x = x.view(-1, 16 * 5 * 5)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x))))) * 4


class PatchNet(nn.Module):
    """A net that cuts its input into patches by a view, before any convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(12, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        patches = x.view(len(x), 3, -1).view(len(x), 12, 8, 8)
        return self.last(torch.relu(self.conv(patches)).mean((2, 3)) * 4)


class PermutedNet(nn.Module):
    """A net whose numbers depend on the memory format, since it reads the memory of an activation."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        y = torch.relu(self.conv(x))
        return self.last(torch.as_strided(y, (len(x), 8, 36), (y.stride(0), 36, 1)).mean(2) * 4)


@pytest.mark.parametrize("make", [TutorialNet, PatchNet, PermutedNet])
@pytest.mark.parametrize("named", [False, True])
def test_the_memory_format_stays_unless_another_works(tmp_path, make, named):
    model = oracles.rough(make()).eval()
    x = torch.randn(8, 3, *({TutorialNet: (32, 32), PatchNet: (16, 16)}.get(make, (8, 8))))
    inputs = {"x": x} if named else x
    assert_exact(model, inputs, coar.conv_filters(model), tmp_path / "r.zarr", gradients=8)


def test_convolutions_are_in_channels_last_where_that_works():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    examples = coar.Examples(inputs=torch.randn(4, 3, 8, 8), targets=torch.arange(4))
    assert not device_copy(model, CPU)[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert device_copy(model, CPU, examples)[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous()


class GroupNet(nn.Module):
    """A net whose group norm gets a large mean and a small deviation once the second channel is replaced."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 2, 3), nn.GroupNorm(1, 2), nn.Linear(2, 4)
        with torch.no_grad():
            self.conv.weight[1] *= 40
            self.conv.bias[:] = 30

    def forward(self, x):
        return self.last((self.norm(self.conv(x)).relu() ** 3).mean((2, 3)))


def test_group_norms_keep_their_digits_under_ablation(tmp_path):
    torch.manual_seed(0)
    model, x, other = GroupNet(), torch.randn(8, 3, 8, 8), torch.randn(16, 3, 8, 8)
    components = coar.conv_filters(model)
    ablation = coar.Mean(calibration=coar.Examples(inputs=other, targets=torch.zeros(16)))
    masks, found, targets = masks_and_outputs(model, x, components, tmp_path / "r.zarr", ablation=ablation)
    model, x, means = model.double(), x.double(), oracles.channel_means(model.double(), other.double(), "conv")
    constants = [{("conv", i): means[i] for i in np.flatnonzero(~mask)} for mask in masks]
    expected = [oracles.replaced_outputs(model, x, targets, of_mask) for of_mask in constants]
    assert not masks.all()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


class PaddedNet(nn.Module):
    """A classifier of texts on torch's encoder with its defaults, which converts padded texts to nested tensors."""

    def __init__(self, norm=None, pool=lambda y: y[:, 0], **settings):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.emb, self.head, self.pool = nn.Embedding(30, 16), nn.Linear(16, 4), pool
        self.enc = nn.TransformerEncoder(layer, 2, norm=norm, **settings)

    def forward(self, ids, pad):
        return self.head(self.pool(self.enc(self.emb(ids), src_key_padding_mask=pad))) * 2


TEXTS = {"ids": torch.randint(1, 30, (8, 6), generator=torch.Generator().manual_seed(0))}
ON_THE_RIGHT = torch.arange(6)[None] >= torch.tensor([6, 3, 4, 5, 6, 2, 3, 4])[:, None]
PADDING = {
    "right": ON_THE_RIGHT,
    "left": ON_THE_RIGHT.flip(1),
    "as numbers": torch.zeros(8, 6).masked_fill(ON_THE_RIGHT, -torch.inf),
}
PADDED_NETS = {
    "first token": {},
    "all positions": {"pool": lambda y: y.mean(1)},
    "all positions after a norm": {"pool": lambda y: y.mean(1), "norm": nn.LayerNorm(16)},
    "without a check of the mask": {"pool": lambda y: y.mean(1), "mask_check": False},
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("name", "side"),
    [(name, "right") for name in PADDED_NETS] + [("all positions", side) for side in ("left", "as numbers")],
)
def test_padded_encoders_give_what_they_give_on_nested_tensors(tmp_path, name, side):
    """The oracle changes weights, which leaves the user's own model on its path of nested tensors."""
    model = oracles.rough(PaddedNet(**PADDED_NETS[name])).eval()
    inputs, components = TEXTS | {"pad": PADDING[side]}, coar.neurons(model, include="*.linear1")
    masks, found, targets = masks_and_outputs(model, inputs, components, tmp_path / "r.zarr", coar.ZeroWeight())
    for row, mask in zip(found, masks, strict=True):
        rows = [(components[i].site, components[i].position) for i in np.flatnonzero(~mask)]
        with torch.inference_mode():
            logits = oracles.zeroed(model, rows)(**inputs)
        np.testing.assert_allclose(row, oracles.read_outputs(logits, targets, "logsumexp"), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_heads_of_padded_encoders(tmp_path):
    model = oracles.rough(PaddedNet(enable_nested_tensor=True)).eval()
    inputs, components = TEXTS | {"pad": ON_THE_RIGHT}, coar.attention_heads(model)
    masks, found, targets = masks_and_outputs(model, inputs, components, tmp_path / "r.zarr", gradients=8)
    for row, mask in zip(found, masks, strict=True):
        features = [(components[i].site, components[i].position + k) for i in np.flatnonzero(~mask) for k in range(8)]
        with torch.inference_mode():
            logits = oracles.features_zeroed(model, features)(**inputs)
        np.testing.assert_allclose(row, oracles.read_outputs(logits, targets, "logsumexp"), rtol=1e-4, atol=1e-4)


def small():
    return oracles.rough(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)))


def test_pruned_models(tmp_path):
    """The pruned weight is a tensor with a graph, which deepcopy refuses."""
    model = small()
    prune.random_unstructured(model[0], "weight", amount=0.5)
    prune.ln_structured(model[2], "weight", amount=0.5, n=2, dim=1)
    x = torch.randn(8, 6)
    assert not model(x).isnan().any()
    copy = independent_copy(model)
    assert torch.equal(copy(x), model(x))
    with torch.no_grad():
        copy[0].weight_orig.zero_()
    assert not torch.equal(copy(x), model(x))
    assert_exact(model, x, coar.neurons(model, include="0"), tmp_path / "r.zarr", gradients=8)


class Hoarder(nn.Module):
    """A model that keeps activations, also in containers, and things that cannot be copied."""

    def __init__(self):
        super().__init__()
        self.net, self.seen, self.named = small(), [], {}
        self.lock, self.log, self.scaled = threading.Lock(), logging.getLogger("hoarder"), lambda y: 2 * y
        self.helper = type("Helper", (), {})()
        self.helper.lock, self.helper.factor = threading.RLock(), torch.tensor(1.5)
        self.torch, self.generator = torch, torch.Generator()

    def forward(self, x):
        with self.lock, self.helper.lock:
            self.last = self.net[0](x)
            self.seen.append(self.last)
            self.named["last"] = (self.last, 1)
            return self.scaled(self.net[2](self.net[1](self.last))) * self.helper.factor


def test_models_that_keep_activations_and_locks(tmp_path):
    model, x = Hoarder(), torch.randn(8, 6)
    model(x)
    copy = independent_copy(model)
    assert torch.equal(copy.last, model.last)
    assert copy.last.is_leaf
    assert copy.last is copy.seen[0] is copy.named["last"][0]
    assert model.last.grad_fn is not None
    assert copy.helper.factor is not model.helper.factor
    assert copy.lock is model.lock
    assert copy.generator is not model.generator
    assert_exact(model, x, coar.neurons(model, include="net.0"), tmp_path / "r.zarr", gradients=8)
    assert len(model.seen) == 1 + MASKS  # passes of the oracle: none of ours


class Uncopyable:
    def __deepcopy__(self, memo):
        raise RuntimeError("this is a handle")


class Holder(nn.Module):
    """A module that holds an object with tensors that cannot be copied."""

    def __init__(self):
        super().__init__()
        self.inner, self.handle = small(), Uncopyable()

    def forward(self, x):
        return self.inner(x)


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(Holder())
    with pytest.raises(WeightsError, match=r"'handle' of '0', a Uncopyable, cannot be copied \(RuntimeError: this is"):
        independent_copy(model)


def run_of(model, inputs, folder):
    return masks_and_outputs(model, inputs, coar.neurons(model, include="*0"), folder)


FAILING = {
    "uint8": (
        torch.randint(0, 255, (8, 6), dtype=torch.uint8),
        r"Sequential fails on the first examples, inputs: uint8 \(2, 6\): .*inputs\.to\(torch\.float32\) / 255",
    ),
    "float64": (torch.randn(8, 6).double(), r"inputs are torch\.float64 and the model's weights are torch\.float32"),
    "another name": ({"y": torch.randn(8, 6)}, r"unexpected keyword argument 'y'.*the keys of the inputs, \['y'\]"),
    "another shape": (torch.randn(8, 7), r"inputs: float32 \(2, 7\): RuntimeError: .*call model\.eval\(\)\(inputs\)"),
}


@pytest.mark.parametrize(("inputs", "message"), FAILING.values(), ids=FAILING)
def test_inputs_that_the_model_does_not_take_are_described(tmp_path, inputs, message):
    with pytest.raises(ExamplesError, match=message):
        run_of(small(), inputs, tmp_path / "r.zarr")


Pair = namedtuple("Pair", "hidden rest")


@dataclass
class Result:
    """What a block may return instead of a tensor."""

    loss: torch.Tensor | None
    hidden: torch.Tensor
    rest: float


RESULTS = {
    "named tuple": (lambda h: Pair(h, h.mean()), lambda y: y.hidden),
    "structure of torch": (lambda h: torch.topk(h, 16), lambda y: y.values),
    "dataclass": (lambda h: Result(None, h, 2.0), lambda y: y.hidden * y.rest),
    "output of transformers": (lambda h: BaseModelOutput(last_hidden_state=h), lambda y: y[0] + y.last_hidden_state),
}


class Wrapping(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.inner, self.pack = nn.Linear(6, 16), pack

    def forward(self, x):
        return self.pack(torch.tanh(self.inner(x)))


class Reading(nn.Module):
    """A net that reads its block's result by name."""

    def __init__(self, pack, unpack):
        super().__init__()
        self.block, self.last, self.unpack = Wrapping(pack), nn.Linear(16, 4), unpack
        oracles.rough(self)

    def forward(self, x):
        return self.last(self.unpack(self.block(x)))


@pytest.mark.parametrize("name", RESULTS)
def test_a_block_may_return_more_than_a_tensor(tmp_path, name):
    pack, unpack = RESULTS[name]
    model, x = Reading(pack, unpack), torch.randn(8, 6)
    components = coar.modules(model, "block") + coar.neurons(model, include="last")[:2]
    masks, found, targets = masks_and_outputs(model, x, components, tmp_path / "r.zarr", gradients=8)
    with torch.no_grad():
        read = [model.unpack(model.block(x)) * keep for keep in masks[:, 0]]
        logits = [model.last(y) * torch.tensor([*mask[1:], True, True]) for y, mask in zip(read, masks, strict=True)]
    expected = [oracles.read_outputs(row, targets, "logsumexp") for row in logits]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert masks[:, 0].any()
    assert not masks[:, 0].all()


def test_a_home_folder_is_found_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = small()
    run_of(model, torch.randn(8, 6), "~/runs/r.zarr")
    assert (tmp_path / "runs" / "r.zarr").is_dir()
    run = coar.Run.open("~/runs/r.zarr")
    coar.fit(run, progress=False).to_safetensors("~/a.safetensors")
    assert len(coar.load("~/a.safetensors").components) == 16
    assert coar.load("~/runs/r.zarr").fit.masks == MASKS
    coar.save_weights(model, "~/w.safetensors")
    coar.load_weights(model, "~/w.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "runs", "w.safetensors"]
