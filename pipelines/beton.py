"""Pictures in a .beton file, read by ffcv."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import coar

BATCH = 32  # pictures that ffcv decodes at a time
FIELDS = {"image": "RGBImageField", "label": "IntField"}
DAMAGED = (OSError, AssertionError, ValueError, IndexError, KeyError, TypeError)  # raised on reading a damaged file


class BetonPictures(Dataset[Tensor]):
    """Pictures of a .beton file as bytes (3, size, size), read on access.

    If all pictures of the file have the given size, they are used unchanged; otherwise they are cropped in the middle
    and scaled as in ffcv's own recipe for ImageNet.
    """

    def __init__(self, file: Path, rows: Sequence[int] | np.ndarray, *, size: int, ratio: float) -> None:
        """Choose the pictures.

        Args:
            file: The .beton file, with fields `image` and `label`.
            rows: Numbers of the pictures in the file.
            size: Height and width of the returned pictures, in pixels.
            ratio: Side of the crop as a share of a picture's shorter side.
        """
        self.file, self.rows, self.size, self.ratio = file, np.asarray(rows, dtype=np.uint64), size, ratio

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        """Return one picture."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """Return several pictures; raise `PipelineError` when the file cannot be read."""
        loader = reader(self.file, self.size, self.ratio)
        loader.traversal_order.indices = self.rows[list(indices)]
        return [picture for (batch,) in loader for picture in batch.clone()]  # ffcv reuses its memory


def labels(file: Path) -> np.ndarray:
    """Return (pictures,) labels of a .beton file."""
    return np.asarray(opened(file).metadata["f1"], dtype=np.int64).reshape(-1)


def installed() -> Any:
    """Return ffcv; raise `PipelineError` when it is not installed."""
    try:
        import ffcv.loader
        import ffcv.transforms
    except ImportError as error:
        raise coar.errors.PipelineError(
            f"ffcv, which reads .beton files, cannot be imported ({error}); "
            f"{coar.errors.install_hint('ffcv')}, which needs a C++ compiler, pkg-config, libturbojpeg and OpenCV with "
            f"their headers, or give a folder of pictures instead"
        ) from None
    return ffcv


def opened(file: Path) -> Any:
    """Return ffcv's reader of a file; raise `PipelineError` when the file is damaged or has other fields."""
    ffcv = installed()
    try:
        found = ffcv.reader.Reader(str(file))
        kinds = {name: type(field).__name__ for name, field in found.handlers.items()}
        table = found.alloc_table  # places of the bytes of every picture
        whole = len(table) > 0 and int((table["ptr"] + table["size"]).max()) <= file.stat().st_size
        whole = whole and bool(np.isin(found.metadata["f0"]["data_ptr"], table["ptr"]).all())
    except DAMAGED as error:
        raise unreadable(file, str(error)) from None
    if kinds != FIELDS:
        raise coar.errors.PipelineError(f"{file} has the fields {kinds}; write it with {FIELDS}, in this order")
    if not whole:
        raise unreadable(file, "it ends too early")
    return found


def unreadable(file: Path, reason: str) -> coar.CoarError:
    """Return the error about a file that cannot be read, with the reason."""
    return coar.errors.PipelineError(f"cannot read {file} ({reason}); write it again with ffcv's DatasetWriter")


@cache  # ffcv compiles the code of every loader, which takes seconds
def reader(file: Path, size: int, ratio: float) -> Any:
    """Return ffcv's loader of a file; its order is set before every use."""
    ffcv, sizes = installed(), opened(file).metadata["f0"]
    fitting = bool(((sizes["width"] == size) & (sizes["height"] == size)).all())
    decoders = ffcv.fields.rgb_image
    decoder = (
        decoders.SimpleRGBImageDecoder() if fitting else decoders.CenterCropRGBImageDecoder((size, size), ratio=ratio)
    )
    pipeline = [decoder, ffcv.transforms.ToTensor(), ffcv.transforms.ToTorchImage(channels_last=False)]
    return ffcv.loader.Loader(
        str(file),
        batch_size=BATCH,
        num_workers=torch.get_num_threads(),  # ffcv also sets torch's number of threads
        os_cache=True,
        order=ffcv.loader.OrderOption.SEQUENTIAL,
        drop_last=False,
        batches_ahead=1,
        pipelines={"image": pipeline, "label": None},
    )
