"""How one token's hidden state lies in a store: as it is, rounded to bfloat16, or quantised to int8 with a scale a token.

A row is D numbers, little-endian; an int8 row is D signed bytes followed by one float32 scale. Rows have a fixed size, so a
sample is found by counting. Other things than hidden states may be stored as D words of uint16.
"""

from __future__ import annotations

from typing import Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

HiddenDtype = Literal["bfloat16", "float32", "int8"]
RowDtype = HiddenDtype | Literal["uint16"]

_PLAIN = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype("<f4"), "uint16": np.dtype("<u2")}
_SCALE = np.dtype("<f4")
_LEVELS = 127


def row_bytes(dtype: RowDtype, hidden_size: int) -> int:
    """Bytes of one token. KeyError for an unknown dtype."""
    return hidden_size + _SCALE.itemsize if dtype == "int8" else hidden_size * _PLAIN[dtype].itemsize


def encode(hidden: Float[np.ndarray, "T D"], dtype: RowDtype) -> UInt8[np.ndarray, "T row"]:
    """Hidden states as a store's rows. int8 maps each token's largest magnitude to 127 and rounds to the nearest level."""
    if dtype != "int8":
        return np.ascontiguousarray(hidden, _PLAIN[dtype]).view(np.uint8)
    hidden = np.asarray(hidden, np.float32)
    scale = (np.abs(hidden).max(axis=1, keepdims=True) / _LEVELS).astype(_SCALE)
    # A row whose scale is 0, or so small that the quotient could overflow, is as good as zero.
    levels = np.divide(hidden, scale, out=np.zeros_like(hidden), where=scale > np.finfo(np.float32).tiny)
    levels = np.rint(levels).clip(-_LEVELS, _LEVELS).astype(np.int8)
    return np.concatenate([levels.view(np.uint8), scale.view(np.uint8)], axis=1)


def decode(rows: UInt8[np.ndarray, "T row"], dtype: RowDtype) -> Float[np.ndarray, "T D"]:
    """What `encode` was given, but for rounding: a view in `dtype`, or for int8 the dequantised float32."""
    if dtype != "int8":
        return rows.view(_PLAIN[dtype])
    levels, scale = np.split(rows, [rows.shape[1] - _SCALE.itemsize], axis=1)
    return levels.view(np.int8).astype(np.float32) * np.ascontiguousarray(scale).view(_SCALE)
