"""The parts of a decoder layer in Flax Linen, shared by the target and the draft.

Modules are stateless: parameters, masks and the KV cache are arguments, and a changed cache is a result. Kernels are
[in, out]. Softmax, norms and rotations compute in float32 whatever the parameters' dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jsfdd.base.records import KVCache
from jsfdd.models.architecture import DecoderConfig, Rope
from jsfdd.models.attention import attention, begin_cache, harmonised_attention, sequence_attention, write_cache
from jsfdd.models.blocked_attention import Reach
from jsfdd.models.experts import ExpertsMLP
from jsfdd.models.sharding import whole_heads


class Context(NamedTuple):
    """The rotation of a layer's tokens, from `rope_table`, and what they see: by a mask, or without one, of whole sequences,
    those up to their own within a window."""

    rotation: tuple[Float[Array, "B T 1 h"], Float[Array, "B T 1 h"]]
    mask: Bool[Array, "B T S"] | None = None
    window: int | Int[Array, ""] | None = None


def rope_frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Angular frequencies float32[H/2] and the factor on cos and sin (1 except for YaRN).

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

        def dimension(rotations: float) -> float:  # the dimension that turns this often over the original context
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
    """Grouped-query attention with rotary positions: projections around the equations of `models/attention.py`."""

    config: DecoderConfig

    def setup(self):
        """Name the submodules."""
        cfg = self.config
        self.q_proj = nn.Dense(cfg.num_heads * cfg.head_dim, use_bias=cfg.qkv_bias)
        self.k_proj = nn.Dense(cfg.num_kv_heads * cfg.head_dim, use_bias=cfg.qkv_bias)
        self.v_proj = nn.Dense(cfg.num_kv_heads * cfg.head_dim, use_bias=cfg.qkv_bias)
        self.o_proj = nn.Dense(cfg.hidden_size, use_bias=False)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(cfg.rms_norm_eps), RMSNorm(cfg.rms_norm_eps)

    def __call__(self, x: Float[Array, "B T D"], context: Context, cache: KVCache | None, layer):
        """(y [B,T,D], cache): of whole sequences, written into `layer` of `cache` if there is one; or of tokens that continue
        `cache`, over it with their keys and values written in."""
        q, k, v = self._project(x, context)
        if context.mask is None:
            k, v = _as_cached(k, v)
            cache = cache if cache is None else begin_cache(cache, layer, k, v)
            y, _ = sequence_attention(q, k, v, self._scale, Reach(context.window))
        else:
            cache = write_cache(cache, layer, k, v)
            k = jax.lax.dynamic_index_in_dim(cache.k, layer, keepdims=False)
            v = jax.lax.dynamic_index_in_dim(cache.v, layer, keepdims=False)
            y = attention(q, k, v, context.mask, self._scale)
        return self._output(y), cache

    def harmonised(self, x: Float[Array, "B T D"], context: Context, earlier: tuple):
        """(y [B,T,D], (keys, values)) of the draft step after `earlier`, the keys and values of the steps before it."""
        q, k, v = self._project(x, context)
        pair = _as_cached(k, v)
        return self._output(harmonised_attention(q, [*earlier, pair], self._scale)), pair

    @property
    def _scale(self) -> float:
        cfg = self.config
        return cfg.head_dim**-0.5 if cfg.query_scale is None else cfg.query_scale

    def _project(self, x, context: Context):
        """Queries [B,T,K,G,H], keys and values [B,T,K,H] of `x`."""
        cfg, shape = self.config, x.shape[:2]
        q = whole_heads(self.q_proj(x).reshape(*shape, cfg.num_heads, cfg.head_dim))
        k = whole_heads(self.k_proj(x).reshape(*shape, cfg.num_kv_heads, cfg.head_dim))
        v = whole_heads(self.v_proj(x).reshape(*shape, cfg.num_kv_heads, cfg.head_dim))
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, context.rotation), rotate(k, context.rotation)
        return q.reshape(*shape, cfg.num_kv_heads, -1, cfg.head_dim), k, v

    def _output(self, y: Float[Array, "B T K G H"]) -> Float[Array, "B T D"]:
        return self.o_proj(y.reshape(*y.shape[:2], -1))


def _as_cached(k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]):
    """Keys [B,K,H,T] and values [B,K,T,H], as a cache has them."""
    return k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)


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
    has_input_norm: bool = True

    def setup(self):
        """Name the submodules."""
        cfg = self.config
        if self.has_input_norm:
            self.input_norm = RMSNorm(cfg.rms_norm_eps)
        self.attention, self.mlp_norm = Attention(cfg), RMSNorm(cfg.rms_norm_eps)
        self.mlp = MLP(cfg) if cfg.experts is None else ExpertsMLP(cfg)
        if cfg.sandwich_norms:
            self.post_attention_norm, self.post_mlp_norm = RMSNorm(cfg.rms_norm_eps), RMSNorm(cfg.rms_norm_eps)

    def __call__(self, x: Float[Array, "B T D"], context: Context, cache: KVCache | None = None, layer=0):
        """(x, cache) after the layer; arguments as in `Attention`."""
        y, cache = self.attention(self._attention_input(x), context, cache, layer)
        return self._residuals(x, y), cache

    def harmonised(self, x: Float[Array, "B T D"], context: Context, earlier: tuple):
        """(x, (keys, values)) after the draft step that follows `earlier`; see `Attention.harmonised`."""
        y, pair = self.attention.harmonised(self._attention_input(x), context, earlier)
        return self._residuals(x, y), pair

    def _attention_input(self, x):
        return self.input_norm(x) if self.has_input_norm else x

    def _residuals(self, x, attended):
        """Add attention's output to the stream, and then the MLP's output."""
        sandwich = self.config.sandwich_norms
        x = x + (self.post_attention_norm(attended) if sandwich else attended)
        y = self.mlp(self.mlp_norm(x))
        return x + (self.post_mlp_norm(y) if sandwich else y)


class PairLayer(nn.Module):
    """EAGLE-3's decoder layer: attention reads a token's embedding beside a state, 2D wide, and the state is its residual."""

    config: DecoderConfig
    norm_before_residual: bool = False

    def setup(self):
        """Name the submodules."""
        cfg = self.config
        self.embedding_norm, self.hidden_norm = RMSNorm(cfg.rms_norm_eps), RMSNorm(cfg.rms_norm_eps)
        self.attention, self.mlp_norm, self.mlp = Attention(cfg), RMSNorm(cfg.rms_norm_eps), MLP(cfg)

    def __call__(self, embedding, hidden, context: Context, cache: KVCache | None):
        """(x, cache) after the layer, of embeddings and states [B,T,D]; the rest as in `Attention`."""
        x, residual = self._attention_input(embedding, hidden)
        y, cache = self.attention(x, context, cache, 0)
        return self._residuals(residual, y), cache

    def harmonised(self, embedding, hidden, context: Context, earlier: tuple):
        """(x, (keys, values)) after the draft step that follows `earlier`; see `Attention.harmonised`."""
        x, residual = self._attention_input(embedding, hidden)
        y, pair = self.attention.harmonised(x, context, earlier)
        return self._residuals(residual, y), pair

    def _attention_input(self, embedding, hidden):
        normed = self.hidden_norm(hidden)
        x = jnp.concatenate([self.embedding_norm(embedding.astype(hidden.dtype)), normed], axis=-1)
        return x, normed if self.norm_before_residual else hidden

    def _residuals(self, residual, attended):
        x = residual + attended
        return x + self.mlp(self.mlp_norm(x))
