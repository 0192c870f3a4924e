"""The parts of a decoder layer in Flax Linen, shared by the target and the draft.

Modules are stateless: parameters, masks and the KV cache are arguments, and a changed cache is a result. Kernels are
[in, out]. Softmax, norms and rotations compute in float32 whatever the parameters' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jsfdd.base.records import KVCache
from jsfdd.models.architecture import DecoderConfig, Rope


class View(NamedTuple):
    """Who sees whom: the positions of queries and keys, and which key each query may attend to.

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
    """A cache of `slots` places for each of `batch` rows, length 0."""
    heads = (config.num_layers, batch, config.num_kv_heads)
    keys, values = jnp.zeros((*heads, config.head_dim, slots), dtype), jnp.zeros((*heads, slots, config.head_dim), dtype)
    return KVCache(keys, values, jnp.zeros(batch, jnp.int32))


def rope_frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Angular frequencies float32[H/2] and the factor on cos and sin (1 but for YaRN).

    Rules: linear (position interpolation), Llama-3's smooth split between scaled and unscaled wavelengths, and
    YaRN (arXiv 2309.00071, §3.2-3.4). `frequency_divisors` are applied last.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    freq = rope.theta**-exponents
    scale = 1.0
    if rope.kind == "linear":
        freq = freq / rope.factor
    elif rope.kind == "llama3":
        wavelength = 2 * math.pi / freq
        share = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        unscaled = np.clip(share, 0.0, 1.0)
        freq = (1 - unscaled) * freq / rope.factor + unscaled * freq
    elif rope.kind == "yarn":

        def dimension(rotations: float) -> float:  # the dimension that turns so often over the original context
            return head_dim * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

        low = max(math.floor(dimension(rope.beta_fast)), 0)
        high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
        interpolated = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        freq = freq * (1 - interpolated) + freq / rope.factor * interpolated
        scale = rope.attention_factor if rope.attention_factor is not None else 0.1 * math.log(rope.factor) + 1.0
    if rope.frequency_divisors:
        freq = freq / np.asarray(rope.frequency_divisors)
    return freq.astype(np.float32), scale


def rope_table(
    positions: Int[Array, "B T"], rope: Rope, head_dim: int
) -> tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]:
    """cos and sin of every position's angles, float32[B, T, 1, H/2], ready to multiply per-head vectors."""
    freq, scale = rope_frequencies(rope, head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(freq)[None, None, None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: Float[Array, "B T heads H"], table) -> Float[Array, "B T heads H"]:
    """Rotate the two halves of each head vector against each other (Hugging Face's layout, not the interleaved one)."""
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def write_cache(
    keys: Float[Array, "L B K H S"],
    values: Float[Array, "L B K S H"],
    layer,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    start: Int[Array, " B"],
):
    """`k` and `v` written into `layer` at each row's own slots, start[b] … start[b] + T − 1; slots past the end are dropped.

    One scatter with the rows' and slots' numbers as indices updates the cache in place. A vmap of
    dynamic_update_slice over rows says the same, but XLA lays that scatter out row-first and copies the whole cache
    there and back in every layer: on a CPU 25 times slower at 16 rows.
    """
    rows = jnp.arange(k.shape[0])[:, None]
    slots = start[:, None] + jnp.arange(k.shape[1])[None, :]
    keys = keys.at[layer, rows, :, :, slots].set(k.astype(keys.dtype), mode="drop")
    return keys, values.at[layer, rows, :, slots].set(v.astype(values.dtype), mode="drop")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        # Rank promotion is spelled out: the whole package runs with jax_numpy_rank_promotion="raise".
        return (normed * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over the new tokens or over a cache they are written into."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, table, mask, keys, values, layer, start, earlier=None):
        """x [B,T,D], mask bool[B,T,S]; keys, values: a `KVCache`'s arrays or None. Returns (y, keys, values).

        In draft training, `earlier` has the keys [B,K,H,T] and values [B,K,T,H] of each earlier draft step over the same
        tokens (`harmonised_attention`), there is no cache, `mask` is for the first, and returned are this step's own.
        """
        cfg = self.config
        batch, length = x.shape[:2]
        heads, kv_heads, dim = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

        def project(name, count):
            y = nn.Dense(count * dim, use_bias=cfg.qkv_bias, name=name)(x)
            return y.reshape(batch, length, count, dim)

        q, k, v = project("q_proj", heads), project("k_proj", kv_heads), project("v_proj", kv_heads)
        if cfg.qk_norm:
            q, k = RMSNorm(cfg.rms_norm_eps, name="q_norm")(q), RMSNorm(cfg.rms_norm_eps, name="k_norm")(k)
        q, k = rotate(q, table), rotate(k, table)
        if keys is None:
            k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)  # [B,K,H,S] and [B,K,S,H], as the cache has them
            keys, values = (None, None) if earlier is None else (k, v)
        else:
            keys, values = write_cache(keys, values, layer, k, v, start)
            k = jax.lax.dynamic_index_in_dim(keys, layer, keepdims=False)
            v = jax.lax.dynamic_index_in_dim(values, layer, keepdims=False)

        scale = dim**-0.5 if cfg.query_scale is None else cfg.query_scale
        shared = heads // kv_heads
        # The queries that share a key/value head are rows of one matrix: two plain batched products, nothing transposed
        # but the queries and the result.
        q = q.reshape(batch, length, kv_heads, shared, dim).transpose(0, 2, 3, 1, 4)
        if earlier:
            y = harmonised_attention(q * scale, [*earlier, (k, v)], mask)
            y = y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads * dim)
            return nn.Dense(cfg.hidden_size, use_bias=False, name="o_proj")(y), keys, values
        logits = jnp.matmul(q.reshape(batch, kv_heads, shared * length, dim), k, preferred_element_type=jnp.float32) * scale
        logits = logits.reshape(batch, kv_heads, shared, length, k.shape[-1])
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        y = jnp.matmul(weights.reshape(batch, kv_heads, shared * length, k.shape[-1]), v)
        y = y.reshape(batch, kv_heads, shared, length, dim).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads * dim)
        return nn.Dense(cfg.hidden_size, use_bias=False, name="o_proj")(y), keys, values


