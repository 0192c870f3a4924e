"""Batches of samples with what the target made of them, spread over a mesh."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jsfdd.base.mesh import num_data_shards, shard_built_rows
from jsfdd.base.records import Batch, DraftBatch, Sample
from jsfdd.data.batches import Shape, pad_batch, pad_rows

_STORE_AGAIN = "the store belongs to other data or another template: delete it and store again"

PerToken = Mapping[str, np.ndarray]  # sample id -> [T, …]
# [T, D] each, float32 or bfloat16; or what computes a batch's [B, T, D] on its devices.
HiddenStates = PerToken | Callable[[Batch], jax.Array]


class TrainingData(NamedTuple):
    """Samples, and by their ids what belongs to their tokens.

    Attributes:
      samples: in any order.
      hidden: the target's hidden states after its final norm. What computes them should not wait for them: then the devices
        work on the next batch's while they take this step.
      known: of the target's distributions, a row each token, as `target_means.py` or `target_top_k.py` stores them; None where
        the target's head is asked in each step.
      weights: float32[T] each, of the score positions in the loss; None weighs every counted token 1.
    """

    samples: Sequence[Sample]
    hidden: HiddenStates
    known: PerToken | None = None
    weights: PerToken | None = None

    def weight(self, sample: Sample) -> np.ndarray:
        """float32[T]: the sample's weights, 0 where no token counts."""
        if self.weights is None:
            return sample.counted.astype(np.float32)
        return np.where(sample.counted, self.weights[sample.id], np.float32(0))


def weights_digest(data: TrainingData) -> str:
    """sha256 hex of all samples' weights, in order."""
    sha = hashlib.sha256()
    for sample in data.samples:
        sha.update(data.weight(sample).tobytes())
    return sha.hexdigest()


def device_batch(data: TrainingData, indices: Sequence[int], shape: Shape, mesh: Mesh) -> DraftBatch:
    """The numbered samples as a batch with its rows split over `mesh`; each process reads its own rows alone.

    Which samples make a step does not depend on the mesh: where the data shards do not divide the rows, empty ones are
    added.

    Raises:
      ValueError: a store lacks a sample, or has it with another length.
    """
    samples = [data.samples[i] for i in indices]

    def build(start: int, stop: int) -> DraftBatch:
        own = samples[start:stop]
        # A device without samples gets one that does not count.
        batch = _draft_batch(data, own or samples[:1], Shape(stop - start, shape.length))
        nothing = {"counted": np.zeros_like(batch.counted), "weight": np.zeros_like(batch.weight)}
        return batch if own else batch._replace(**nothing)

    batch = shard_built_rows(build, padded_rows(shape, mesh), mesh)
    if not callable(data.hidden):
        return batch
    return batch._replace(hidden=data.hidden(Batch(batch.tokens, batch.counted, batch.hidden)))


def padded_rows(shape: Shape, mesh: Mesh) -> int:
    """Rows of a batch of `shape` on `mesh`: the next multiple of its data shards."""
    shards = num_data_shards(mesh)
    return -(-shape.rows // shards) * shards


def _draft_batch(data: TrainingData, samples: Sequence[Sample], shape: Shape) -> DraftBatch:
    """A part of a batch on the host; in the place of hidden states that are yet to be computed, the rows' lengths."""
    batch = pad_batch(samples, shape)
    hidden = batch.lengths
    if not callable(data.hidden):
        hidden = pad_rows([_stored(data.hidden, sample, "hidden states") for sample in samples], shape)
    known = None
    if data.known is not None:
        known = pad_rows([_stored(data.known, sample, "target distributions") for sample in samples], shape)
    weight = pad_rows([data.weight(sample) for sample in samples], shape)
    return DraftBatch(batch.tokens, batch.counted, weight, hidden, known)


def _stored(store: PerToken, sample: Sample, what: str) -> np.ndarray:
    if sample.id not in store:
        raise ValueError(f"sample {sample.id}: no stored {what}; {_STORE_AGAIN}")
    rows = store[sample.id]
    if len(rows) != len(sample.tokens):
        raise ValueError(f"sample {sample.id}: {len(rows)} stored {what} for {len(sample.tokens)} tokens; {_STORE_AGAIN}")
    return rows
