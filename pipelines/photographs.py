"""Data sets of photographs in a folder, and a ResNet with a head for two classes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model, list_models

import coar
from pipelines import studies, training

RESNETS = sorted(name for name in list_models() if name.startswith("resnet"))
HEAD = training.Recipe(epochs=100, batch=64, learning_rate=1e-2, weight_decay=1e-4)
BLOCK = 50  # pictures per forward pass while a head is trained
SPLITS = ("train", "validation", "test")
TRAIN, CALIBRATION = 3_000, 300  # pictures of the training split
STUDIED, CHOOSING, JUDGED = slice(75), slice(75, 175), slice(250)  # of every group; the last of the test split


@dataclass(frozen=True, kw_only=True)
class Collection:
    """A data set of photographs in two classes, with groups by whether a spurious cue agrees with the class.

    Attributes:
        files: (pictures,) paths.
        labels: (pictures,) classes, 0 or 1.
        groups: (pictures,) names of groups.
        splits: (pictures,) 0 for training, 1 for validation, 2 for test.
        prepare: Preprocessing of a picture for the model.
    """

    files: Sequence[Path]
    labels: np.ndarray
    groups: np.ndarray
    splits: np.ndarray
    prepare: Callable[[Image.Image], Tensor]

    def examples(self, split: str, *, count: int | None = None, of_each: slice | None = None) -> coar.Examples:
        """Return pictures of a split: the first ones, or a slice of every group."""
        rows = np.flatnonzero(self.splits == SPLITS.index(split))[:count]
        if of_each:
            groups = self.groups[rows]
            rows = np.sort(np.concatenate([rows[groups == group][of_each] for group in np.unique(groups)]))
        return coar.Examples(
            inputs=coar.ImageFiles([self.files[row] for row in rows], self.prepare),
            targets=torch.from_numpy(self.labels[rows]),
            metadata={"id": rows, "group": self.groups[rows]},
        )


def folder(variable: str, contents: str) -> Path:
    """Return the folder that an environment variable names; raise `PipelineError` when it names none."""
    path = os.environ.get(variable)
    if not path or not Path(path).is_dir():
        given = f"is {path!r}, which is not a folder" if path else "is not set"
        raise coar.errors.PipelineError(f"{variable} {given}; set it to the folder with {contents}")
    return Path(path)


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file; raise `PipelineError` when it cannot be read."""
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise coar.errors.PipelineError(f"cannot read {file} ({error}); unpack the data set again") from None


def numbers(values: Sequence[str | None], allowed: Sequence[int], place: str) -> np.ndarray:
    """Return words as whole numbers; raise `PipelineError`, which names the place, when a number is not allowed."""
    known = {str(number): number for number in allowed}
    wrong = [(row, value) for row, value in enumerate(values) if value not in known]
    if wrong:
        row, value = wrong[0]
        raise coar.errors.PipelineError(
            f"{place} is {value!r} in row {row}, counted from 0, where one of {', '.join(known)} is expected; "
            f"unpack the data set again"
        )
    return np.array([known[value] for value in values if value is not None])


def classifier(name: str, collection: Collection, *, seed: int) -> nn.Module:
    """Return a torchvision ResNet with two classes.

    `COAR_<NAME>_WEIGHTS` names a checkpoint of it. Without one, the head is trained on features of the ImageNet
    weights, which torchvision fetches, and kept under data/<name>. `COAR_<NAME>_MODEL` names another ResNet than
    resnet50.

    Args:
        name: Name of the data set.
        collection: Its pictures.
        seed: Seed of the head's training.

    Raises:
        SettingsError: When there is no such ResNet.
        PipelineError: When the ImageNet weights cannot be fetched.
    """
    variable = f"COAR_{name.upper()}"
    kind, checkpoint = architecture(variable, RESNETS, usual="resnet50"), os.environ.get(f"{variable}_WEIGHTS")
    if checkpoint:
        return coar.load_weights(get_model(kind, weights=None, num_classes=2), checkpoint).eval()
    examples = collection.examples("train", count=TRAIN)
    names = [str(file) for file in examples.inputs.files]
    return training.trained(
        lambda: pretrained(kind, variable),
        lambda net: fit_head(net, examples),
        folder=Path("data") / name,
        seed=seed,
        settings={"recipe": asdict(HEAD), "files": names, "targets": examples.targets.tolist()},
        about="five minutes with a resnet50",
        report=lambda net: training.accuracy_by("group", net, collection.examples("validation", of_each=STUDIED)),
    )


def architecture(variable: str, known: Sequence[str], *, usual: str) -> str:
    """Return the model that <variable>_MODEL names, or the usual one; raise `SettingsError` when it is unknown."""
    kind = os.environ.get(f"{variable}_MODEL", usual)
    if kind not in known:
        raise coar.errors.SettingsError(f"{variable}_MODEL is {kind!r}; choose one of {', '.join(known)}")
    return kind


def imagenet_weights(kind: str, *, otherwise: str) -> nn.Module:
    """Return a model with torchvision's ImageNet weights; raise `PipelineError` when they cannot be fetched."""
    try:
        return get_model(kind, weights="IMAGENET1K_V1")
    except OSError as error:
        raise coar.errors.PipelineError(
            f"the ImageNet weights of {kind} cannot be fetched ({error}); put their file into "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'}, or set {otherwise}"
        ) from None


def pretrained(kind: str, variable: str) -> nn.Module:
    """Return a ResNet with ImageNet weights and a new head for two classes."""
    model = imagenet_weights(
        kind,
        otherwise=f"{variable}_WEIGHTS to a checkpoint: the state dict of a torchvision {kind} with two classes, "
        f"trained on this data set, as safetensors or .pt",
    )
    model.fc = nn.Linear(model.fc.in_features, 2)
    return model


def fit_head(model: nn.Module, examples: coar.Examples) -> None:
    """Train the last layer of a ResNet on the features of the layers below; each picture is read once."""
    head, model.fc = model.fc, nn.Identity()
    model.eval()
    blocks = (examples.block(start, start + BLOCK)[0] for start in range(0, len(examples), BLOCK))
    with torch.no_grad():
        features = torch.cat([model(pictures) for pictures in blocks])
    model.fc = head
    training.fit(head, coar.Examples(inputs=features, targets=examples.targets), HEAD)


def study(model: nn.Module, collection: Collection, *, ablation: str, ablated_fraction: float, seed: int) -> coar.Study:
    """Define a study of up to 75 validation pictures of each group; means are those of 300 training pictures."""
    return studies.of_margins(
        model,
        collection.examples("validation", of_each=STUDIED),
        components=coar.conv_filters(model),
        calibration=collection.examples("train", count=CALIBRATION),
        ablation=ablation,
        ablated_fraction=ablated_fraction,
        seed=seed,
    )


def published(name: str, model: nn.Module, collection: Collection) -> coar.Study:
    """Return the study of the attributions that Shah et al. (2024) publish for a data set.

    Raises:
        SettingsError: When COAR_<NAME>_PUBLISHED names no split of the published files; without it, it is `test`.
    """
    split = os.environ.get(f"COAR_{name.upper()}_PUBLISHED", "test")
    if split not in ("train", "test"):
        raise coar.errors.SettingsError(f"COAR_{name.upper()}_PUBLISHED is {split!r}; choose train or test")
    return coar.Study(
        model=model,
        examples=collection.examples(split),
        components=coar.conv_filters(model, exclude="*.downsample.*"),
        output=coar.CorrectClassMargin(against="largest"),
        ablation=coar.ZeroWeight(),
        sampler=coar.BernoulliSampler(ablated_fraction=0.05),
    )