def harmonised_attention(
    q: Float[Array, "B K G T H"],
    steps: Sequence[tuple[Float[Array, "B K H T"], Float[Array, "B K T H"]]],
    mask: Bool[Array, "B T T"],
) -> Float[Array, "B K G T H"]:
    """What the queries of a draft's step n attend to, as while decoding (HASS, arXiv 2408.15766 §3.2).

    A draft that is n tokens ahead at position t has read the target's own hidden states up to position t − n + 1, and
    those of its steps 2 … n − 1 at the positions in between. So of step 1 it sees all keys up to there (`mask`), and of
    step m > 1 the single one at t − (n − m): a diagonal. All of them share one softmax, so what is not seen weighs
    nothing.

    Args:
      q: scaled queries of step n, G of them to a key/value head.
      steps: keys and values of steps 1 … n.
      mask: which keys of step 1 each query sees.
    """
    (first_k, first_v), *others = steps
    batch, kv_heads, group, length, dim = q.shape
    flat = q.reshape(batch, kv_heads, group * length, dim)
    logits = jnp.matmul(flat, first_k, preferred_element_type=jnp.float32).reshape(batch, kv_heads, group, length, length)
    logits = [jnp.where(mask[:, None, None], logits, -jnp.inf)]
    behind = []  # values of the later steps, each moved to the query that sees it
    for distance, (k, v) in zip(reversed(range(len(others))), others):
        pad = ((0, 0), (0, 0), (distance, 0), (0, 0))
        k, v = (jnp.pad(x[:, :, : length - distance], pad)[:, :, None] for x in (k.swapaxes(2, 3), v))
        seen = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1, keepdims=True)
        exists = (jnp.arange(length) >= distance)[None, None, None, :, None]
        logits.append(jnp.where(exists, seen, -jnp.inf))
        behind.append(v)
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1).astype(first_v.dtype)
    y = jnp.matmul(weights[..., :length].reshape(batch, kv_heads, group * length, length), first_v)
    y = y.reshape(q.shape)
    for number, v in enumerate(behind):
        y = y + weights[..., length + number, None] * v
    return y


class MLP(nn.Module):
    """Gated feed-forward block."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.config
        gate = nn.Dense(cfg.intermediate_size, use_bias=False, name="gate_proj")(x)
        up = nn.Dense(cfg.intermediate_size, use_bias=False, name="up_proj")(x)
        gate = jax.nn.silu(gate) if cfg.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        return nn.Dense(cfg.hidden_size, use_bias=False, name="down_proj")(gate * up)


class DecoderLayer(nn.Module):
    """Attention and MLP with residuals. `input_norm=False` is EAGLE's draft layer, whose input comes straight from fc."""

    config: DecoderConfig
    input_norm: bool = True

    @nn.compact
    def __call__(self, x, table, mask, keys, values, layer, start, earlier=None):
        """Arguments as in `Attention`. Returns (x, keys, values)."""
        cfg = self.config

        def norm(name, y):
            return RMSNorm(cfg.rms_norm_eps, name=name)(y)

        y = norm("input_norm", x) if self.input_norm else x
        y, keys, values = Attention(cfg, name="attention")(y, table, mask, keys, values, layer, start, earlier)
        x = x + (norm("post_attention_norm", y) if cfg.sandwich_norms else y)
        y = MLP(cfg, name="mlp")(norm("mlp_norm", x))
        x = x + (norm("post_mlp_norm", y) if cfg.sandwich_norms else y)
        return x, keys, values
