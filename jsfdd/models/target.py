"""The target: one decoder for every supported family, as pure functions of its parameters.

    hidden        = hidden_states(config, params, tokens)             # whole sequences: score, train
    hidden, cache = decode(config, params, tokens, view, cache)       # tokens that continue a cache: generate
    logits        = head_logits(config, params, hidden)

`hidden` is the last hidden state *after* the final norm: what the head reads and what an EAGLE-1/2 draft is fed. An EAGLE-3
draft is fed the residual streams that enter some of the layers: where `layers` are named, theirs stand in front of it, from the
same pass, and `hidden` is [B, T, (n + 1) D] (`final_state`).

`params["layers"]` is one tree whose leaves are stacked over layers, and the layers are a scan: one layer to compile.
`unstack_layers` turns it into a tuple of trees, one a layer, and the scan into a plain loop; see there when that pays.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsfdd.base.records import KVCache
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.attention import View, causal_view
from jsfdd.models.layers import Context, DecoderLayer, RMSNorm, rope_table


def hidden_states(
    config: DecoderConfig, params: dict, tokens: Int[Array, "B T"], layers: tuple[int, ...] = ()
) -> Float[Array, "B T S"]:
    """Hidden states of whole sequences from position 0; right padding is harmless. `layers` as in `decode`."""
    hidden, _ = decode(config, params, tokens, causal_view(*tokens.shape), None, layers)
    return hidden


def decode(
    config: DecoderConfig,
    params: dict,
    tokens: Int[Array, "B T"],
    view: View,
    cache: KVCache | None,
    layers: tuple[int, ...] = (),
) -> tuple[Float[Array, "B T S"], KVCache | None]:
    """Hidden states of new tokens, and `cache` with their keys and values in slots length … length + T − 1.

    `cache.length` is left as it was: the caller decides how many of the new tokens to keep. Without a cache the tokens
    see only each other.

    Args:
      layers: numbers, from 0, of layers whose inputs are wanted too; S = (n + 1) · D, the last D the final state.
    """
    stream, entered, cache = residual_stream(config, params, tokens, view, cache, layers)
    return jnp.concatenate([*entered, final_norm(config, params, stream)], axis=-1), cache


def final_state(config: DecoderConfig, hidden: Float[Array, "*shape S"]) -> Float[Array, "*shape D"]:
    """The part of hidden states that the head reads: the last D of them."""
    return hidden[..., hidden.shape[-1] - config.hidden_size :]


def residual_stream(
    config: DecoderConfig,
    params: dict,
    tokens: Int[Array, "B T"],
    view: View,
    cache: KVCache | None,
    layers: tuple[int, ...] = (),
) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T D"], ...], KVCache | None]:
    """The last layer's output *before* the final norm, which no head and no draft reads; the streams that enter `layers`; and
    the cache, as in `decode`."""
    full, local = _contexts(config, view)
    slides = config.sliding_layers or (False,) * config.num_layers

    def layer(carry, layer_params, number, slides):
        x, entered, cache = carry
        entered = tuple(jnp.where(number == wanted, x, kept) for wanted, kept in zip(layers, entered))
        if isinstance(slides, bool):
            context = local if slides else full
        else:
            context = jax.tree.map(lambda a, b: jnp.where(slides, b, a), full, local)
        x, cache = DecoderLayer(config).apply({"params": layer_params}, x, context, cache, number)
        return x, entered, cache

    x = embed_tokens(config, params, tokens)
    carry = x, (x,) * len(layers), cache
    if isinstance(params["layers"], tuple):
        for number, layer_params in enumerate(params["layers"]):
            carry = layer(carry, layer_params, number, slides[number])
    elif len(set(slides)) == 1:
        per_layer = (params["layers"], jnp.arange(config.num_layers))
        carry, _ = jax.lax.scan(lambda carry, xs: (layer(carry, *xs, slides[0]), None), carry, per_layer)
    else:
        # A scan has one body for all layers, so layers that differ in window or rotation choose by a flag.
        per_layer = (params["layers"], jnp.arange(config.num_layers), jnp.array(slides))
        carry, _ = jax.lax.scan(lambda carry, xs: (layer(carry, *xs), None), carry, per_layer)
    return carry


def final_norm(config: DecoderConfig, params: dict, stream: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The norm between the last layer and the head."""
    return RMSNorm(config.rms_norm_eps).apply({"params": params["norm"]}, stream)


def unstack_layers(params: dict) -> dict:
    """The same parameters with `layers` as a tuple of one tree per layer. This copies the layers' weights.

    On a CPU a scan first copies each layer's weights out of the stack, which at a few rows takes longer than the
    multiplication that follows; one-row decoding of SmolLM2 takes half the time without it. It is paid for with twice
    the memory and a compilation that grows with the number of layers, so accelerators, which read the stack in place,
    and long sequences, which hide the copy, keep the scan.
    """
    layers = params["layers"]
    count = jax.tree.leaves(layers)[0].shape[0]
    return {**params, "layers": tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count))}


def embed_tokens(config: DecoderConfig, params: dict, tokens: Int[Array, "*shape"]) -> Float[Array, "*shape D"]:
    """The target's token embeddings, with the target's scaling. The draft reads them, too."""
    embedding = params["embed"]["embedding"]
    return embedding[tokens] * jnp.asarray(config.embedding_scale, embedding.dtype)


def head_logits(
    config: DecoderConfig, params: dict, hidden: Float[Array, "*shape D"], tokens: Int[np.ndarray, " V"] | None = None
) -> Float[Array, "*shape V"]:
    """float32 logits of hidden states, by the target's head, which the draft borrows, too; of `tokens` only, if given."""
    if config.tie_embeddings:
        matrix, contract = params["embed"]["embedding"], 1
    else:
        matrix, contract = params["head"]["kernel"], 0
    if tokens is not None:
        matrix = jnp.take(matrix, tokens, axis=1 - contract)
    return jax.lax.dot_general(
        hidden.astype(matrix.dtype),
        matrix,
        (((hidden.ndim - 1,), (contract,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def init_params(config: DecoderConfig, key: Array) -> dict:
    """Random parameters in the layout that the loaders of `weights/` fill. For tests and shape work."""
    embed_key, head_key, *layer_keys = jax.random.split(key, config.num_layers + 2)
    x = jnp.zeros((1, 2, config.hidden_size))
    context, _ = _contexts(config, causal_view(1, 2))

    def init_layer(layer_key):
        return DecoderLayer(config).init(layer_key, x, context)["params"]

    params = {
        "embed": {"embedding": nn.initializers.normal(1.0)(embed_key, (config.vocab_size, config.hidden_size))},
        "layers": jax.vmap(init_layer)(jnp.stack(layer_keys)),
        "norm": {"scale": jnp.ones(config.hidden_size)},
    }
    if not config.tie_embeddings:
        kernel = nn.initializers.lecun_normal()(head_key, (config.hidden_size, config.vocab_size))
        params["head"] = {"kernel": kernel}
    return params


def _contexts(config: DecoderConfig, view: View) -> tuple[Context, Context | None]:
    """The context of full layers and, where some layers slide, of sliding ones."""
    length = view.positions.shape[1]
    full = Context(rope_table(view.positions, config.rope, config.head_dim), view.mask)
    if not any(config.sliding_layers):
        return full, None
    rotation = rope_table(view.positions, config.local_rope or config.rope, config.head_dim)
    if view.mask is None:
        return full._replace(window=length), Context(rotation, window=config.sliding_window)
    distance = view.positions[:, :, None] - view.key_positions[:, None, :]
    return full, Context(rotation, view.mask & (distance < config.sliding_window))
