"""The draft: one decoder layer that, beside the target's state at t, reads the token x_{t+1}, and proposes x_{t+2}.

                 EAGLE-1/2 (arXiv 2401.15077, 2406.16858)     EAGLE-3 (arXiv 2503.01840)
    reads        h_t, the target's final state                the residual streams that enter some layers, fused by fc to g_t
    its layer    fc(embedding, h_t), no input norm            attention over (normed embedding, normed g_t); residual g_t
    head         the target's, of its output                  its own, of its normed output
    next step    reads its output in place of h               reads its output in place of g, not normed

The embedding is the target's in both, borrowed and frozen. `EagleLayer` and `Eagle3Layer` have the same four methods, so that
decoding and training know of no kinds:

    state = layer.read(hidden)                                   what the first step reads of the target's hidden states
    state, cache = layer.decode(embedding, state, view, cache)   a step, and the state that the next one reads
    state, pair = layer.harmonised(embedding, state, earlier)    the same of whole sequences, as training unrolls it
    outputs = layer.outputs(state)                               what the head reads

Hidden states are [.., S]: streams in front, the final state last (`models/target.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jsfdd.base.records import KVCache
from jsfdd.models.architecture import DecoderConfig, DraftKind
from jsfdd.models.attention import View, causal_view
from jsfdd.models.layers import Context, DecoderLayer, PairLayer, RMSNorm, rope_table
from jsfdd.models.target import final_state, head_logits


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """A draft's shape.

    Attributes:
      decoder: of one layer; its vocabulary is the target's.
      fc_bias: whether fc has a bias; engines disagree on it, so by default not.
      vocabulary: the tokens that the draft can propose, ascending; empty for all of the target's.
      kind: EAGLE-1/2, or EAGLE-3.

    EAGLE-3 only:
      target_layers: the target's layers, from 0 and ascending, of which the draft reads the inputs.
      norm_before_fc: fc reads the streams normed together (EAGLE-3.1, arXiv 2605.09992).
      fc_norm: fc reads the streams normed one by one (EAGLE-3.1).
      norm_output: the next step reads the normed output, which the head reads too (EAGLE-3.1).
      norm_before_residual: the residual is the normed state (speculators' drafts).
    """

    decoder: DecoderConfig
    fc_bias: bool = False
    vocabulary: tuple[int, ...] = ()
    kind: DraftKind = "eagle"
    target_layers: tuple[int, ...] = ()
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False

    def __post_init__(self):
        layers = self.target_layers
        if self.kind == "eagle":
            for field in ("target_layers", "norm_before_fc", "fc_norm", "norm_output", "norm_before_residual"):
                if getattr(self, field):
                    raise ValueError(f"{field}={getattr(self, field)!r} is of an EAGLE-3 draft, and this one is of EAGLE-1/2")
        elif not layers or layers[0] < 0 or any(a >= b for a, b in itertools.pairwise(layers)):
            raise ValueError(f"target layers {list(layers)}: an EAGLE-3 draft reads at least one, numbered from 0, ascending")
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("fc_norm norms the streams one by one and norm_before_fc together; a draft has one of them")
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


def params_digest(params: dict) -> str:
    """sha256 hex of a draft's parameters: names, shapes and values."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        sha.update(f"{jax.tree_util.keystr(path)}\0{leaf.shape}\0".encode())
        sha.update(np.ascontiguousarray(np.asarray(leaf, np.float32)).tobytes())
    return sha.hexdigest()


def default_layers(num_layers: int) -> tuple[int, int, int]:
    """The layers whose inputs an EAGLE-3 draft reads by default, of a target's N: 2, N // 2 and N − 3, as in engines.

    Raises:
      ValueError: fewer than seven layers, so that these would not be three different layers.
    """
    if num_layers < 7:
        raise ValueError(
            f"an EAGLE-3 draft reads the inputs of layers 2, N/2 and N-3, and this target has {num_layers} layers, fewer than "
            "7; train an EAGLE-1/2 draft (--draft-kind eagle), or name the layers in Python (Recipe.target_layers)"
        )
    return 2, num_layers // 2, num_layers - 3


def draft_config(
    target: DecoderConfig,
    fc_bias: bool = False,
    vocabulary: tuple[int, ...] = (),
    kind: DraftKind = "eagle",
    target_layers: tuple[int, ...] = (),
) -> DraftConfig:
    """The shape of a draft for `target`: one full-attention Llama-style layer of the target's own widths, heads and rotation.

    Served drafts are Llama layers whatever the target's family, so the family's extras (q/k norms, biases, sandwich
    norms, windows, experts) are left out; what must agree with the target (widths, vocabulary, rotation, eps) is copied.

    Args:
      target_layers: of an EAGLE-3 draft; `default_layers` unless given.

    Raises:
      ValueError: the target has too few layers, or not these.
    """
    if kind == "eagle3":
        target_layers = target_layers or default_layers(target.num_layers)
        check_layers(target_layers, target.num_layers)
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
        experts=None,
    )
    return DraftConfig(decoder, fc_bias, vocabulary, kind, target_layers)


