"""The decoding loop's records: what it reads, what it carries from step to step, and what a step emits."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key

from jsfdd.base.records import KVCache
from jsfdd.decoding.ensemble import Routing


class DecodeParams(NamedTuple):
    """The weights that decoding reads; `generate.prepare_params` makes them.

    Attributes:
      target: the target's, for prompts, embeddings and the head.
      stepping: the target's layers as a step of few rows reads them. On a CPU they are a copy, one tree a layer
        (`models.target.unstack_layers` says why); elsewhere they are `target` itself.
      drafts: each draft's, in the order of `DecodeSetup.drafts`.
    """

    target: dict
    stepping: dict
    drafts: tuple[dict, ...] = ()


class PromptBatch(NamedTuple):
    """Right-padded prompts. A row of length 0 only fills the batch. One typed key a row: text depends on nothing else."""

    tokens: Int[Array, "B P"]
    lengths: Int[Array, " B"]
    keys: Key[Array, " B"]


class DecodeState(NamedTuple):
    """What the next step needs. `generated` has room for a last step that overshoots max_new_tokens.

    `draft_caches` and `draft_hidden` have an item for each draft: its cache, and its output at the last true pair.
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
    """What one step did, for counting and streaming: row b emitted `tokens[b, :count[b]]`.

    Attributes:
      tokens, count: the tokens; of a row that was done before the step, none.
      accepted: how many of them the drafts proposed.
      verified: draft depths that were judged: fewer than G where a stop token ended the answer before the verdict.
      active: rows that were not done before the step.
      proposers: which draft proposed each accepted token.
      offered: how many of the draft tokens that the target read are counted for each draft.
    """

    tokens: Int[Array, "B G1"]
    count: Int[Array, " B"]
    accepted: Int[Array, " B"]
    verified: Int[Array, " B"]
    active: Bool[Array, " B"]
    proposers: Int[Array, "B G"]
    offered: Int[Array, "B E"]
