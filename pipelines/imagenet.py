"""ImageNet's validation pictures, in folders or in a .beton file, and torchvision's models."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models import get_model, get_model_weights
from torchvision.transforms.functional import normalize

import coar
from pipelines import beton, photographs

WANTED = "ImageNet's validation pictures as val/<wnid>/<name>.JPEG, or to a .beton file of them"
WNID = re.compile(r"n\d{8}")  # a class's number in WordNet; classes are in the order of these
PUBLISHED = 1_000  # classes of the published weights
EIGHTHS = {"studied": (0,), "calibration": (1,), "choosing": (2, 3), "judge": (4, 5, 6, 7)}  # of every eight
MOST = {"studied": 256, "calibration": 300, "choosing": 1_000, "judge": 2_000}

Part = Literal["studied", "calibration", "choosing", "judge"]


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Pictures with ImageNet's classes.

    Attributes:
        labels: (pictures,) classes.
        metadata: Columns of one value per picture.
        inputs: Makes the data set of the pictures at given rows.
    """

    labels: np.ndarray
    metadata: dict[str, np.ndarray]
    inputs: Callable[[np.ndarray], Dataset[Tensor]]

    def examples(self, part: Part) -> coar.Examples:
        """Return a part of the pictures, in a fixed order that mixes the classes."""
        order = np.random.default_rng(0).permutation(len(self.labels))
        return self.at(np.sort(order[np.isin(np.arange(len(order)) % 8, EIGHTHS[part])][: MOST[part]]))

    def at(self, rows: np.ndarray) -> coar.Examples:
        """Return the pictures at given rows."""
        return coar.Examples(
            inputs=self.inputs(rows),
            targets=torch.from_numpy(self.labels[rows]),
            metadata={"id": rows, **{name: column[rows] for name, column in self.metadata.items()}},
        )


class Normalised(Dataset[Tensor]):
    """Bytes of pictures normalised for a model: scaled to 0 to 1, minus the mean, over the standard deviation."""

    def __init__(self, pictures: beton.BetonPictures, preset: Any) -> None:
        self.pictures, self.preset = pictures, preset

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        """Return one picture."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """Return several pictures."""
        return [
            normalize(picture / 255, self.preset.mean, self.preset.std)
            for picture in self.pictures.__getitems__(indices)
        ]


def published(net: nn.Module, kind: str, components: coar.Components, *, step: int) -> coar.Study:
    """Return the study of the attributions that Shah et al. (2024) publish, of every picture or of one in `step`."""
    found = validation(preset(kind))
    return coar.Study(
        model=net,
        examples=found.at(np.arange(0, len(found.labels), step)),
        components=components,
        output=coar.CorrectClassMargin(against="largest"),
        ablation=coar.ZeroWeight(),
        sampler=coar.BernoulliSampler(ablated_fraction=0.05),
    )


def classes() -> int:
    """Return the number of classes: COAR_IMAGENET_CLASSES, or ImageNet's 1,000."""
    given = os.environ.get("COAR_IMAGENET_CLASSES", str(PUBLISHED))
    if not given.isdecimal() or int(given) < 2:
        raise coar.errors.SettingsError(f"COAR_IMAGENET_CLASSES is {given!r}; give a whole number of classes")
    return int(given)


def validation(preset: Any) -> Validation:
    """Return the pictures that COAR_IMAGENET names, with torchvision's preprocessing for a model.

    Raises:
        PipelineError: When COAR_IMAGENET names no such pictures, or ffcv is needed and not installed.
    """
    place = Path(os.environ.get("COAR_IMAGENET", ""))
    if place.suffix == ".beton" and place.is_file():
        found = from_beton(place, preset)
    else:
        found = from_folder(photographs.folder("COAR_IMAGENET", WANTED), preset)
    if len(found.labels) < 8:
        raise coar.errors.PipelineError(
            f"{place} has {len(found.labels)} pictures and at least 8 are needed; set COAR_IMAGENET to the folder with "
            f"{WANTED}"
        )
    return found


def from_folder(root: Path, preset: Any) -> Validation:
    """Return pictures of a folder with a sub-folder per class, or of the `val` in it."""
    folder = root / "val" if (root / "val").is_dir() else root
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    odd = [name for name in names if not WNID.fullmatch(name)]
    if odd or len(names) != classes():
        what = f"a folder {odd[0]!r}, which is not a class" if odd else f"{len(names)} folders of classes"
        raise coar.errors.PipelineError(
            f"{folder} has {what}, where {classes()} folders such as n01440764 are expected; set COAR_IMAGENET to the "
            f"folder with {WANTED} (the archive holds the pictures alone, torchvision.datasets.ImageNet sorts them), "
            f"or COAR_IMAGENET_CLASSES to another number of classes"
        )
    files = [sorted(file for file in (folder / name).iterdir() if file.is_file()) for name in names]
    counts = [len(of_class) for of_class in files]
    every = [file for of_class in files for file in of_class]
    return Validation(
        labels=np.repeat(np.arange(len(names)), counts),
        metadata={"wnid": np.repeat(names, counts)},
        inputs=lambda rows: coar.ImageFiles([every[row] for row in rows], preset),
    )


def from_beton(file: Path, preset: Any) -> Validation:
    """Return pictures of a .beton file."""
    labels = beton.labels(file)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes():
        raise coar.errors.PipelineError(
            f"{file} has labels from {labels.min()} to {labels.max()}, where 0 to {classes() - 1} are expected; write "
            f"it again with classes in the order of their wnids, or set COAR_IMAGENET_CLASSES to another number of them"
        )
    (size,), (resized,) = preset.crop_size, preset.resize_size
    return Validation(
        labels=labels,
        metadata={},
        inputs=lambda rows: Normalised(beton.BetonPictures(file, rows, size=size, ratio=size / resized), preset),
    )


def model(name: str, kind: str) -> nn.Module:
    """Return a model of torchvision's with the checkpoint in COAR_<NAME>_WEIGHTS, or the weights that it fetches.

    Raises:
        PipelineError: When weights cannot be fetched, or have another number of classes.
    """
    variable = f"COAR_{name.upper()}_WEIGHTS"
    if checkpoint := os.environ.get(variable):
        return coar.load_weights(get_model(kind, weights=None, num_classes=classes()), checkpoint).eval()
    if classes() != PUBLISHED:
        raise coar.errors.PipelineError(
            f"torchvision's weights are for {PUBLISHED} classes and COAR_IMAGENET_CLASSES is {classes()}; set "
            f"{variable} to a checkpoint of a torchvision {kind} with {classes()} classes"
        )
    alternative = f"{variable} to a checkpoint: the state dict of a torchvision {kind}, as safetensors or .pt"
    return photographs.imagenet_weights(kind, otherwise=alternative).eval()


def preset(kind: str) -> Any:
    """Return torchvision's preprocessing of pictures for a model."""
    return get_model_weights(kind)["IMAGENET1K_V1"].transforms()
