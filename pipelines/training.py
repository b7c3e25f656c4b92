"""Training of models: a seeded loop, weights kept in a file, and accuracies by group."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import coar

log = logging.getLogger("coar.pipelines")  # the commands show this logger's messages

Loss = Callable[[nn.Module, Any, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of training with AdamW; the learning rate rises and then falls to 0 over all steps."""

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float


def trained(
    make: Callable[[], nn.Module],
    train: Callable[[nn.Module], None],
    *,
    folder: Path,
    seed: int,
    settings: Mapping[str, Any],
    about: str,
    report: Callable[[nn.Module], Mapping[str, float]],
) -> nn.Module:
    """Return a trained model, from its file in the folder if it exists.

    The file's name contains a hash of the initial weights and of the settings, so another architecture, seed or recipe
    trains a new model. The same seed gives the same weights on one machine with the same number of threads.

    Args:
        make: Builds the model; called with the seed set.
        train: Trains the model in place.
        folder: Folder of the weights.
        seed: Seed of the initial weights and of the order of examples.
        settings: Everything else that the weights depend on, as plain values.
        about: Approximate duration of training, for the log.
        report: Computes accuracies of a model, for the log.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        file = folder / f"net-{seed}-{_hash(model, settings)}.safetensors"
        if not file.exists():
            log.info("training %s for %s, about %s", type(model).__name__, file, about)
            train(model)
            coar.save_weights(model, file)
            accuracies = ", ".join(f"{name} {value:.1%}" for name, value in report(model.eval()).items())
            log.info("%s is trained; accuracy: %s", file, accuracies)
    return coar.load_weights(model, file).eval()


def _hash(model: nn.Module, settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name}:{tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def classification_loss(model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of the model's logits."""
    return functional.cross_entropy(model(inputs), targets)


def fit(model: nn.Module, examples: coar.Examples, recipe: Recipe, *, loss: Loss = classification_loss) -> None:
    """Train a model in place on examples that fit in memory, in batches of a new random order every epoch."""
    model.train()
    inputs, targets = examples.block(0, len(examples))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * math.ceil(len(targets) / recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.learning_rate, total_steps=steps)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(targets)).split(recipe.batch):
            optimizer.zero_grad()
            loss(model, _rows(inputs, rows), targets[rows]).backward()
            optimizer.step()
            schedule.step()


def _rows(inputs: Any, rows: Tensor) -> Any:
    return {name: value[rows] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[rows]


def fitted(
    make: Callable[[], nn.Module],
    examples: coar.Examples,
    recipe: Recipe,
    *,
    folder: Path,
    seed: int,
    about: str,
    report: Callable[[nn.Module], Mapping[str, float]],
    loss: Loss = classification_loss,
) -> nn.Module:
    """Return a model trained by `fit`, from its file in the folder if it exists; for arguments see `trained`."""
    return trained(
        make,
        lambda model: fit(model, examples, recipe, loss=loss),
        folder=folder,
        seed=seed,
        settings={"recipe": asdict(recipe), "examples": examples.fingerprint()},
        about=about,
        report=report,
    )


def correct(model: nn.Module, examples: coar.Examples, *, batch: int = 250) -> np.ndarray:
    """Return (examples,) booleans: whether the largest logit is that of the target."""
    blocks = (examples.block(start, start + batch) for start in range(0, len(examples), batch))
    with torch.inference_mode():
        return np.concatenate([(model(inputs).argmax(1) == targets).numpy() for inputs, targets in blocks])


def accuracy_by(column: str, model: nn.Module, examples: coar.Examples) -> dict[str, float]:
    """Return the accuracy of a classifier for each value of a metadata column, named as in `triggered=1`."""
    right, values = correct(model, examples), np.asarray(examples.metadata[column])
    return {
        str(value) if values.dtype.kind == "U" else f"{column}={value}": float(right[values == value].mean())
        for value in np.unique(values)
    }
