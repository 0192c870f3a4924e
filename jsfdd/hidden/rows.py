"""The format of one token's hidden state in a store: float32, bfloat16, or int8 with a scale per token.

A row is D numbers, little-endian; an int8 row is D signed bytes followed by one float32 scale. Where the streams that enter
some layers stand in front of the final state, the row has those parts one after the other, each with its own scale: a stream's
magnitude grows from layer to layer. Rows have a fixed size, so a sample is found by counting. Other things than hidden states
may be stored as D words of uint16.
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


def row_bytes(dtype: RowDtype, hidden_size: int, parts: int = 1) -> int:
    """The bytes of one token of `hidden_size` numbers. KeyError: an unknown dtype."""
    return hidden_size + parts * _SCALE.itemsize if dtype == "int8" else hidden_size * _PLAIN[dtype].itemsize


def encode(hidden: Float[np.ndarray, "T S"], dtype: RowDtype, parts: int = 1) -> UInt8[np.ndarray, "T row"]:
    """Hidden states as a store's rows. int8 maps the largest magnitude of each token's part to 127 and rounds to the nearest
    level."""
    if dtype != "int8":
        return np.ascontiguousarray(hidden, _PLAIN[dtype]).view(np.uint8)
    tokens, width = hidden.shape
    hidden = np.asarray(hidden, np.float32).reshape(tokens * parts, width // parts)
    scale = (np.abs(hidden).max(axis=1, keepdims=True) / _LEVELS).astype(_SCALE)
    # A row whose scale is 0, or so small that the quotient could overflow, is as good as zero.
    levels = np.divide(hidden, scale, out=np.zeros_like(hidden), where=scale > np.finfo(np.float32).tiny)
    levels = np.rint(levels).clip(-_LEVELS, _LEVELS).astype(np.int8)
    return np.concatenate([levels.view(np.uint8), scale.view(np.uint8)], axis=1).reshape(tokens, -1)


def decode(rows: UInt8[np.ndarray, "T row"], dtype: RowDtype, parts: int = 1) -> Float[np.ndarray, "T S"]:
    """The inverse of `encode`, up to rounding: a view in `dtype`, or dequantised float32 for int8."""
    if dtype != "int8":
        return rows.view(_PLAIN[dtype])
    tokens, size = rows.shape
    levels, scale = np.split(rows.reshape(tokens * parts, size // parts), [size // parts - _SCALE.itemsize], axis=1)
    return (levels.view(np.int8).astype(np.float32) * np.ascontiguousarray(scale).view(_SCALE)).reshape(tokens, -1)
