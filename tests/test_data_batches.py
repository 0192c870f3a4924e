"""Batch plans: every sample once, few shapes, little padding, and an epoch's order that only (seed, epoch) decide."""

import collections

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsfdd.base.records import Sample
from jsfdd.data.batches import (
    BatchPlan,
    Shape,
    bucket_lengths,
    choose_shapes,
    epoch_batches,
    make_batches,
    next_power_of_two,
    pad_batch,
    pad_rows,
    padding_share,
)

# Like chat data: log-normal lengths, many cut at 2048.
LENGTHS = np.minimum(np.random.default_rng(0).lognormal(5.5, 1.2, 20_000).astype(int) + 10, 2048).tolist()


def sample(length, masked=()):
    mask = np.zeros(length, bool)
    mask[list(masked)] = True
    return Sample("s", "test", np.arange(1, length + 1, dtype=np.int32), mask)


def test_bucket_lengths_are_a_fixed_list():
    assert bucket_lengths(1) == (64,)
    assert bucket_lengths(65) == (64, 80)
    assert bucket_lengths(513) == (64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640)
    assert bucket_lengths(10**6)[:14] == bucket_lengths(513)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 3000), max_size=200),
    token_budget=st.integers(1, 20_000),
    shape_cost=st.integers(0, 10_000),
    epoch=st.integers(0, 3),
)
def test_every_sample_once_in_a_shape_that_holds_it(lengths, token_budget, shape_cost, epoch):
    shapes = choose_shapes(lengths, token_budget, shape_cost)
    assert all(shape.rows > 0 for shape in shapes)
    assert all(shape.rows * shape.length <= max(token_budget, shape.length) for shape in shapes)
    assert {shape.length for shape in shapes} <= set(bucket_lengths(3000))
    for plans in (make_batches(lengths, shapes), epoch_batches(lengths, shapes, seed=1, epoch=epoch)):
        assert sorted(i for plan in plans for i in plan.indices) == list(range(len(lengths)))
        for plan in plans:
            assert plan.shape in shapes and 0 < len(plan.indices) <= plan.shape.rows
            assert max(lengths[i] for i in plan.indices) <= plan.shape.length
        assert 0 <= padding_share(plans, lengths) < 1


@pytest.mark.parametrize("token_budget", [2048, 8192, 16384])
def test_little_padding_and_few_shapes(token_budget):
    shapes = choose_shapes(LENGTHS, token_budget)
    assert len(shapes) <= len(bucket_lengths(2048)) == 21
    for plans in (make_batches(LENGTHS, shapes), epoch_batches(LENGTHS, shapes, 0, 0)):
        assert padding_share(plans, LENGTHS) < 0.1
    half = LENGTHS[::2]
    assert padding_share(make_batches(half, shapes), half) < 0.1


def test_a_shape_is_taken_when_its_padding_saved_exceeds_its_cost():
    lengths = [64] * 10 + [128]  # a bucket of their own saves the short ones 10 · 64 tokens
    assert [shape.length for shape in choose_shapes(lengths, 1024, shape_cost=639)] == [64, 128]
    assert [shape.length for shape in choose_shapes(lengths, 1024, shape_cost=641)] == [128]


def test_shapes_by_hand():
    assert choose_shapes([], 1024) == ()
    assert choose_shapes([60] * 99, 1024) == (Shape(16, 64),)
    assert choose_shapes([60] * 3, 1024) == (Shape(3, 64),)  # no more rows than samples
    assert choose_shapes([2000] * 9, 1024) == (Shape(1, 2048),)  # one row at least


def test_fixed_order_by_hand():
    shapes = (Shape(4, 64), Shape(2, 128))
    # Four of the six short samples fill a batch. The other two, the longest, cost 2 · 128 tokens in the next bucket, as
    # many as a batch of their own: they stay.
    plans = make_batches([9, 8, 7, 9, 5, 64, 100], shapes)
    assert plans == [BatchPlan((6,), shapes[1]), BatchPlan((3, 5), shapes[0]), BatchPlan((4, 2, 1, 0), shapes[0])]
    # One sample left over moves.
    plans = make_batches([9, 8, 7, 9, 5, 100], shapes)
    assert plans == [BatchPlan((3, 5), shapes[1]), BatchPlan((4, 2, 1, 0), shapes[0])]
    assert padding_share(plans, [9, 8, 7, 9, 5, 100]) == pytest.approx(1 - 138 / 512)
    assert padding_share([], []) == 0


def test_epochs_differ_but_not_in_their_shapes():
    lengths = LENGTHS[:500]
    shapes = choose_shapes(lengths, 2048)
    first, again, second, other = (
        epoch_batches(lengths, shapes, seed, epoch) for seed, epoch in ((3, 0), (3, 0), (3, 1), (4, 0))
    )
    assert first == again
    groups = [{frozenset(plan.indices) for plan in plans} for plans in (first, second, other)]
    assert groups[0] != groups[1] and groups[0] != groups[2] and groups[1] != groups[2]
    counts = [collections.Counter(plan.shape for plan in plans) for plans in (first, second, other)]
    assert counts[0] == counts[1] == counts[2]
    in_order = [plan.shape.length for plan in first]
    assert in_order != sorted(in_order) and in_order != sorted(in_order, reverse=True)


def test_a_sample_beyond_the_shapes_is_an_error():
    with pytest.raises(ValueError, match="129 tokens exceeds every shape; choose shapes from all"):
        make_batches([3, 129], (Shape(1, 128),))


def test_pad_batch():
    batch = pad_batch([sample(3, masked=(1, 2)), sample(5, masked=(0, 2, 3, 4))], Shape(3, 6))
    np.testing.assert_array_equal(batch.tokens, [[1, 2, 3, 0, 0, 0], [1, 2, 3, 4, 5, 0], [0] * 6])
    np.testing.assert_array_equal(batch.counted, [[0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch.lengths, [3, 5, 0])
    assert (batch.tokens.dtype, batch.counted.dtype, batch.lengths.dtype) == (np.int32, bool, np.int32)


def test_pad_rows_keeps_features_and_dtype():
    hidden = [np.ones((2, 4), ml_dtypes.bfloat16), np.full((3, 4), 2, ml_dtypes.bfloat16)]
    padded = pad_rows(hidden, Shape(2, 3))
    assert padded.shape == (2, 3, 4) and padded.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(padded[:, :, 0].astype(np.float32), [[1, 1, 0], [2, 2, 2]])


@pytest.mark.parametrize("n, power", [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_the_next_power_of_two_is_no_smaller(n, power):
    assert next_power_of_two(n) == power
