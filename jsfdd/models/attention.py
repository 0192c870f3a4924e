"""Attention: views (which tokens see which), the cache of keys and values, and the equations.

Whole sequences, as scoring, training and prompts read them, and tokens that continue a cache, as decoding reads them:

    view  = causal_view(B, T)                                view  = cached_view(cache, T)
    cache = begin_cache(cache, layer, k, v)                  cache = write_cache(cache, layer, k, v)
    y, _  = sequence_attention(q, k, v, scale, reach)        y     = attention(q, k, v, mask, scale)

`quadratic_attention` is the equation of the left column. It makes all logits at once, for every head a number for each pair of
tokens; so `sequence_attention` computes it a block at a time, by JAX's kernel on TPUs (`splash_attention.py`) and else in plain
JAX (`blocked_attention.py`). Tests hold the three equal.

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
from jsfdd.models.blocked_attention import Reach, blocked_attention, sees
from jsfdd.models.splash_attention import has_kernel, splash_attention


class View(NamedTuple):
    """The positions of queries and keys, and which key each query may attend to.

    Tokens that continue a cache attend to its S slots, the new tokens written in. Whole sequences attend to themselves: their
    keys are the T tokens, each of which sees those up to its own, and a mask of [T, T] is never made.
    """

    positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"] | None = None
    mask: Bool[Array, "B T S"] | None = None


def causal_view(batch: int, length: int) -> View:
    """The view of whole sequences of `length` tokens. Right padding needs no mask of its own: it comes last."""
    return View(jnp.broadcast_to(jnp.arange(length), (batch, length)))


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


def begin_cache(cache: KVCache, layer, k: Float[Array, "B K H T"], v: Float[Array, "B K T H"]) -> KVCache:
    """`k` and `v` of whole sequences written into `layer` from slot 0 on, as the cache has them; its length stays as it was.

    One block in each array: where rows begin at their own slots, as in `write_cache`, XLA's TPU compiler wants the whole
    cache in another layout, and copies it there and back in every layer.
    """
    return cache._replace(
        k=jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), (layer, 0, 0, 0, 0)),
        v=jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), (layer, 0, 0, 0, 0)),
    )


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


def quadratic_attention(
    q: Float[Array, "B T K G H"], k: Float[Array, "B K H T"], v: Float[Array, "B K T H"], scale: float, reach: Reach
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """`attention` of whole sequences over the keys in `reach`, and the float32 log-sum-exp of each query's logits.

    A query that sees no key reads 0, and its sum's logarithm is −inf.
    """
    positions = jnp.arange(q.shape[1])
    seen = sees(reach, positions, positions)[None, None, :, None]
    logits = jnp.einsum("btkgh,bkhs->bktgs", q, k, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = jnp.where(total > 0, total, 1.0)
    y = jnp.einsum("bktgs,bksh->bktgh", (weights / some).astype(v.dtype), v)
    lse = jnp.where(total > 0, top + jnp.log(some), -jnp.inf)[..., 0]
    return y.swapaxes(1, 2), lse.swapaxes(1, 2)


def sequence_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B K H T"],
    v: Float[Array, "B K T H"],
    scale: float,
    reach: Reach,
    with_lse: bool = False,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"] | None]:
    """`quadratic_attention` in linear memory; the log-sum-exp only where it is wanted."""
    if has_kernel(q.shape[1], reach):
        return splash_attention(q, k, v, scale, reach, with_lse)
    y, lse = blocked_attention(q, k, v, scale, reach)
    return y, lse if with_lse else None


def harmonised_attention(
    q: Float[Array, "B T K G H"], steps: Sequence[tuple[Float[Array, "B K H T"], Float[Array, "B K T H"]]], scale: float
) -> Float[Array, "B T K G H"]:
    """Attention of a draft's step n in training, as it will be in decoding (HASS, arXiv 2408.15766 §3.2).

    A draft that is n tokens ahead at position t has read the target's own hidden states up to position t − n + 1, and
    its own steps 2 … n − 1 at the positions in between. So it sees all keys of step 1 up to there, and of step m > 1 the
    single key at t − (n − m): a diagonal. All of them share one softmax, in which the keys of step 1 are one column: their
    log-sum-exp is its logit, what they give together its value.

    Args:
      q: queries of step n.
      steps: keys and values of steps 1 … n.
      scale: as in `attention`.
    """
    (first_k, first_v), *later = steps
    y, lse = sequence_attention(q, first_k, first_v, scale, Reach(behind=len(later)), with_lse=bool(later))
    if not later:
        return y
    length, logits, values = q.shape[1], [lse], [y.astype(jnp.float32)]
    for distance, (k, v) in zip(reversed(range(len(later))), later):
        # The key and the value at t − distance, moved to the query at t, which alone sees them: [B, T, K, H].
        k, v = (
            jnp.pad(x, ((0, 0), (distance, 0), (0, 0), (0, 0)))[:, :length] for x in (k.transpose(0, 3, 1, 2), v.swapaxes(1, 2))
        )
        seen = jnp.einsum("btkgh,btkh->btkg", q, k, preferred_element_type=jnp.float32) * scale
        exists = (jnp.arange(length) >= distance)[None, :, None, None]
        logits.append(jnp.where(exists, seen, -jnp.inf))
        values.append(v[:, :, :, None].astype(jnp.float32))
    weights = jax.nn.softmax(jnp.stack(logits), axis=0)
    return sum(weight[..., None] * value for weight, value in zip(weights, values)).astype(first_v.dtype)
