"""Soft targets "top_k": the k likeliest tokens of each distribution and the mass of all others, stored once for all epochs.

With them any distance of `distances.py` can be computed without the target's head, between coarse outcomes
(`token_loss.coarse_loss`): the k tokens, likeliest first, and the tail, all others together. A row (`soft_rows.py`) has
4k + 2 bytes, or 6k + 2 where the vocabulary has more than 65,536 tokens, whatever the model's width.

With a draft vocabulary the k tokens and the tail are taken from it and numbered within it, and one more outcome, the last, is
all that the draft cannot propose. Rows of tokens that do not count are 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt16

from jsfdd.base.mesh import map_over_devices
from jsfdd.base.records import DraftBatch
from jsfdd.models.counted import fold_counted
from jsfdd.training.beyond import Beyond, within_factor
from jsfdd.training.distances import coarse
from jsfdd.training.loss import Borrowed
from jsfdd.training.soft_rows import pack, row_words
from jsfdd.training.visited_loss import block_rows, vocabulary_logits


def top_outcomes(
    k: int,
    block: int,
    head: Float[Array, "V D"],
    truth: Float[Array, "R D"],
    weight: Float[Array, " R"],
    vocabulary: tuple[int, ...] = (),
    beyond: Beyond = "weigh",
) -> UInt16[Array, "R W"]:
    """Compute the row of every token with a nonzero weight.

    Args:
      k: at most as many as `vocabulary` has.
      block: tokens that meet the head at a time.
      truth: the tokens' hidden states.
      vocabulary: the draft's, empty for all tokens.
      beyond: what becomes of what lies beyond it.
    """
    tokens = np.array(vocabulary, np.int32)
    size = len(vocabulary) or head.shape[0]

    def visit(rows, packed):
        z_p = vocabulary_logits(head, block_rows(truth, rows))
        proposed = z_p[tokens] if vocabulary else z_p
        ids = jax.lax.top_k(proposed, k, axis=0)[1]
        outcomes = coarse(proposed, ids, axis=0)
        if vocabulary:
            outside = jax.nn.logsumexp(z_p.at[tokens].set(-jnp.inf), axis=0, keepdims=True)
            outcomes = jax.nn.log_softmax(jnp.concatenate([outcomes, outside]), axis=0)
            if beyond != "weigh":
                mass = jnp.sum(jnp.exp(outcomes[:-1]), axis=0)
                within = jnp.log(within_factor(beyond, z_p, proposed, mass))[None]
                outcomes = jnp.concatenate([outcomes[:-1] + within, jnp.where(jnp.isneginf(within), 0.0, -jnp.inf)])
        return packed.at[rows].set(pack(jax.nn.log_softmax(outcomes, axis=0).T, ids.T, size), mode="drop")

    packed = jnp.zeros((truth.shape[0], row_words(k, head.shape[0], len(vocabulary))), jnp.uint16)
    return fold_counted(weight > 0, block, visit, packed)


@functools.lru_cache(maxsize=8)
def make_top_k_step(
    k: int, mesh: Mesh, block: int, vocabulary: tuple[int, ...] = (), beyond: Beyond = "weigh"
) -> Callable[[Borrowed, DraftBatch], UInt16[Array, "B T W"]]:
    """Compile `(borrowed, batch) -> rows`."""

    def step(borrowed: Borrowed, batch: DraftBatch):
        shape = batch.hidden.shape
        truth = batch.hidden[..., -borrowed.output.shape[1] :].astype(jnp.float32).reshape(-1, borrowed.output.shape[1])
        packed = top_outcomes(k, block, borrowed.output, truth, batch.weight.reshape(-1), vocabulary, beyond)
        return packed.reshape(*shape[:2], -1)

    return map_over_devices(step, mesh)
