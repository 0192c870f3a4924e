"""Stores something of the target's distributions once, for all epochs: batches through a compiled step, rows to a store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from jsfdd.base.mesh import own_rows
from jsfdd.base.progress import progress as show_progress
from jsfdd.data.batches import choose_shapes, make_batches
from jsfdd.hidden.rows import RowDtype
from jsfdd.hidden.store import HiddenStore
from jsfdd.hidden.writer import HiddenWriter
from jsfdd.training.batch import TrainingData, device_batch, padded_rows, weights_digest
from jsfdd.training.loss import Borrowed


def store_target(
    data: TrainingData,
    frozen: Borrowed,
    step: Callable,
    mesh: Mesh,
    *,
    width: int,
    dtype: RowDtype,
    batch_tokens: int,
    directory: Path,
    identity: dict,
    name: str,
    settings: dict,
    vocabulary: tuple[int, ...] = (),
    progress: bool = True,
) -> HiddenStore:
    """The store in `directory` with a row of each token of all samples, after computing those it lacks.

    Args:
      data: its hidden states and weights are read.
      frozen: from `loss.borrow`, on `mesh`.
      step: the compiled `(frozen, DraftBatch) -> rows [B, T, width]`.
      batch_tokens: tokens of a batch.
      identity: what the hidden states depend on; what else the rows depend on is added.
      name, settings: what is stored, and what it depends on beside weights and vocabulary.
      vocabulary: the draft's, empty for all tokens.

    Raises: as `HiddenWriter` and `device_batch` do.
    """
    lengths = [len(sample.tokens) for sample in data.samples]
    plans = make_batches(lengths, choose_shapes(lengths, batch_tokens))
    if vocabulary:
        settings = settings | {"vocabulary": hashlib.sha256(np.array(vocabulary, np.int32).tobytes()).hexdigest()}
    if data.weights is not None:
        settings = settings | {"weights": weights_digest(data)}
    identity = {**identity, name: settings}
    with HiddenWriter(directory, width, dtype, identity) as writer:
        missing = [plan for plan in plans if any(data.samples[i].id not in writer.ids for i in plan.indices)]
        done = len(plans) - len(missing)
        with show_progress(f"target {name.replace('_', '-')}", "batches", len(plans), finished=done, shown=progress) as bar:
            for number, plan in enumerate(missing, done + 1):
                computed = step(frozen, device_batch(data, plan.indices, plan.shape, mesh))
                per_shard = padded_rows(plan.shape, mesh) // mesh.shape["data"]
                for shard, rows in own_rows(computed, mesh).items():
                    own = [data.samples[i] for i in plan.indices[shard * per_shard : (shard + 1) * per_shard]]
                    writer.add_missing(own, np.asarray(rows))
                bar.update(number)
    return HiddenStore.open(directory, identity)