def layers_read(target: DecoderConfig, kind: DraftKind, target_layers: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The target's layers whose inputs a draft reads: none, those given, or the default ones. Errors as in `draft_config`."""
    return draft_config(target, kind=kind, target_layers=target_layers).target_layers


def check_layers(target_layers: tuple[int, ...], num_layers: int) -> None:
    """Raise ValueError if a draft reads layers that a target of `num_layers` layers does not have."""
    if beyond := [number for number in target_layers if number >= num_layers]:
        raise ValueError(
            f"target layers {list(target_layers)}: {beyond[0]} is out of range; the target has {num_layers}, from 0 to "
            f"{num_layers - 1}"
        )


class Draft(NamedTuple):
    """A draft, as `load_draft` returns it and decoding, evaluation and export take it.

    Attributes:
      config: the draft's shape.
      params: {"fc": …, "layer": …}, and of EAGLE-3 {"norm": …, "head": …} too, as `init_draft` makes them.
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

    def __call__(self, embedding: Float[Array, "B T D"], hidden: Float[Array, "B T S"]) -> Float[Array, "B T D"]:
        """Predicted h_{t+1} of whole sequences: `embedding[:, t]` is of x_{t+1}, `hidden[:, t]` is h_t."""
        predicted, _ = self.decode(embedding, self.read(hidden), causal_view(*embedding.shape[:2]), None)
        return predicted

    def read(self, hidden: Float[Array, "*shape S"]) -> Float[Array, "*shape D"]:
        """h_t."""
        return final_state(self.config.decoder, hidden)

    def outputs(self, state: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        """The same: a predicted h_{t+1}."""
        return state

    def decode(self, embedding, hidden, view: View, cache: KVCache | None):
        """Predicted hidden states [B,T,D] of new pairs, and `cache` with their keys and values, its length as it was."""
        return self.layer(*self._fused(embedding, hidden, view), cache)

    def harmonised(self, embedding, hidden, earlier: tuple):
        """(predicted hidden states [B,T,D], its keys and values) of the draft step after `earlier`; see `draft_steps`."""
        return self.layer.harmonised(*self._fused(embedding, hidden, causal_view(*hidden.shape[:2])), earlier)

    def _fused(self, embedding, hidden, view: View) -> tuple[Array, Context]:
        """What the layer reads: the pairs fused to width D, and their places."""
        return self.fc(jnp.concatenate([embedding.astype(hidden.dtype), hidden], axis=-1)), _places(self.config, view)


class Eagle3Layer(nn.Module):
    """fc over streams, one decoder layer over pairs, and the final norm. The head is no part of it: `draft_head`."""

    config: DraftConfig

    def setup(self):
        """Name the submodules."""
        cfg, eps = self.config, self.config.decoder.rms_norm_eps
        self.fc = nn.Dense(cfg.decoder.hidden_size, use_bias=cfg.fc_bias)
        if cfg.norm_before_fc:
            self.input_norm = RMSNorm(eps)
        if cfg.fc_norm:
            self.fc_norm = [RMSNorm(eps) for _ in cfg.target_layers]
        self.layer, self.norm = PairLayer(cfg.decoder, cfg.norm_before_residual), RMSNorm(eps)

    def __call__(self, embedding: Float[Array, "B T D"], hidden: Float[Array, "B T S"]) -> Float[Array, "B T D"]:
        """What the head reads, of whole sequences: `embedding[:, t]` is of x_{t+1}, `hidden[:, t]` the target's at t."""
        state, _ = self.decode(embedding, self.read(hidden), causal_view(*embedding.shape[:2]), None)
        return self.outputs(state)

    def read(self, hidden: Float[Array, "*shape S"]) -> Float[Array, "*shape D"]:
        """g_t: the streams, all but the last D of the hidden states, fused to width D.

        Raises:
          ValueError: there are more or fewer streams than the draft's layers.
        """
        cfg = self.config
        streams = check_states(cfg, hidden)[..., : -cfg.decoder.hidden_size]
        if cfg.norm_before_fc:
            streams = self.input_norm(streams)
        if cfg.fc_norm:
            parts = jnp.split(streams, len(self.fc_norm), axis=-1)
            streams = jnp.concatenate([norm(part) for norm, part in zip(self.fc_norm, parts)], axis=-1)
        return self.fc(streams)

    def decode(self, embedding, hidden, view: View, cache: KVCache | None):
        """The states [B,T,D] of new pairs, which the next step reads, and `cache`, as in `EagleLayer`."""
        x, cache = self.layer(embedding, hidden, _places(self.config, view), cache)
        return self._next_state(x), cache

    def harmonised(self, embedding, hidden, earlier: tuple):
        """(states [B,T,D] that the next step reads, keys and values) of the draft step after `earlier`."""
        x, pair = self.layer.harmonised(embedding, hidden, _places(self.config, causal_view(*hidden.shape[:2])), earlier)
        return self._next_state(x), pair

    def outputs(self, state: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        """What the head reads of a state."""
        return state if self.config.norm_output else self.norm(state)

    def _next_state(self, x):
        return self.norm(x) if self.config.norm_output else x


def layer_of(config: DraftConfig) -> EagleLayer | Eagle3Layer:
    """The module of a draft."""
    return EagleLayer(config) if config.kind == "eagle" else Eagle3Layer(config)


def check_states(config: DraftConfig, hidden: Float[Array, "*shape S"]) -> Float[Array, "*shape S"]:
    """Return `hidden` if it has what a draft reads; raise ValueError otherwise."""
    width, layers = config.decoder.hidden_size, config.target_layers
    if layers and hidden.shape[-1] != (len(layers) + 1) * width:
        raise ValueError(
            f"hidden states of width {hidden.shape[-1]}: an EAGLE-3 draft reads the inputs of the target's layers "
            f"{list(layers)}, and the final state behind them: {len(layers) + 1} · {width}; have the target give them"
        )
    return hidden


def _places(config: DraftConfig, view: View) -> Context:
    cfg = config.decoder
    return Context(rope_table(view.positions, cfg.rope, cfg.head_dim), view.mask)


def draft_steps(
    config: DraftConfig,
    params: dict,
    embedding: Float[Array, "B T D"],
    hidden: Float[Array, "B T S"],
    num_steps: int,
) -> Iterator[Float[Array, "B T D"]]:
    """What the head reads, of whole sequences and of each of `num_steps` draft steps in turn.

    Step 1 reads the target's hidden states, as EAGLE trains. Step n reads at t what step n − 1 predicted for it, at
    t − 1, and attends as a draft that is n tokens ahead does (`harmonised_attention`): training sees what decoding does
    (HASS, arXiv 2408.15766; EAGLE-3's training-time test is the same, its row t of step n being our t + n − 1).
    At t < n − 1 no step n exists, and what is given there means nothing.
    """
    layer, earlier = layer_of(config), ()
    state = layer.apply({"params": params}, hidden, method="read")
    for _ in range(num_steps):
        state, pair = layer.apply({"params": params}, embedding, state, earlier, method="harmonised")
        yield layer.apply({"params": params}, state, method="outputs")
        earlier = (*earlier, pair)
        state = jnp.pad(state[:, :-1], ((0, 0), (1, 0), (0, 0)))


@functools.partial(jax.jit, static_argnums=0)
def init_draft(config: DraftConfig, key: Array, head: Float[Array, "V D"] | None = None) -> dict:
    """Fresh parameters, float32: {"fc": …, "layer": …}, and of EAGLE-3 {"norm": …, "head": {"rows": [Vq, D]}} too.

    Args:
      head: the target's. An EAGLE-3 draft's head begins as a copy of it, or at random if it is not given.
    """
    width, streams = config.decoder.hidden_size, len(config.target_layers)
    x, hidden = jnp.zeros((1, 2, width)), jnp.zeros((1, 2, (streams + 1) * width))
    params = layer_of(config).init(key, x, hidden)["params"]
    if config.kind == "eagle3":
        size = len(config.vocabulary) or config.decoder.vocab_size
        if head is None:
            rows = nn.initializers.lecun_normal(in_axis=1, out_axis=0)(jax.random.fold_in(key, 1), (size, width))
        else:
            rows = (head[np.array(config.vocabulary)] if config.vocabulary else head).astype(jnp.float32)
        params["head"] = {"rows": rows}
    return params


def draft_head(config: DraftConfig, params: dict, head: Float[Array, "V D"]) -> Float[Array, "Vq D"]:
    """The head for a draft's outputs, one row per token of its vocabulary: its own, or the target's `head`."""
    if config.kind == "eagle3":
        return params["head"]["rows"]
    return head[np.array(config.vocabulary)] if config.vocabulary else head


def draft_head_logits(
    target: DecoderConfig, target_params: dict, config: DraftConfig, params: dict, state: Float[Array, "*shape D"]
) -> Float[Array, "*shape V"]:
    """A draft's float32 logits over all the target's tokens, from its state; −inf for tokens that it cannot propose."""
    tokens = np.array(config.vocabulary, np.int32) if config.vocabulary else None
    outputs = layer_of(config).apply({"params": params}, state, method="outputs")
    if config.kind == "eagle3":
        rows = params["head"]["rows"]
        contract = (((outputs.ndim - 1,), (1,)), ((), ()))
        logits = jax.lax.dot_general(outputs.astype(rows.dtype), rows, contract, preferred_element_type=jnp.float32)
    else:
        logits = head_logits(target, target_params, outputs, tokens)
    if tokens is None:
        return logits
    return jnp.full((*logits.shape[:-1], target.vocab_size), -jnp.inf).at[..., tokens].set(logits)
