"""Arrays and tables in the form in which a page reads them: JSON, with base64 for arrays."""

import base64
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

STEPS = 32767  # of int16 on either side of 0


def floats(values: np.ndarray) -> dict[str, Any]:
    """Return an array as float32 in base64; NaN stays NaN."""
    return {"shape": list(values.shape), "f32": _base64(values.astype("<f4"))}


def steps(values: np.ndarray) -> dict[str, Any]:
    """Return a (rows, columns) array as int16 steps of each row's largest magnitude, in base64.

    The error of a value is at most 1.6e-5 of that magnitude.
    """
    largest = np.abs(values).max(axis=1, initial=0.0) / STEPS
    scale = np.where(largest > 0, largest, 1.0).astype(np.float32)
    whole = np.clip(np.rint(values / scale[:, None]), -STEPS, STEPS)
    return {"shape": list(values.shape), "i16": _base64(whole.astype("<i2")), "scale": floats(scale)}


def shares(values: np.ndarray) -> dict[str, Any]:
    """Return an array of numbers from 0 to 1 as steps of 1 / 255, in base64; the error of a value is at most 0.002."""
    return {"shape": list(values.shape), "u8": _base64(np.rint(255 * values.clip(0, 1)).astype(np.uint8))}


def table(frame: "pd.DataFrame") -> dict[str, Any]:
    """Return a table as names of columns, and rows of numbers, words, booleans, and None for NaN."""
    rows = [[plain(value) for value in row] for row in frame.itertuples(index=False)]
    return {"columns": [str(name) for name in frame.columns], "rows": rows}


def plain(value: Any) -> Any:
    """Return a value of NumPy or Python as JSON has it: NaN and infinities become None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
