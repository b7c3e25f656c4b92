"""How examples look on a page: pictures on one sheet, or words."""

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coar.errors import PipelineError
from coar.examples import Examples
from coar.explorer.source import Show

SIDE = 64  # pixels of a thumbnail's longer side, at most
SMALL = 40  # pixels of a side up to which pictures are stored without loss, and enlarged without smoothing
QUALITY = 80  # of WebP
VALUES = 32  # numbers of a vector that are shown


@dataclass(frozen=True)
class Looks:
    """The looks of some examples: pictures or words, None where there are none.

    Attributes:
        pictures: (examples, height, width, 3) uint8 pictures.
        words: Words of each example, such as its tokens.
    """

    pictures: np.ndarray | None = None
    words: list[list[str]] | None = None

    def packed(self) -> dict[str, Any]:
        """Return the looks as the page reads them."""
        if self.pictures is not None:
            return {"sheet": sheet(self.pictures)}
        return {"words": self.words} if self.words is not None else {}


def looks_of(examples: Examples, rows: np.ndarray, show: Show | None = None, tokenizer: Any = None) -> Looks:
    """Return the looks of the examples at some positions.

    Args:
        examples: The examples.
        rows: Their positions.
        show: Returns a picture from an example's inputs, which are a tensor or a dict of tensors without the axis of
            examples: (height, width) or (height, width, 3) numbers, uint8 or from 0 to 1, or a PIL image. Or returns a
            list of words, or a text. By default a tensor of one or three channels is a picture, scaled to the range of
            all pictures; a vector of whole numbers is a list of tokens; and a short vector is a list of numbers.
        tokenizer: The tokenizer of transformers that decodes tokens; None for their numbers.

    Raises:
        PipelineError: When `show` returns something else, or pictures for some examples and words for others.
    """
    inputs = [_row(examples.block(int(row), int(row) + 1)[0]) for row in rows]
    if show is None:
        return _default(inputs, tokenizer)
    shown = [_shown(show(one)) for one in inputs]
    if all(isinstance(one, list) for one in shown):
        return Looks(words=shown)  # type: ignore[arg-type]
    if any(isinstance(one, list) for one in shown):
        raise PipelineError("show() returns a picture for some examples and words for others; return one of the two")
    return Looks(pictures=_of_one_size(shown))  # type: ignore[arg-type]


def sheet(pictures: np.ndarray) -> dict[str, Any]:
    """Return (count, height, width, 3) uint8 pictures as one WebP picture in base64, with their size and columns."""
    count, height, width, _ = pictures.shape
    columns = max(1, math.ceil(math.sqrt(count)))
    rows = max(1, math.ceil(count / columns))
    canvas = np.zeros((rows * columns, height, width, 3), dtype=np.uint8)
    canvas[:count] = pictures
    flat = canvas.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    small = max(height, width) <= SMALL
    file = io.BytesIO()
    Image.fromarray(flat).save(file, "WEBP", lossless=small, quality=100 if small else QUALITY)
    url = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"url": url, "width": width, "height": height, "columns": columns, "rows": rows, "pixelated": small}


def _row(inputs: Any) -> Any:
    return {name: value[0] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[0]


def _default(inputs: list[Any], tokenizer: Any) -> Looks:
    """Return pictures, tokens or numbers, whichever the inputs are; nothing for any others."""
    first = inputs[0]
    if isinstance(first, dict):
        name = next((name for name in ("input_ids", "pixel_values") if name in first), None)
        if name is None:
            return Looks()
        if name == "input_ids":
            return Looks(words=[_tokens(one, tokenizer) for one in inputs])
        inputs = [one[name] for one in inputs]
    first = inputs[0]
    whole = not (first.is_floating_point() or first.is_complex())
    if first.ndim == 1 and (whole or len(first) <= VALUES):
        return Looks(words=[[f"{value:.4g}" if not whole else str(value) for value in one.tolist()] for one in inputs])
    if first.ndim == 3 and first.shape[0] in (1, 3) and min(first.shape[1:]) > 1:
        return Looks(pictures=_of_one_size(_scaled(torch.stack(inputs))))
    return Looks()


def _tokens(one: dict[str, Tensor], tokenizer: Any) -> list[str]:
    there = one.get("attention_mask", torch.ones_like(one["input_ids"])).bool()
    ids = one["input_ids"][there].tolist()
    return [str(token) if tokenizer is None else str(tokenizer.decode([token])) for token in ids]


def _scaled(pictures: Tensor) -> list[np.ndarray]:
    """Scale (examples, channels, height, width) pictures to 0 to 255, each channel by its range over all of them."""
    values = pictures.detach().cpu().float()
    low, high = values.amin((0, 2, 3), keepdim=True), values.amax((0, 2, 3), keepdim=True)
    scaled = (values - low) / (high - low).clamp(min=1e-12)
    wide = (255 * scaled).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return list(wide.numpy())


def _shown(value: Any) -> "np.ndarray | list[str]":
    """Return what `show` returned as an RGB picture or as words; raise `PipelineError` for anything else."""
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
        return list(value)
    if isinstance(value, Image.Image):
        return np.asarray(value.convert("RGB"))
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    right = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if not right or array.dtype.kind not in "uif" or not array.size:
        raise PipelineError(
            f"show() returned a {type(value).__name__} of shape {array.shape} and type {array.dtype}; return a picture "
            f"(height, width) or (height, width, 3), uint8 or from 0 to 1, a PIL image, a list of words, or a text"
        )
    if array.dtype != np.uint8:
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise PipelineError(
                f"show() returned a picture with values from {array.min():g} to {array.max():g}; return uint8, or "
                f"numbers from 0 to 1"
            )
        array = (255 * array).round().astype(np.uint8)
    return array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2)


def _of_one_size(pictures: list[np.ndarray]) -> np.ndarray:
    """Return pictures of one size, reduced to `SIDE` pixels, in the middle of a black square where sizes differ."""
    images = [Image.fromarray(picture) for picture in pictures]
    for image in images:
        image.thumbnail((SIDE, SIDE))
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    out = np.zeros((len(images), height, width, 3), dtype=np.uint8)
    for one, image in zip(out, images, strict=True):
        left, top = (width - image.width) // 2, (height - image.height) // 2
        one[top : top + image.height, left : left + image.width] = np.asarray(image)
    return out
