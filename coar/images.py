"""Image folders: files with their classes and columns, and a data set that reads pictures on access."""

import csv
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from coar.errors import ExamplesError

log = logging.getLogger(__name__)
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's ImageFolder
TABLE, FILE = "metadata.csv", "file_name"  # as in the image folders of Hugging Face's datasets
Transform = Callable[[Image.Image], Any]


class ImageFiles(Dataset[Any]):
    """Pictures read from their files on access, in RGB: inputs of `coar.Examples` that need not fit in memory.

    Args:
        files: The files.
        transform: Makes the model's input from a picture; None for numbers from 0 to 1, (3, height, width).

    Raises:
        ExamplesError: When a file is missing, or, on access, damaged.
    """

    def __init__(self, files: Sequence[Path], transform: Transform | None = None) -> None:
        self.files = tuple(files)
        missing = [file for file in self.files if not file.is_file()]
        if missing:
            raise ExamplesError(
                f"{len(missing)} of {len(files)} pictures are missing, first {missing[0]}; unpack the data set again"
            )
        self.transform = transform or as_numbers

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        """Return one picture; raise `ExamplesError` when its file is damaged."""
        try:
            with Image.open(self.files[index]) as picture:
                colours = picture.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # raised on damaged files, depending on the format
            raise ExamplesError(
                f"cannot read the picture {self.files[index]} ({error}); unpack the data set again, or remove it"
            ) from None
        return self.transform(colours)


def as_numbers(picture: Image.Image) -> Tensor:
    """Return a picture as (3, height, width) float32 numbers from 0 to 1."""
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class ImageFolder:
    """The pictures of a folder.

    Attributes:
        files: Paths, sorted.
        labels: (pictures,) numbers of classes.
        columns: (pictures,) columns: `file`, the path within the folder; `class_name`; the group; those of the table.
    """

    files: tuple[Path, ...]
    labels: np.ndarray
    columns: dict[str, np.ndarray]

    @classmethod
    def read(
        cls, folder: Path, *, group: str | None, label: str | None, classes: Sequence[str] | None
    ) -> "ImageFolder":
        """List the pictures of a folder; for arguments and errors see `Examples.from_folder`."""
        if not folder.is_dir():
            raise ExamplesError(f"{folder} is not a folder; give one with a subfolder of pictures for each class")
        files = tuple(sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS))
        if not files:
            raise ExamplesError(f"{folder} has no files that end in {', '.join(ENDINGS)}; give a folder of pictures")
        names = np.array([file.relative_to(folder).as_posix() for file in files])
        columns = {"file": names, **_table(folder / TABLE, names)}
        if group is not None and group not in columns:
            columns[group] = _levels(folder, names, 1, f"there is no {TABLE} with a column {group!r}")
        if label is not None and label not in columns:
            raise ExamplesError(f"{folder / TABLE} has no column {label!r}; it has {', '.join(columns)}")
        given = _levels(folder, names, 0, "classes are subfolders") if label is None else columns[label].astype("U")
        known = list(classes) if classes is not None else _sorted_classes(folder, given, subfolders=label is None)
        unknown = np.setdiff1d(given, known)
        if len(unknown):
            raise ExamplesError(f"{folder} has the class {unknown[0].item()!r}, and the classes are {', '.join(known)}")
        number = {name: i for i, name in enumerate(known)}
        columns["class_name"] = given
        columns.pop("label", None)  # `Examples` adds the numbers of classes under this name
        return cls(files, np.array([number[name] for name in given.tolist()]), columns)


def _sorted_classes(folder: Path, given: np.ndarray, *, subfolders: bool) -> list[str]:
    """Return the classes in order: all subfolders, empty ones too, or the values of a column, numbers by size."""
    if subfolders:
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
    found: list[str] = np.unique(given).tolist()
    return sorted(found, key=int) if all(name.isdecimal() for name in found) else found


def _levels(folder: Path, names: np.ndarray, level: int, why: str) -> np.ndarray:
    """Return the subfolder of each file at a level, 0 for the outermost."""
    parts = [str(name).split("/") for name in names]
    flat = ["/".join(part) for part in parts if len(part) < level + 2]
    if flat:
        wanted = "/".join(["class", "group"][: level + 1])
        raise ExamplesError(
            f"{why}, and {flat[0]!r} in {folder} is not in a subfolder {wanted}/; move it, or add a {TABLE} with a "
            f"column {FILE!r} and one of classes or groups"
        )
    return np.array([part[level] for part in parts])


def _table(file: Path, names: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of a table of pictures, in the order of the names; numbers where all values are numbers."""
    if not file.is_file():
        return {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ExamplesError(f"cannot read {file} ({error}); write it as comma-separated UTF-8") from None
    if not rows or FILE not in rows[0]:
        found = ", ".join(map(str, rows[0])) if rows else "no rows"
        raise ExamplesError(f"{file} has {found}; it needs a column {FILE!r} with the paths of pictures in the folder")
    by_file: dict[str, Mapping[str, str]] = {row[FILE]: row for row in rows}
    missing = [name for name in names.tolist() if name not in by_file]
    if missing:
        raise ExamplesError(f"{file} has no row for {len(missing)} pictures, first {missing[0]!r}; add them")
    absent = len(by_file) - len(names)
    if absent:
        log.warning("%s has rows for %d pictures that are not there; they are left out", file, absent)
    others = [name for name in rows[0] if name != FILE]
    return {name: _typed([by_file[key].get(name) or "" for key in names.tolist()]) for name in others}


def _typed(values: list[str]) -> np.ndarray:
    for kind in (np.int64, np.float64):
        try:
            return np.array(values).astype(kind)
        except ValueError:
            continue
    return np.array(values)
