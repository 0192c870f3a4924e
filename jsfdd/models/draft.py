"""The EAGLE-1/2 draft (arXiv 2401.15077, 2406.16858): one decoder layer that predicts the target's next hidden state.

At position t it reads the pair (embedding of x_{t+1}, hidden h_t), fuses it by one linear map to width D, and passes it
through a decoder layer that has no input norm. Its output stands for h_{t+1}: the target's own head turns it into the
distribution q of x_{t+2}, and it serves as the hidden state of the draft's next step. Embedding and head are the
target's, borrowed and frozen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jsfdd.base.records import KVCache
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.attention import View, causal_view
from jsfdd.models.layers import Context, DecoderLayer, rope_table


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """A draft's shape.

    Attributes:
      decoder: of one layer; its vocabulary is the target's.
      fc_bias: whether fc has a bias; engines disagree on it, so by default not.
      vocabulary: the tokens that the draft can propose, ascending; empty for all of the target's.
    """

    decoder: DecoderConfig
    fc_bias: bool = False
    vocabulary: tuple[int, ...] = ()

    def __post_init__(self):
        if self.vocabulary and not 0 <= self.vocabulary[0] <= self.vocabulary[-1] < self.decoder.vocab_size:
            raise ValueError(f"a draft vocabulary with a token outside the target's {self.decoder.vocab_size}")
        if any(a >= b for a, b in itertools.pairwise(self.vocabulary)):
            raise ValueError("a draft vocabulary must ascend")
        if self.decoder.num_layers != 1:
            raise ValueError(f"an EAGLE draft has one layer, not {self.decoder.num_layers}")


def allowed_tokens(config: DraftConfig) -> np.ndarray | None:
    """bool[V]: which tokens the draft can propose; None where it can propose all."""
    if not config.vocabulary:
        return None
    allowed = np.zeros(config.decoder.vocab_size, bool)
    allowed[list(config.vocabulary)] = True
    return allowed


def vocabulary_digest(config: DraftConfig) -> str | None:
    """sha256 hex of the draft's vocabulary; None where it can propose all tokens."""
    return hashlib.sha256(np.array(config.vocabulary, np.int32).tobytes()).hexdigest() if config.vocabulary else None


def draft_config(target: DecoderConfig, fc_bias: bool = False, vocabulary: tuple[int, ...] = ()) -> DraftConfig:
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
    return DraftConfig(decoder, fc_bias, vocabulary)


class Draft(NamedTuple):
    """A draft: what `load_draft` returns and what decoding, evaluation and export take.

    Attributes:
      config: its shape.
      params: {"fc": …, "layer": …}, as `init_draft` makes them.
      record: what its training run wrote down about itself; None for a draft that was exported, or never trained.
    """

    config: DraftConfig
    params: dict
    record: dict | None = None


class EagleLayer(nn.Module):
    """fc and one decoder layer."""

    config: DraftConfig

    def setup(self):
        """Name the submodules."""
        self.fc = nn.Dense(self.config.decoder.hidden_size, use_bias=self.config.fc_bias)
        self.layer = DecoderLayer(self.config.decoder, has_input_norm=False)

    def __call__(self, embedding: Float[Array, "B T D"], hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Predicted h_{t+1} of whole sequences: `embedding[:, t]` is of x_{t+1}, `hidden[:, t]` is h_t."""
        predicted, _ = self.decode(embedding, hidden, causal_view(*embedding.shape[:2]), None)
        return predicted

    def decode(self, embedding, hidden, view: View, cache: KVCache | None):
        """Predicted hidden states [B,T,D] of new pairs, and `cache` with their keys and values, its length as it was."""
        return self.layer(*self._fused(embedding, hidden, view), cache)

    def harmonised(self, embedding, hidden, earlier: tuple):
        """(predicted hidden states [B,T,D], its keys and values) of the draft step after `earlier`; see `draft_steps`."""
        view = causal_view(*embedding.shape[:2])
        first = view.mask & jnp.tri(hidden.shape[1], k=-len(earlier), dtype=bool)[None]
        return self.layer.harmonised(*self._fused(embedding, hidden, view._replace(mask=first)), earlier)

    def _fused(self, embedding, hidden, view: View) -> tuple[Array, Context]:
        """What the layer reads: the pairs fused to width D, and their places."""
        cfg = self.config.decoder
        x = self.fc(jnp.concatenate([embedding.astype(hidden.dtype), hidden], axis=-1))
        return x, Context(rope_table(view.positions, cfg.rope, cfg.head_dim), view.mask)


def draft_steps(
    config: DraftConfig,
    params: dict,
    embedding: Float[Array, "B T D"],
    hidden: Float[Array, "B T D"],
    num_steps: int,
) -> Iterator[Float[Array, "B T D"]]:
    """Predicted h_{t+1} of whole sequences, of each of `num_steps` draft steps in turn (HASS, arXiv 2408.15766).

    Step 1 reads the target's hidden states, as EAGLE trains. Step n reads at t what step n − 1 predicted for it, at
    t − 1, and attends as a draft that is n tokens ahead does (`harmonised_attention`): training sees what decoding does.
    At t < n − 1 no step n exists, and what is given there means nothing.
    """
    layer, earlier = EagleLayer(config), ()
    for _ in range(num_steps):
        hidden, pair = layer.apply({"params": params}, embedding, hidden, earlier, method="harmonised")
        yield hidden
        earlier = (*earlier, pair)
        hidden = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))


def init_draft(config: DraftConfig, key: Array) -> dict:
    """Fresh parameters: {"fc": …, "layer": …}, float32."""
    width = config.decoder.hidden_size
    return EagleLayer(config).init(key, jnp.zeros((1, 2, width)), jnp.zeros((1, 2, width)))["params"]
