"""The target: one decoder for every supported family, its layers stacked and scanned.

    hidden        = Decoder(config).apply({"params": params}, tokens)                       # score, train
    hidden, cache = Decoder(config).apply({"params": params}, tokens, view, cache, method="decode")
    logits        = head_logits(config, params, hidden)

`hidden` is the last hidden state *after* the final norm: what the head reads and what an EAGLE draft is fed.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.layers import DecoderLayer, RMSNorm, View, causal_view, rope_table
from jsfdd.records import KVCache


class _ScannedLayer(nn.Module):
    """One step of the scan over layers: picks the layer's mask and rotation, carries activations and cache."""

    config: DecoderConfig

    def setup(self):
        self.layer = DecoderLayer(self.config)
        nn.share_scope(self, self.layer)  # params["layers"]["attention"], not params["layers"]["layer"]["attention"]

    def __call__(self, carry, layer, slides, contexts, start):
        x, keys, values = carry
        full, local = contexts
        # A scan has one body for all layers, so layers that differ in window or rotation choose by a flag.
        context = full if local is None else jax.tree.map(lambda a, b: jnp.where(slides, b, a), full, local)
        table, mask = context
        return self.layer(x, table, mask, keys, values, layer, start), None


class Decoder(nn.Module):
    """Decoder-only transformer without its head (see `head_logits`)."""

    config: DecoderConfig

    def setup(self):
        cfg = self.config
        self.embed = nn.Embed(cfg.vocab_size, cfg.hidden_size)
        scanned = nn.scan(
            _ScannedLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=cfg.num_layers,
        )
        self.layers = scanned(cfg)
        self.norm = RMSNorm(cfg.rms_norm_eps)
        if not cfg.tie_embeddings:
            self.head = nn.Dense(cfg.vocab_size, use_bias=False)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Hidden states of whole sequences from position 0; right padding is harmless."""
        hidden, _ = self.decode(tokens, causal_view(*tokens.shape), None)
        return hidden

    def decode(self, tokens: Int[Array, "B T"], view: View, cache: KVCache | None):
        """Hidden states [B,T,D] of new tokens, and `cache` with their keys and values in slots length … length+T−1.

        `cache.length` is left as it was: the caller decides how many of the new tokens to keep.
        """
        cfg = self.config
        x = self.embed(tokens) * jnp.asarray(cfg.embedding_scale, self.embed.embedding.dtype)
        keys, values, start = (None, None, None) if cache is None else (cache.k, cache.v, cache.length)
        slides = jnp.array(cfg.sliding_layers or (False,) * cfg.num_layers)
        carry, _ = self.layers(
            (x, keys, values), jnp.arange(cfg.num_layers), slides, self._contexts(view), start
        )
        x, keys, values = carry
        hidden = self.norm(x)
        return hidden, None if cache is None else KVCache(keys, values, cache.length)

    def _contexts(self, view: View):
        """(rotation table, mask) of full layers and, where some layers slide, of sliding ones."""
        cfg = self.config
        full = rope_table(view.positions, cfg.rope, cfg.head_dim), view.mask
        if not any(cfg.sliding_layers):
            return full, None
        distance = view.positions[:, :, None] - view.key_positions[:, None, :]
        rope = cfg.local_rope or cfg.rope
        return full, (rope_table(view.positions, rope, cfg.head_dim), view.mask & (distance < cfg.sliding_window))


def embed_tokens(config: DecoderConfig, params: dict, tokens: Int[Array, "*shape"]) -> Float[Array, "*shape D"]:
    """The target's token embeddings, scaled as the target scales them: what the draft borrows as input."""
    embedding = params["embed"]["embedding"]
    return embedding[tokens] * jnp.asarray(config.embedding_scale, embedding.dtype)


def head_logits(config: DecoderConfig, params: dict, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape V"]:
    """float32 logits of hidden states: the target's head, which the draft borrows as well."""
    if config.tie_embeddings:
        matrix, contract = params["embed"]["embedding"], 1
    else:
        matrix, contract = params["head"]["kernel"], 0
    return jax.lax.dot_general(
        hidden.astype(matrix.dtype),
        matrix,
        (((hidden.ndim - 1,), (contract,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def init_params(config: DecoderConfig, key: Array) -> dict:
    """Random parameters in the layout that the loaders of `weights/` fill. For tests and shape work."""
    decoder = Decoder(config)
    params = decoder.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
    if not config.tie_embeddings:
        shape = (config.hidden_size, config.vocab_size)
        params = {**params, "head": {"kernel": nn.initializers.lecun_normal()(key, shape)}}
    return params
