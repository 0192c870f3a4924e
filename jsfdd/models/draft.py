"""The EAGLE-1/2 draft (arXiv 2401.15077, 2406.16858): one decoder layer that predicts the target's next hidden state.

At position t it reads the pair (embedding of x_{t+1}, hidden h_t), fuses it by one linear map to width D, and passes it
through a decoder layer that has no input norm. Its output stands for h_{t+1}: the target's own head turns it into the
distribution q of x_{t+2}, and it serves as the hidden state of the draft's next step. Embedding and head are the
target's, borrowed and frozen.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.layers import DecoderLayer, View, causal_view, rope_table
from jsfdd.records import KVCache


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """A draft's shape: a one-layer decoder, and whether fc has a bias (engines disagree on it, so by default not)."""

    decoder: DecoderConfig
    fc_bias: bool = False

    def __post_init__(self):
        if self.decoder.num_layers != 1:
            raise ValueError(f"an EAGLE draft has one layer, not {self.decoder.num_layers}")


def draft_config(target: DecoderConfig, fc_bias: bool = False) -> DraftConfig:
    """The draft for `target`: one full-attention Llama-style layer of the target's own widths, heads and rotation.

    Served drafts are Llama layers whatever the target's family, so the family's extras (q/k norms, biases, sandwich
    norms, windows) are left out; what must agree with the target (widths, vocabulary, rotation, eps) is copied.
    """
    decoder = dataclasses.replace(
        target,
        family="llama",
        num_layers=1,
        qkv_bias=False,
        qk_norm=False,
        sandwich_norms=False,
        activation="silu",
        query_scale=None,
        sliding_window=None,
        sliding_layers=(),
        local_rope=None,
    )
    return DraftConfig(decoder, fc_bias)


class Draft(nn.Module):
    """fc and one decoder layer."""

    config: DraftConfig

    def setup(self):
        """Name the submodules."""
        self.fc = nn.Dense(self.config.decoder.hidden_size, use_bias=self.config.fc_bias)
        self.layer = DecoderLayer(self.config.decoder, input_norm=False)

    def __call__(self, embedding: Float[Array, "B T D"], hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Predicted h_{t+1} of whole sequences: `embedding[:, t]` is of x_{t+1}, `hidden[:, t]` is h_t."""
        predicted, _ = self.decode(embedding, hidden, causal_view(*embedding.shape[:2]), None)
        return predicted

    def decode(self, embedding, hidden, view: View, cache: KVCache | None):
        """Predicted hidden states [B,T,D] of new pairs, and `cache` with their keys and values, its length as it was."""
        cfg = self.config.decoder
        x = self.fc(jnp.concatenate([embedding.astype(hidden.dtype), hidden], axis=-1))
        table = rope_table(view.positions, cfg.rope, cfg.head_dim)
        keys, values, start = (None, None, None) if cache is None else (cache.k, cache.v, cache.length)
        x, keys, values = self.layer(x, table, view.mask, keys, values, 0, start)
        return x, None if cache is None else KVCache(keys, values, cache.length)


def init_draft(config: DraftConfig, key: Array) -> dict:
    """Fresh parameters: {"fc": …, "layer": …}, float32."""
    width = config.decoder.hidden_size
    return Draft(config).init(key, jnp.zeros((1, 2, width)), jnp.zeros((1, 2, width)))["params"]
