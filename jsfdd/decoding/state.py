"""The records of the decoding loop: its inputs, the state from step to step, and what a step emits."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key

from jsfdd.base.records import KVCache
from jsfdd.decoding.ensemble import Routing


class DecodeParams(NamedTuple):
    """The weights that decoding reads; `generate.prepare_params` makes them.

    Attributes:
      target: the target's weights, for prompts, embeddings and the head.
      stepping: the target's weights for single steps. On a CPU this is a copy with one tree per layer
        (`models.target.unstack_layers` says why); elsewhere it is `target` itself.
      drafts: each draft's weights, in the order of `DecodeSetup.drafts`.
    """

    target: dict
    stepping: dict
    drafts: tuple[dict, ...] = ()


class PromptBatch(NamedTuple):
    """Right-padded prompts with one typed key per row, from which the row's text is sampled. Length 0 marks a padding row."""

    tokens: Int[Array, "B P"]
    lengths: Int[Array, " B"]
    keys: Key[Array, " B"]


class DecodeState(NamedTuple):
    """The state between steps. `generated` has room for a last step that overshoots max_new_tokens.

    `draft_caches` and `draft_hidden` have one item per draft: its cache, and its output at the last true pair.
    """

    generated: Int[Array, "B N"]
    num_generated: Int[Array, " B"]
    last_token: Int[Array, " B"]  # committed, but not yet read by the target
    done: Bool[Array, " B"]
    target_cache: KVCache
    keys: Key[Array, " B"]
    draft_caches: tuple[KVCache, ...] = ()
    draft_hidden: tuple[Float[Array, "B D"], ...] = ()
    routing: Routing | None = None


class Emitted(NamedTuple):
    """What one step emitted, for counting and streaming: `tokens[b, :count[b]]` in row b.

    Attributes:
      tokens, count: the emitted tokens; none for a row that was done before the step.
      accepted: how many of them the drafts proposed.
      verified: how many draft depths were verified, up to the first rejection or stop token.
      active: rows that were not done before the step.
      proposers: which draft proposed each accepted token.
      offered: how many of the draft tokens that the target read count for each draft.
    """

    tokens: Int[Array, "B G1"]
    count: Int[Array, " B"]
    accepted: Int[Array, " B"]
    verified: Int[Array, " B"]
    active: Bool[Array, " B"]
    proposers: Int[Array, "B G"]
    offered: Int[Array, "B E"]
