"""Rows of a store: what comes back is what went in, up to the rounding that each format promises."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jsfdd.hidden.rows import decode, encode, row_bytes

HIDDEN = np.random.default_rng(0).normal(size=(50, 24)).astype(np.float32) * np.logspace(-3, 3, 50)[:, None].astype(np.float32)


def test_float32_is_exact_and_bfloat16_rounds_once():
    np.testing.assert_array_equal(decode(encode(HIDDEN, "float32"), "float32"), HIDDEN)
    rounded = decode(encode(HIDDEN, "bfloat16"), "bfloat16")
    assert rounded.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(rounded, HIDDEN.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype, size", [("float32", 96), ("bfloat16", 48), ("int8", 28)])
def test_a_row_has_its_size(dtype, size):
    assert row_bytes(dtype, 24) == size
    assert encode(HIDDEN, dtype).shape == (50, size) and encode(HIDDEN, dtype).dtype == np.uint8


def test_int8_by_hand():
    rows = encode(np.array([[254.0, -127.0, 1.1, 0.9], [0, 0, 0, 0]], np.float32), "int8")
    assert rows[0, :4].view(np.int8).tolist() == [127, -64, 1, 0]  # −63.5 goes to the even neighbour
    assert rows[0, 4:].view("<f4") == 2.0
    np.testing.assert_array_equal(decode(rows, "int8"), [[254, -128, 2, 0], [0, 0, 0, 0]])


@settings(deadline=None)
@given(arrays(np.float32, (3, 7), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_int8_is_off_by_half_a_level_at_most(hidden):
    found = decode(encode(hidden, "int8"), "int8")
    level = np.abs(hidden).max(axis=1, keepdims=True) / 127
    assert found.dtype == np.float32
    assert (np.abs(found - hidden) <= level * 0.5001 + 1e-36).all()


def test_int8_of_bfloat16_and_of_any_slice_of_tokens():
    rounded = HIDDEN.astype(ml_dtypes.bfloat16)
    rows = encode(rounded, "int8")
    np.testing.assert_array_equal(decode(rows, "int8"), decode(encode(rounded.astype(np.float32), "int8"), "int8"))
    np.testing.assert_array_equal(decode(rows[3:9], "int8"), decode(rows, "int8")[3:9])


def test_an_unknown_dtype_is_no_row():
    with pytest.raises(KeyError):
        row_bytes("float8", 24)


def test_words_are_kept_as_they_are():
    words = np.arange(1 << 16, dtype=np.uint16).reshape(64, -1)
    rows = encode(words, "uint16")
    assert rows.shape == (64, row_bytes("uint16", 1024)) == (64, 2048)
    np.testing.assert_array_equal(decode(rows, "uint16"), words)
