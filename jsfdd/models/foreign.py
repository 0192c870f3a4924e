"""A target from another library: jsfdd calls a function for its hidden states, and uses its embedding and head.

    target = foreign_target(hidden_states, embedding, head, config, name="my model")

`hidden_states` is any function from tokens to the states that the head reads; it keeps its own parameters, its own jit and
its own mesh. Scoring, keeping hidden states and training take such a target wherever they take a `weights.target.Target`;
decoding does not, since it needs a cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jsfdd.base.mesh import to_host
from jsfdd.base.processes import several
from jsfdd.base.records import Batch
from jsfdd.models.architecture import DecoderConfig


class ForeignTarget(NamedTuple):
    """A target whose decoder is not jsfdd's. Made by `foreign_target`.

    Attributes:
      config: widths, heads, rotation and vocabulary, from which its draft takes its shape; layers only count for EAGLE-3.
      params: its embedding and head, laid out as in `models/target.py`.
      hidden_states: int32[B, T] tokens, right-padded, to the states [B, T, D] after its final norm; None where they are given
        as arrays.
      tokenizer: a fast transformers tokenizer with a chat template; None where samples are tokenized already.
      name: for messages and cards.
      fingerprint: what results that depend on this target are stored with.
    """

    config: DecoderConfig
    params: dict
    hidden_states: Callable[[Int[np.ndarray, "B T"]], Float[Array, "B T D"]] | None
    tokenizer: Any
    name: str
    fingerprint: str


def foreign_target(
    hidden_states: Callable[[Int[np.ndarray, "B T"]], Float[Array, "B T D"]] | None,
    embedding: Float[Array, "V D"],
    head: Float[Array, "V D"] | None,
    config: DecoderConfig,
    *,
    tokenizer=None,
    name: str = "foreign",
    fingerprint: str | None = None,
) -> ForeignTarget:
    """Make a target from a model of MaxText, Levanter, Flax NNX or another library, for `score` and `train`.

    Args:
      hidden_states: from tokens (numpy, int32[B, T], right-padded with token 0) to the states [B, T, D], float32 or
        bfloat16, that the head multiplies: after the final norm. For an EAGLE-3 draft the streams that enter its layers
        stand in front of them: [B, T, (n + 1) D]. It must be causal, so that padding does not matter. Jit it. It is called with
        a few different shapes. None if hidden states are always given as arrays.
      embedding: the token embeddings, with the model's scaling except for `config.embedding_scale`.
      head: logits are `hidden @ head.T`; None if the embedding is the head.
      config: of the model; of it `vocab_size`, `hidden_size`, the heads, the rotation and the norm's eps shape a draft.
      tokenizer: a fast transformers tokenizer with a chat template, if chats are to be tokenized here.
      name: for messages and cards.
      fingerprint: changes when the weights do; by default a sha256 of embedding and head. Give one if the layers between
        them can change while these two stay.

    Raises:
      ValueError: embedding or head is not [vocab_size, hidden_size], or the head is missing though `config.tie_embeddings`
        is False.

    Example:
      >>> states = jax.jit(lambda tokens: jsfdd.hidden_states(target, tokens))             # stands for another library's
      >>> embedding, head = target.params["embed"]["embedding"], target.params["head"]["kernel"].T
      >>> foreign = foreign_target(states, embedding, head, target.config, name="mine")
      >>> samples = [jsfdd.Sample("a", "x", np.arange(9, dtype=np.int32), np.ones(9, bool))]
      >>> jsfdd.score(foreign, samples).num_tokens
      array([8], dtype=int32)
    """
    shape = (config.vocab_size, config.hidden_size)
    if config.tie_embeddings != (head is None):
        wanted = "None" if config.tie_embeddings else "given"
        raise ValueError(f"tie_embeddings is {config.tie_embeddings}, so the head must be {wanted}")
    for matrix, what in ((embedding, "embedding"), (head, "head")):
        if matrix is not None and matrix.shape != shape:
            raise ValueError(f"the {what} is {matrix.shape}, but the config says [vocab_size, hidden_size] = {shape}")
    params = {"embed": {"embedding": jnp.asarray(embedding)}}
    if head is not None:
        params["head"] = {"kernel": jnp.asarray(head).T}
    if fingerprint is None:
        sha = hashlib.sha256(repr(config).encode())
        for leaf in jax.tree.leaves(params):
            sha.update(np.ascontiguousarray(leaf).tobytes())
        fingerprint = sha.hexdigest()
    return ForeignTarget(config, params, hidden_states, tokenizer, name, fingerprint)


def foreign_hidden(target: ForeignTarget, batch: Batch, mesh: Mesh, layers: tuple[int, ...] = ()) -> Float[Array, "B T S"]:
    """The hidden states of a batch, its rows split over `mesh`, with the streams that enter `layers` in front.

    Without `layers`, only the final states, even if the function gives streams in front of them.

    Raises:
      ValueError: the target's function gave another shape, or there are several processes: a batch's tokens are then on
        other machines too, where this one cannot call the function for them.
    """
    if several():
        raise ValueError(f"{target.name}: hidden states of a foreign target are computed in one process; start a single one")
    if target.hidden_states is None:
        raise ValueError(f"{target.name}: has no function for hidden states; give them as arrays (hidden=…)")
    tokens = to_host(batch.tokens)
    hidden = target.hidden_states(tokens)
    width = target.config.hidden_size
    if not layers and hidden.shape[-1] % width == 0:
        hidden = hidden[..., -width:]
    expected = (*tokens.shape, (len(layers) + 1) * width)
    if hidden.shape != expected:
        streams = f": the inputs of layers {list(layers)}, and the final state behind them" if layers else ""
        raise ValueError(
            f"{target.name}: hidden_states gave {hidden.shape} for tokens {tokens.shape}; it must give {expected}{streams}"
        )
    return jax.device_put(hidden, NamedSharding(mesh, P("data")))
