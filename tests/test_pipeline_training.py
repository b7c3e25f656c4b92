"""Nets that pipelines train on first use: two classes of points that a linear layer separates."""

import logging
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

import coar
from pipelines import training

SHORT = training.Recipe(epochs=1, batch=32, learning_rate=1e-3, weight_decay=0.0)


@pytest.fixture
def examples():
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    groups = np.where(x[:, 1] > 0, "up", "down")
    return coar.Examples(inputs=x, targets=(x[:, 0] > 0).long(), metadata={"group": groups})


@pytest.fixture
def trained(examples, tmp_path):
    def call(recipe=SHORT, seed=0, train=training.fit, make=lambda: nn.Linear(5, 2)):
        return training.trained(
            make,
            lambda net: train(net, examples, recipe),
            folder=tmp_path,
            seed=seed,
            settings=asdict(recipe),
            about="no time",
            report=lambda net: training.accuracy_by("group", net, examples),
        )

    return call


def test_fitting_learns(trained, examples):
    recipe = replace(SHORT, epochs=30, learning_rate=0.05)
    before = training.correct(nn.Linear(5, 2), examples).mean()
    assert training.correct(trained(recipe), examples).mean() > max(0.95, before)


def test_weights_are_kept_and_used_again(trained, tmp_path):
    first = trained()

    def never(net, examples, recipe):
        raise AssertionError

    assert torch.equal(trained(train=never).weight, first.weight)
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]


def test_same_seed_gives_same_weights_and_leaves_the_generator_alone(trained, tmp_path):
    state = torch.get_rng_state()
    first = trained()
    assert torch.equal(torch.get_rng_state(), state)
    next(tmp_path.iterdir()).unlink()
    assert torch.equal(trained().weight, first.weight)
    assert not torch.equal(trained(seed=1).weight, first.weight)


@pytest.mark.parametrize("change", ["recipe", "seed", "architecture"])
def test_another_definition_is_trained_anew(trained, tmp_path, change):
    trained()
    changes = {
        "recipe": {"recipe": replace(SHORT, weight_decay=0.1)},
        "seed": {"seed": 1},
        "architecture": {"make": lambda: nn.Linear(5, 2, bias=False)},
    }
    trained(**changes[change])
    assert len(list(tmp_path.iterdir())) == 2


def test_training_that_fails_leaves_nothing(trained, tmp_path):
    def fails(net, examples, recipe):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(train=fails)
    assert list(tmp_path.iterdir()) == []


def test_a_line_before_and_a_line_after(trained, caplog):
    caplog.set_level(logging.INFO, logger="coar")
    trained()
    assert len(caplog.messages) == 2
    assert "about no time" in caplog.messages[0]
    assert "accuracy: down " in caplog.messages[1]


def test_accuracy_by_group_is_counted(examples):
    model = nn.Linear(5, 2)
    with torch.no_grad():
        hits = (model(examples.inputs).argmax(1) == examples.targets).numpy()
    groups = np.asarray(examples.metadata["group"])
    expected = {group: sum(hits[groups == group]) / sum(groups == group) for group in ("up", "down")}
    assert training.accuracy_by("group", model, examples) == pytest.approx(expected)
