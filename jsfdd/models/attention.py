"""Attention: views (which tokens see which), the cache of keys and values, and the equations.

    view   = causal_view(B, T)                    # whole sequences
    view   = cached_view(cache, T)                # T more tokens behind those in a cache
    cache  = write_cache(cache, layer, k, v)
    y      = attention(q, k, v, mask, scale)

Letters: B rows, T queries, S keys, K key/value heads, G queries that share one of them, H head dim, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsfdd.base.records import KVCache
from jsfdd.models.architecture import DecoderConfig


class View(NamedTuple):
    """The positions of queries and keys, and which key each query may attend to.

    Without a cache the keys are the T new tokens themselves; with one they are its S slots, new tokens written in.
    """

    positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    mask: Bool[Array, "B T S"]


def causal_view(batch: int, length: int) -> View:
    """The view of `length` tokens from position 0 without a cache. Right padding needs no mask of its own: it comes last."""
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    mask = jnp.broadcast_to(jnp.tri(length, dtype=bool), (batch, length, length))
    return View(positions, positions, mask)


def cached_view(cache: KVCache, num_new: int) -> View:
    """The view of `num_new` tokens that continue each row of `cache`, in slots length … length + num_new − 1."""
    batch, slots = cache.v.shape[1], cache.v.shape[3]
    positions = cache.length[:, None] + jnp.arange(num_new)[None, :]
    key_positions = jnp.broadcast_to(jnp.arange(slots), (batch, slots))
    return View(positions, key_positions, key_positions[:, None, :] <= positions[:, :, None])


def empty_cache(config: DecoderConfig, batch: int, slots: int, dtype=jnp.float32) -> KVCache:
    """A cache with `slots` places for each of `batch` rows, length 0."""
    heads = (config.num_layers, batch, config.num_kv_heads)
    keys, values = jnp.zeros((*heads, config.head_dim, slots), dtype), jnp.zeros((*heads, slots, config.head_dim), dtype)
    return KVCache(keys, values, jnp.zeros(batch, jnp.int32))


def write_cache(cache: KVCache, layer, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> KVCache:
    """`k` and `v` written into `layer` at each row's slots length … length + T − 1; slots past the end are dropped.

    `cache.length` stays as it was: the caller decides how many of the new tokens to keep. One scatter with the rows' and
    slots' numbers as indices updates the cache in place. A vmap of dynamic_update_slice over rows says the same, but XLA
    lays that scatter out row-first and copies the whole cache there and back in every layer: on a CPU 25 times slower at
    16 rows.
    """
    rows = jnp.arange(k.shape[0])[:, None]
    slots = cache.length[:, None] + jnp.arange(k.shape[1])[None, :]
    return cache._replace(
        k=cache.k.at[layer, rows, :, :, slots].set(k.astype(cache.k.dtype), mode="drop"),
        v=cache.v.at[layer, rows, :, slots].set(v.astype(cache.v.dtype), mode="drop"),
    )


def attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T K G H"]:
    """softmax(q·k · scale) · v over the keys that `mask` shows each query; the softmax is computed in float32.

    Keys and values come as the cache holds them, one matrix a head, and the queries that share a head are rows of one
    matrix too ("tg"): both products are plain batched ones, and only queries and results are rearranged for them.
    """
    logits = jnp.einsum("btkgh,bkhs->bktgs", q, k, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(mask[:, None, :, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    # Written straight as "btkgh", einsum would take the values for the first factor and transpose the weights.
    return jnp.einsum("bktgs,bksh->bktgh", weights, v).swapaxes(1, 2)


def harmonised_attention(
    q: Float[Array, "B T K G H"],
    steps: Sequence[tuple[Float[Array, "B K H T"], Float[Array, "B K T H"]]],
    mask: Bool[Array, "B T T"],
    scale: float,
) -> Float[Array, "B T K G H"]:
    """Attention of a draft's step n in training, as it will be in decoding (HASS, arXiv 2408.15766 §3.2).

    A draft that is n tokens ahead at position t has read the target's own hidden states up to position t − n + 1, and
    its own steps 2 … n − 1 at the positions in between. So it sees all keys of step 1 up to there (`mask`), and of step
    m > 1 the single key at t − (n − m): a diagonal. All of them share one softmax, so what is not seen weighs nothing.

    Args:
      q: queries of step n.
      steps: keys and values of steps 1 … n.
      mask: which keys of step 1 each query sees.
      scale: as in `attention`.
    """
    (first_k, first_v), *later = steps
    length = q.shape[1]
    logits = jnp.einsum("btkgh,bkhs->bktgs", q, first_k, preferred_element_type=jnp.float32) * scale
    logits = [jnp.where(mask[:, None, :, None], logits, -jnp.inf)]
    diagonals = []
    for distance, (k, v) in zip(reversed(range(len(later))), later):
        # The key and the value at t − distance, moved to the query at t, which alone sees them.
        k = jnp.pad(k, ((0, 0), (0, 0), (0, 0), (distance, 0)))[..., :length]
        v = jnp.pad(v, ((0, 0), (0, 0), (distance, 0), (0, 0)))[:, :, :length]
        seen = jnp.einsum("btkgh,bkht->bktg", q, k, preferred_element_type=jnp.float32) * scale
        exists = (jnp.arange(length) >= distance)[None, None, :, None]
        logits.append(jnp.where(exists, seen, -jnp.inf)[..., None])
        diagonals.append(v)
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1).astype(first_v.dtype)
    y = jnp.einsum("bktgs,bksh->bktgh", weights[..., :length], first_v)
    for number, v in enumerate(diagonals):
        y = y + jnp.einsum("bktg,bkth->bktgh", weights[..., length + number], v)
    return y.swapaxes(1, 2)
