"""What the cross entropy needs of the target's distribution p, stored once for all epochs: e = Σ_v p_v · head_v.

A row is [e, mass] with mass = Σ_v p_v, which is 1 but where HASS's top-k loss counts the likeliest tokens a second time:

    p'_v = p_v · (1 + top_k_weight · [v is among the top k]),   e = Σ p'_v · head_v,   mass = Σ p'_v
    H(p', q) = H(p, q) + top_k_weight · top_k_loss(p, q)

so both losses are one (`token_loss.mean_loss`). With a draft vocabulary p' is 0 outside it and is not normalised again: a
token that the draft cannot propose then has no part in the loss, and one whose p lies mostly outside has a small one. Rows
of tokens that do not count are 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jsfdd.data.batches import choose_shapes, make_batches
from jsfdd.mesh import map_over_devices, own_rows
from jsfdd.models.counted import fold_counted
from jsfdd.progress import progress as show_progress
from jsfdd.records import DraftBatch
from jsfdd.selection.store import HiddenStore
from jsfdd.selection.store_writer import HiddenWriter
from jsfdd.training.batch import TrainingData, device_batch, padded_rows, weights_digest
from jsfdd.training.distances import top_k_share
from jsfdd.training.loss import Borrowed
from jsfdd.training.token_loss import Distance, row_logits, times_head


def head_means(
    distance: Distance,
    block: int,
    head: Float[Array, "V D"],
    truth: Float[Array, "R D"],
    weight: Float[Array, " R"],
    dtype: Literal["bfloat16", "float32"],
    vocabulary: tuple[int, ...] = (),
) -> Float[Array, "R D1"]:
    """[e, mass] of each token of nonzero weight, in `dtype`; `truth` are its hidden states. Arguments as in `token_loss`,
    `vocabulary` the draft's, empty for all tokens.

    The mass is rounded to `dtype` first and e scaled by as much: rounding then leaves p' a multiple of what it was.
    """

    tokens = np.array(vocabulary, np.int32)
    own = head[tokens] if vocabulary else head

    def visit(rows, means):
        z_p = row_logits(head, truth, rows)
        p = jax.nn.softmax(z_p, axis=0)
        if distance.top_k_weight:
            p = p + distance.top_k_weight * top_k_share(z_p, distance.top_k)
        if vocabulary:
            p = p[tokens]
        mass = jnp.sum(p, axis=0)
        stored = mass.astype(dtype).astype(jnp.float32)
        mean = times_head(p, own) * (stored / jnp.maximum(mass, 1e-30))[:, None]
        return means.at[rows].set(jnp.concatenate([mean, stored[:, None]], axis=1).astype(dtype), mode="drop")

    return fold_counted(weight > 0, block, visit, jnp.zeros((truth.shape[0], truth.shape[1] + 1), dtype))


def make_means_step(
    distance: Distance, mesh: Mesh, block: int, dtype: Literal["bfloat16", "float32"], vocabulary: tuple[int, ...] = ()
) -> Callable:
    """Compile `(frozen, DraftBatch) -> means [B, T, D+1]`. Build it once."""

    def step(frozen: Borrowed, batch: DraftBatch):
        shape = batch.hidden.shape
        truth = batch.hidden.astype(jnp.float32).reshape(-1, shape[2])
        weight = batch.weight.reshape(-1)
        return head_means(distance, block, frozen.output, truth, weight, dtype, vocabulary).reshape(*shape[:2], -1)

    return map_over_devices(step, mesh)


def store_means(
    data: TrainingData,
    frozen: Borrowed,
    distance: Distance,
    mesh: Mesh,
    *,
    block: int,
    batch_tokens: int,
    directory: Path,
    identity: dict,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    vocabulary: tuple[int, ...] = (),
    progress: bool = True,
) -> HiddenStore:
    """The store in `directory` with the means of all samples, after computing those it lacks.

    Args:
      data: its hidden states and weights are read.
      frozen: from `loss.borrow`, on `mesh`.
      batch_tokens: tokens of a batch.
      identity: what the hidden states depend on; what else the means depend on is added.
      dtype: of the store.
      vocabulary: the draft's, empty for all tokens.

    Raises: as `HiddenWriter` and `device_batch` do.
    """
    lengths = [len(sample.tokens) for sample in data.samples]
    plans = make_batches(lengths, choose_shapes(lengths, batch_tokens))
    of_means = {"top_k": distance.top_k if distance.top_k_weight else 0, "top_k_weight": distance.top_k_weight}
    if vocabulary:
        of_means["vocabulary"] = hashlib.sha256(np.array(vocabulary, np.int32).tobytes()).hexdigest()
    identity = {**identity, "means": of_means | ({} if data.weights is None else {"weights": weights_digest(data)})}
    step = make_means_step(distance, mesh, block, dtype, vocabulary)
    with HiddenWriter(directory, frozen.output.shape[1] + 1, dtype, identity) as writer:
        missing = [plan for plan in plans if any(data.samples[i].id not in writer.ids for i in plan.indices)]
        done = len(plans) - len(missing)
        with show_progress("target means", "batches", len(plans), finished=done, shown=progress) as bar:
            for number, plan in enumerate(missing, done + 1):
                means = step(frozen, device_batch(data, plan.indices, plan.shape, mesh))
                per_shard = padded_rows(plan.shape, mesh) // mesh.shape["data"]
                for shard, rows in own_rows(means, mesh).items():
                    own = [data.samples[i] for i in plan.indices[shard * per_shard : (shard + 1) * per_shard]]
                    writer.add_missing(own, np.asarray(rows))
                bar.update(number)
    return HiddenStore.open(directory, identity)
