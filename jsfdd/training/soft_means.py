"""What the cross entropy needs of the target's distribution p, stored once for all epochs: e = Σ_v p_v · head_v.

A row is [e, mass] with mass = Σ_v p_v, which is 1 unless HASS's top-k loss counts the likeliest tokens a second time:

    p'_v = p_v · (1 + top_k_weight · [v is among the top k]),   e = Σ p'_v · head_v,   mass = Σ p'_v
    H(p', q) = H(p, q) + top_k_weight · top_k_loss(p, q)

so both losses are one (`token_loss.mean_loss`). With a draft vocabulary p' is 0 outside it and, unless told otherwise
(`beyond.py`), is not normalised again: a token that the draft cannot propose then has no part in the loss, and one whose p lies
mostly outside has a small one. Rows of tokens that do not count are 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jsfdd.base.mesh import map_over_devices
from jsfdd.base.records import DraftBatch
from jsfdd.models.counted import fold_counted
from jsfdd.training.beyond import Beyond, within_factor
from jsfdd.training.distances import top_k_share
from jsfdd.training.loss import Borrowed
from jsfdd.training.token_loss import Distance
from jsfdd.training.visited_loss import block_rows, times_head, vocabulary_logits

MeansDtype = Literal["bfloat16", "float32"]


def head_means(
    distance: Distance,
    block: int,
    head: Float[Array, "V D"],
    truth: Float[Array, "R D"],
    weight: Float[Array, " R"],
    dtype: MeansDtype,
    vocabulary: tuple[int, ...] = (),
    beyond: Beyond = "weigh",
) -> Float[Array, "R D1"]:
    """[e, mass] for every token of nonzero weight, in `dtype`.

    The mass is rounded to `dtype` first and e scaled by as much: rounding then leaves p' a multiple of what it was.

    Args:
      distance: the cross entropy, with or without the top-k loss.
      block: tokens that meet the head at a time.
      truth: the tokens' hidden states.
      vocabulary: the draft's, empty for all tokens.
      beyond: what becomes of what lies beyond it.
    """
    tokens = np.array(vocabulary, np.int32)
    proposed = head[tokens] if vocabulary else head

    def visit(rows, means):
        z_p = vocabulary_logits(head, block_rows(truth, rows))
        p = jax.nn.softmax(z_p, axis=0)
        if distance.top_k_weight:
            p = p + distance.top_k_weight * top_k_share(z_p, distance.top_k, axis=0)
        if vocabulary:
            within = z_p[tokens]
            mass = jnp.sum(jax.nn.softmax(z_p, axis=0)[tokens], axis=0)
            p = p[tokens] * within_factor(beyond, z_p, within, mass)[None]
        mass = jnp.sum(p, axis=0)
        rounded = mass.astype(dtype).astype(jnp.float32)
        mean = times_head(p, proposed) * (rounded / jnp.maximum(mass, 1e-30))[:, None]
        return means.at[rows].set(jnp.concatenate([mean, rounded[:, None]], axis=1).astype(dtype), mode="drop")

    return fold_counted(weight > 0, block, visit, jnp.zeros((truth.shape[0], truth.shape[1] + 1), dtype))


@functools.lru_cache(maxsize=8)
def make_means_step(
    distance: Distance,
    mesh: Mesh,
    block: int,
    dtype: MeansDtype,
    vocabulary: tuple[int, ...] = (),
    beyond: Beyond = "weigh",
) -> Callable[[Borrowed, DraftBatch], Float[Array, "B T D1"]]:
    """Compile `(borrowed, batch) -> means`."""

    def step(borrowed: Borrowed, batch: DraftBatch):
        shape = batch.hidden.shape
        truth = batch.hidden[..., -borrowed.output.shape[1] :].astype(jnp.float32).reshape(-1, borrowed.output.shape[1])
        means = head_means(distance, block, borrowed.output, truth, batch.weight.reshape(-1), dtype, vocabulary, beyond)
        return means.reshape(*shape[:2], -1)

    return map_over_devices(step, mesh)
