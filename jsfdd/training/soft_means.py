"""What the cross entropy needs of the target's distribution p, stored once for all epochs: e = Σ_v p_v · head_v.

A row is [e, mass] with mass = Σ_v p_v, which is 1 but where HASS's top-k loss counts the likeliest tokens a second time:

    p'_v = p_v · (1 + top_k_weight · [v is among the top k]),   e = Σ p'_v · head_v,   mass = Σ p'_v
    H(p', q) = H(p, q) + top_k_weight · top_k_loss(p, q)

so both losses are one (`token_loss.mean_loss`). With a draft vocabulary p' is 0 outside it and is not normalised again: a
token that the draft cannot propose then has no part in the loss, and one whose p lies mostly outside has a small one. Rows
of tokens that do not count are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jsfdd.base.mesh import map_over_devices
from jsfdd.base.records import DraftBatch
from jsfdd.hidden.store import HiddenStore
from jsfdd.models.counted import fold_counted
from jsfdd.training.batch import TrainingData
from jsfdd.training.distances import top_k_share
from jsfdd.training.loss import Borrowed
from jsfdd.training.soft_store import store_target
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
    """The store in `directory` with the means of all samples, after computing those it lacks; as `store_target`."""
    of_means = {"top_k": distance.top_k if distance.top_k_weight else 0, "top_k_weight": distance.top_k_weight}
    return store_target(
        data,
        frozen,
        make_means_step(distance, mesh, block, dtype, vocabulary),
        mesh,
        width=frozen.output.shape[1] + 1,
        dtype=dtype,
        batch_tokens=batch_tokens,
        directory=directory,
        identity=identity,
        name="means",
        settings=of_means,
        vocabulary=vocabulary,
        progress=progress,
    )
