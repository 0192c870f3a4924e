"""Length buckets: batch samples in a few static shapes, with little padding and few programs to compile.

The compiler makes a program for every (rows, length), and a padded token costs as much as a real one. Lengths come from one
fixed list, four per factor of two, so that runs share programs; `choose_shapes` picks those that are worth compiling for the
data. Samples that would leave a batch mostly empty move to the next longer shape.

    shapes = choose_shapes(lengths, token_budget)
    plans = make_batches(lengths, shapes)                       # scoring: a fixed order
    plans = epoch_batches(lengths, shapes, seed, epoch)         # training: a new order each epoch
    batch = pad_batch([samples[i] for i in plan.indices], plan.shape)

Plans from subsets of the data (a selection) take the shapes of the whole data, so that all arms run the same programs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from jsfdd.base.records import Batch, Sample

Lengths = Sequence[int] | Int[np.ndarray, " N"]  # tokens of each sample
SHORTEST = 64  # tokens; below that, launching a program costs more than the padding


class Shape(NamedTuple):
    """The static shape of a batch, [rows, length]."""

    rows: int
    length: int


class BatchPlan(NamedTuple):
    """Which samples fill a batch. Rows beyond them stay empty.

    Attributes:
      indices: sample numbers, at most shape.rows of them.
      shape: what they are padded to.
    """

    indices: tuple[int, ...]
    shape: Shape


def bucket_lengths(longest: int) -> tuple[int, ...]:
    """The fixed lengths up to the first that holds `longest` tokens: 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, …

    Four to the octave, multiples of 16: beyond the first, a sample wastes less than 20%, and about 8% on average.
    """
    lengths = [SHORTEST]
    while lengths[-1] < longest:
        octave = SHORTEST << (len(lengths) - 1) // 4
        lengths.append(lengths[-1] + octave // 4)
    return tuple(lengths)


def next_power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def choose_shapes(lengths: Lengths, token_budget: int, shape_cost: int = 2048) -> tuple[Shape, ...]:
    """The shapes for samples of these lengths, shortest first, all of about `token_budget` tokens.

    Of the fixed lengths it takes those that minimise (tokens of all samples, padded) + shape_cost · (number of shapes),
    by dynamic programming over the longest length of each bucket. Rows are token_budget // length, but no more than
    there are samples, and at least one even if that exceeds the budget. No device count comes in: results must not
    depend on it.

    Args:
      lengths: tokens of each sample, all of them.
      token_budget: tokens of one batch, padding included.
      shape_cost: how many tokens are computed in the time that one more shape takes to compile: some 2,000 for a small
        model on a CPU, 10⁵ and more on an accelerator, unless the compiled programs are cached.
    """
    if not len(lengths):
        return ()
    fixed = bucket_lengths(max(lengths))
    counts = np.bincount(np.searchsorted(fixed, lengths), minlength=len(fixed))
    up_to = np.concatenate([[0], np.cumsum(counts)])  # up_to[j]: samples in the first j fixed lengths

    best, previous = [0], [0]  # best[j]: least cost of the samples in the first j; its last bucket holds previous[j]..j
    for j in range(1, len(fixed) + 1):
        costs = [best[i] + (up_to[j] > up_to[i]) * shape_cost + (up_to[j] - up_to[i]) * fixed[j - 1] for i in range(j)]
        previous.append(int(np.argmin(costs)))
        best.append(costs[previous[-1]])

    shapes, j = [], len(fixed)
    while j:
        if up_to[j] > up_to[previous[j]]:
            rows = min(token_budget // fixed[j - 1], len(lengths))
            shapes.append(Shape(max(rows, 1), fixed[j - 1]))
        j = previous[j]
    return tuple(reversed(shapes))


def make_batches(lengths: Lengths, shapes: Sequence[Shape]) -> list[BatchPlan]:
    """Every sample once, in a fixed order: longest first, so that memory runs out at the first batch or never.

    Within a bucket samples are sorted by length, ties by index.
    """
    order = np.lexsort((np.arange(len(lengths)), np.asarray(lengths)))
    return _fill(order, lengths, shapes, arrange=lambda rows: rows)[::-1]


def epoch_batches(lengths: Lengths, shapes: Sequence[Shape], seed: int, epoch: int) -> list[BatchPlan]:
    """Every sample once, in an order that is a pure function of (seed, epoch).

    Samples are shuffled within buckets, then the batches are shuffled. All epochs have the same number of batches of
    each shape, so step s of a run is batch s % n of epoch s // n: resuming needs no other state.
    """
    random = np.random.default_rng([seed, epoch])
    plans = _fill(np.arange(len(lengths)), lengths, shapes, arrange=random.permutation)
    return [plans[i] for i in random.permutation(len(plans))]


def padding_share(plans: Sequence[BatchPlan], lengths: Lengths) -> float:
    """The part of all batches' tokens that is padding, empty rows included; in [0, 1)."""
    total = sum(plan.shape.rows * plan.shape.length for plan in plans)
    real = sum(lengths[i] for plan in plans for i in plan.indices)
    return 1 - real / total if total else 0.0


def pad_batch(samples: Sequence[Sample], shape: Shape) -> Batch:
    """Samples as a right-padded Batch of `shape`: token 0 and counted False in the padding, length 0 in empty rows."""
    lengths = np.zeros(shape.rows, np.int32)
    lengths[: len(samples)] = [len(sample.tokens) for sample in samples]
    return Batch(
        tokens=pad_rows([sample.tokens for sample in samples], shape),
        counted=pad_rows([sample.counted for sample in samples], shape),
        lengths=lengths,
    )


def pad_rows(rows: Sequence[Shaped[np.ndarray, " ..."]], shape: tuple[int, int]) -> Shaped[np.ndarray, "B T *feature"]:
    """Zero-pad per-token arrays (at least one), [T_i, …] and all of one dtype, to [rows, length, …]."""
    padded = np.zeros((*shape, *rows[0].shape[1:]), rows[0].dtype)
    for target, row in zip(padded, rows):
        target[: len(row)] = row
    return padded


def _fill(order: Int[np.ndarray, " N"], lengths: Lengths, shapes: Sequence[Shape], arrange: Callable) -> list[BatchPlan]:
    """Batches by bucket, shortest first; `arrange` orders the samples of a bucket.

    The samples left over from a bucket's full batches move to the next longer bucket if their tokens there, padded, are
    fewer than those of a partly empty batch here.
    """
    buckets = np.searchsorted([shape.length for shape in shapes], np.asarray(lengths)[order])
    if len(order) and buckets.max() == len(shapes):
        raise ValueError(f"a sample of {max(lengths)} tokens exceeds every shape; choose shapes from all samples")
    plans, moved = [], order[:0]
    for number, shape in enumerate(shapes):
        rows = arrange(np.concatenate([moved, order[buckets == number]]))
        left = len(rows) % shape.rows
        if number + 1 < len(shapes) and left * shapes[number + 1].length < shape.rows * shape.length:
            rows, moved = rows[: len(rows) - left], rows[len(rows) - left :]
        else:
            moved = rows[:0]
        for begin in range(0, len(rows), shape.rows):
            plans.append(BatchPlan(tuple(rows[begin : begin + shape.rows].tolist()), shape))
    return plans
