"""Passes that begin where masks begin to differ give what overwritten copies give, and run nothing twice."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import coar
from coar.forward.execution_plan import ExecutionPlan
from coar.forward.runner import FastRunner, ReferenceRunner
from tests import oracles, tiny


class Residual(nn.Module):
    """A block that changes in place what its modules return: a sum, and a rectifier."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, channels, 1)  # is called last, on what came first
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv2(self.relu(self.conv1(x)))
        y += self.down(x)
        return self.relu(y)


class Net(nn.Module):
    """Two blocks and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(Residual(4), Residual(4))
        self.twice = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(self.twice(self.twice(x).relu()).mean((2, 3)))


class Ignoring(Net):
    """Relies on a module that changes what it is given, and ignores what it returns."""

    def forward(self, x):
        x = self.stem(x)
        self.blocks[0].relu(x)
        return self.head(self.twice(self.blocks[1](self.blocks[0](x))).mean((2, 3)))


class Moody(Net):
    """Calls its modules in another order every time."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.stem(x)
        first, second = self.blocks if self.calls % 2 else reversed(self.blocks)
        return self.head(self.twice(second(first(x))).mean((2, 3)))


class Skipping(Net):
    """Leaves a block out in one pass, after the survey, the one that is held, and the first that goes on from it."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.stem(x)
        if self.calls != 4:
            x = self.blocks[0](x)
        return self.head(self.twice(x).mean((2, 3)))


def one_at_a_time(count):
    return ~np.eye(count, dtype=bool)


def worker_for(model, components, **settings):
    output = coar.CorrectClassMargin()
    return FastRunner(model.eval(), components, torch.zeros(components.width), output, **settings)


def examples_for(x, y):
    return coar.Examples(inputs=x, targets=y)


def counted(model, monkeypatch):
    """Count the calls of each convolution and linear layer, however it is called."""
    found, plain = Counter(), {kind: kind.forward for kind in (nn.Conv2d, nn.Linear)}
    names = {module: name for name, module in model.named_modules()}

    def forward(self, x):
        found[names[self]] += 1
        return plain[type(self)](self, x)

    for kind in plain:
        monkeypatch.setattr(kind, "forward", forward)
    return found


def expected(model, components, masks, x, y):
    """Margins of copies in which what the ablated channels return is overwritten by zeros."""
    rows = []
    for mask in masks:
        gone = {(row.site, row.position): 0.0 for row, kept in zip(components, mask, strict=True) if not kept}
        rows.append(oracles.replaced_outputs(model, x, y, gone))
    return np.stack(rows)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(7, 1, 8, 8, generator=generator), torch.randint(3, (7,), generator=generator)


@pytest.mark.parametrize("kind", [Net, Ignoring])
def test_outputs_are_those_of_overwritten_copies(data, kind):
    model = oracles.rough(kind())
    components = coar.conv_filters(model)
    masks = one_at_a_time(len(components))[np.random.default_rng(0).permutation(len(components))]
    masks[3, :2] = False
    masks[5] = True
    worker = worker_for(model, components, plan=ExecutionPlan(batch_size=4))
    found = worker.outputs(worker.load(examples_for(*data), 0, 7), masks)
    np.testing.assert_allclose(found, expected(model, components, masks, *data), rtol=1e-4, atol=1e-5)


def test_what_comes_before_runs_once(data, monkeypatch):
    """Filters of the last layer alone: all before runs for the survey, to be held, and for the one plain pass."""
    model = oracles.rough(Net())
    components = coar.conv_filters(model, include=["twice"])
    worker = worker_for(model, components)
    block = worker.load(examples_for(*data), 0, 7)
    found = counted(model, monkeypatch)
    worker.outputs(block, one_at_a_time(4))
    assert found == dict.fromkeys(found, 3) | {"twice": 2 * 4 + 2 * 2, "head": 4 + 2}
    found.clear()
    worker.outputs(block, one_at_a_time(4))
    assert found == {"stem": 1, **{name: 1 for name in found if "blocks" in name}, "twice": 2 * 4, "head": 4}


def test_masks_in_order_hold_each_layer_once(data, monkeypatch):
    model = oracles.rough(Net())
    components = coar.conv_filters(model)
    worker = worker_for(model, components)
    block, masks = worker.load(examples_for(*data), 0, 7), one_at_a_time(len(components))
    worker.outputs(block, masks)
    found = counted(model, monkeypatch)
    worker.outputs(block, masks)
    # each of the filters of this layer and of those before, and once to be held for those that come later
    assert [found[name] for name in ("stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.0.down")] == [5, 9, 13, 17]
    assert [found[name] for name in ("blocks.1.conv1", "blocks.1.down", "twice")] == [21, 29, 2 * 32]


def test_masks_that_differ_early_run_one_by_one(data, monkeypatch):
    model = oracles.rough(Net())
    components = coar.conv_filters(model)
    worker = worker_for(model, components)
    block = worker.load(examples_for(*data), 0, 7)
    masks = np.random.default_rng(0).random((20, len(components))) < 0.5
    truth = expected(model, components, masks, *data)
    found = counted(model, monkeypatch)
    np.testing.assert_allclose(worker.outputs(block, masks), truth, rtol=1e-4, atol=1e-5)
    assert found["stem"] == 20


@pytest.mark.parametrize(
    ("kind", "site"), [(Ignoring, "blocks.0.conv2"), (Moody, "blocks.0.conv2"), (Skipping, "twice")]
)
def test_models_that_cannot_share_run_plainly(data, kind, site, monkeypatch, caplog):
    model = oracles.rough(kind())
    components = coar.conv_filters(model, include=[site])
    worker = worker_for(model, components)
    block = worker.load(examples_for(*data), 0, 7)
    with caplog.at_level("INFO"):
        worker.outputs(block, one_at_a_time(4))
    assert "the prefix cache is not used: " in caplog.text
    assert [one.path for one in worker.fallbacks] == ["the prefix cache"]
    found = counted(model, monkeypatch)
    worker.outputs(block, one_at_a_time(4))
    assert found["stem"] == 4


def test_outputs_that_are_not_finite_stay_so(data, monkeypatch):
    model = oracles.rough(Net())
    components = coar.conv_filters(model, include=["twice"])
    x, y = data
    x[2, 0, 3, 3] = float("nan")
    worker = worker_for(model, components)
    block = worker.load(examples_for(x, y), 0, 7)
    found = worker.outputs(block, one_at_a_time(4))
    assert np.isnan(found).all(0).tolist() == [False, False, True, False, False, False, False]
    truth = expected(model, components, one_at_a_time(4), x, y)
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-5)
    calls = counted(model, monkeypatch)
    worker.outputs(block, one_at_a_time(4))
    assert calls["stem"] == 1


def test_neither_the_reference_nor_a_plan_without_it_uses_the_cache(data, monkeypatch):
    model = oracles.rough(Net()).eval()
    components = coar.conv_filters(model, include=["twice"])
    reference = ReferenceRunner(model, components, torch.zeros(components.width), coar.CorrectClassMargin())
    found = counted(model, monkeypatch)
    for runner in (reference, worker_for(model, components, plan=ExecutionPlan(prefix_cache=False))):
        block = runner.load(examples_for(*data), 0, 7)
        found.clear()
        runner.outputs(block, one_at_a_time(4))
        assert found["stem"] == 4


def test_modules_are_as_before(data):
    """After a pass, and after one that fails half-way."""
    model = oracles.rough(Net())
    components = coar.conv_filters(model, include=["twice"])
    worker = worker_for(model, components)
    worker.outputs(worker.load(examples_for(*data), 0, 7), one_at_a_time(4))
    assert not any("forward" in vars(module) for module in model.modules())
    wide = examples_for(torch.zeros(3, 2, 8, 8), torch.zeros(3, dtype=torch.long))
    with pytest.raises(RuntimeError):
        worker.outputs(worker.load(wide, 0, 3), one_at_a_time(4))
    assert not any("forward" in vars(module) for module in model.modules())


def test_residual_net_of_torchvision():
    model = oracles.rough(resnet18(weights=None, num_classes=5))
    components = coar.conv_filters(model)
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(3, 3, 32, 32, generator=generator), torch.tensor([0, 4, 1])
    chosen = np.random.default_rng(1).choice(len(components), 12, replace=False)
    masks = one_at_a_time(len(components))[chosen]
    worker = worker_for(model, components)
    found = worker.outputs(worker.load(examples_for(*data), 0, 3), masks)
    np.testing.assert_allclose(found, expected(model, components, masks, *data), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_transformers_give_the_same_as_one_mask_at_a_time(kind):
    model = tiny.model(kind)
    components = coar.neurons(model) + coar.attention_heads(model)
    masks = one_at_a_time(len(components))[:: len(components) // 24]
    inputs = tiny.inputs(kind)
    examples = coar.Examples(inputs=inputs, targets=torch.zeros(5, dtype=torch.long))
    shared, plain = (worker_for(model, components) for _ in range(2))
    block = shared.load(examples, 0, 5)
    alone = np.concatenate([plain.outputs(block, mask[None]) for mask in masks])
    np.testing.assert_allclose(shared.outputs(block, masks), alone, rtol=1e-5, atol=1e-6)
