"""Batches of samples with hidden states and soft targets, spread over a mesh."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jsfdd.base.mesh import round_up_to_shards, shard_built_rows
from jsfdd.base.records import Batch, DraftBatch, Sample
from jsfdd.data.batches import Shape, pad_batch, pad_rows

_STORE_AGAIN = "the store belongs to other data or another template: delete it and store again"

PerToken = Mapping[str, np.ndarray]  # sample id -> [T, …]
# Hidden states [T, D] of each sample, float32 or bfloat16; or a function that computes a batch's [B, T, D] on its devices.
HiddenStates = PerToken | Callable[[Batch], jax.Array]


class TrainingData(NamedTuple):
    """Samples, and the arrays of their tokens by sample id.

    Attributes:
      samples: in any order.
      hidden: the target's hidden states after its final norm: a mapping to arrays (a store, a dict), or a function that runs
        the target. The function should return before the devices are done, so that they compute the next batch's states
        during this step.
      soft_targets: stored soft targets, one row per token, as `soft_store.py` writes them; if None, each step runs the
        target's head.
      weights: weights of the score positions in the loss, float32[T] per sample; None gives every counted token weight 1.
    """

    samples: Sequence[Sample]
    hidden: HiddenStates
    soft_targets: PerToken | None = None
    weights: PerToken | None = None

    def weight(self, sample: Sample) -> np.ndarray:
        """float32[T]: the sample's weights, 0 where no token counts."""
        if self.weights is None:
            return sample.counted.astype(np.float32)
        return np.where(sample.counted, self.weights[sample.id], np.float32(0))

    def visited(self, sample: Sample) -> int:
        """Tokens of a sample that the loss visits: the EAGLE pairing needs one more to the left than the score."""
        return int(np.count_nonzero(self.weight(sample)[1:]))


def weights_digest(data: TrainingData) -> str:
    """sha256 hex of all samples' weights, in order."""
    sha = hashlib.sha256()
    for sample in data.samples:
        sha.update(data.weight(sample).tobytes())
    return sha.hexdigest()


class Rows(NamedTuple):
    """Some rows of a batch as the host knows them; `hidden` is None where the devices compute it."""

    batch: Batch
    weight: np.ndarray
    hidden: np.ndarray | None
    soft_targets: np.ndarray | None


def device_batch(data: TrainingData, indices: Sequence[int], shape: Shape, mesh: Mesh) -> DraftBatch:
    """The numbered samples as a batch with its rows split over `mesh`; a process reads only the rows of its devices.

    The mesh does not decide which samples make a step: where the data shards do not divide the rows, empty ones are added.

    Raises:
      ValueError: a store lacks a sample, or has it with another length.
    """
    samples = [data.samples[i] for i in indices]

    def build(start: int, stop: int) -> Rows:
        part = samples[start:stop]
        # A device without samples gets one that does not count.
        rows = read_rows(data, part or samples[:1], Shape(stop - start, shape.length))
        if part:
            return rows
        batch = rows.batch._replace(counted=np.zeros_like(rows.batch.counted))
        return rows._replace(batch=batch, weight=np.zeros_like(rows.weight))

    return on_devices(data, shard_built_rows(build, round_up_to_shards(shape.rows, mesh), mesh))


def on_devices(data: TrainingData, rows: Rows) -> DraftBatch:
    """The batch of rows that are on the devices already, with their hidden states computed if they are not stored."""
    hidden = data.hidden(rows.batch) if callable(data.hidden) else rows.hidden
    return DraftBatch(rows.batch.tokens, rows.batch.counted, rows.weight, hidden, rows.soft_targets)


def read_rows(data: TrainingData, samples: Sequence[Sample], shape: Shape) -> Rows:
    """The samples' rows, padded to `shape`. ValueError: a store lacks a sample, or has it with another length."""

    def stored(store: PerToken, what: str) -> np.ndarray:
        return pad_rows([_stored(store, sample, what) for sample in samples], shape)

    return Rows(
        pad_batch(samples, shape),
        pad_rows([data.weight(sample) for sample in samples], shape),
        None if callable(data.hidden) else stored(data.hidden, "hidden states"),
        None if data.soft_targets is None else stored(data.soft_targets, "soft targets"),
    )


def _stored(store: PerToken, sample: Sample, what: str) -> np.ndarray:
    if sample.id not in store:
        raise ValueError(f"sample {sample.id}: no stored {what}; {_STORE_AGAIN}")
    rows = store[sample.id]
    if len(rows) != len(sample.tokens):
        raise ValueError(f"sample {sample.id}: {len(rows)} stored {what} for {len(sample.tokens)} tokens; {_STORE_AGAIN}")
    return rows
