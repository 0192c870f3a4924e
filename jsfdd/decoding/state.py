"""What the decoding loop is told, goes on with, and tells of each step."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key

from jsfdd.base.records import KVCache
from jsfdd.decoding.ensemble import Choices, Combine
from jsfdd.decoding.tree import TreeShape
from jsfdd.decoding.verify import EVERY_TOKEN, Cutoff
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.draft import DraftConfig


@dataclasses.dataclass(frozen=True)
class DecodeSetup:
    """All that is fixed at compile time. `draft=None` (then `num_draft_tokens` must be 0) decodes autoregressively.

    With `combine` there are several drafts: `draft`, the "draft" of the parameters, and a state's `draft_cache` and
    `draft_hidden` are then tuples with an item for each.
    """

    target: DecoderConfig
    draft: DraftConfig | tuple[DraftConfig, ...] | None
    num_draft_tokens: int  # G: of a chain, or the depth of a tree
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    tree: TreeShape | None = None  # None proposes a chain
    cutoff: Cutoff = EVERY_TOKEN
    combine: Combine | None = None

    def __post_init__(self):
        if (self.draft is None) != (self.num_draft_tokens == 0):
            raise ValueError(f"num_draft_tokens={self.num_draft_tokens} with draft={self.draft}: both or neither")
        if self.tree and self.tree.depth != self.num_draft_tokens:
            raise ValueError(f"num_draft_tokens={self.num_draft_tokens} with a tree of depth {self.tree.depth}")
        for name, top_k in (("tree's top-k", self.tree.top_k if self.tree else 0), ("top-k", self.cutoff.top_k)):
            if top_k > self.target.vocab_size:
                raise ValueError(f"{name} {top_k} exceeds the vocabulary of {self.target.vocab_size} tokens")
        if self.combine and not self.tree:
            raise ValueError(f"{self.combine.rule} needs a tree: chains are drawn, and no choice between them is lossless")
        for draft in self.drafts if self.tree else ():
            if draft.vocabulary and self.tree.top_k > (size := len(draft.vocabulary)):
                raise ValueError(f"tree's top-k {self.tree.top_k} exceeds the draft's vocabulary of {size} tokens")

    @property
    def drafts(self) -> tuple[DraftConfig, ...]:
        """However many there are."""
        if self.combine is not None:
            return self.draft
        return () if self.draft is None else (self.draft,)

    def cache_slots(self, prompt_length: int) -> int:
        """Slots for a prompt bucket, its answer, and the draft tokens of a last step that starts one token short."""
        nodes = max(self.tree.nodes + 1, self.tree.draft_slots) if self.tree else self.num_draft_tokens + 1
        return prompt_length + self.max_new_tokens + nodes


class PromptBatch(NamedTuple):
    """Right-padded prompts. A row of length 0 only fills the batch. One typed key a row: text depends on nothing else."""

    tokens: Int[Array, "B P"]
    lengths: Int[Array, " B"]
    keys: Key[Array, " B"]


class DecodeState(NamedTuple):
    """What the next step needs. `generated` has room for a last step that overshoots max_new_tokens."""

    generated: Int[Array, "B N"]
    num_generated: Int[Array, " B"]
    last_token: Int[Array, " B"]  # committed, but not yet read by the target
    done: Bool[Array, " B"]
    target_cache: KVCache
    draft_cache: KVCache | tuple[KVCache, ...] | None
    draft_hidden: Float[Array, "B D"] | tuple[Float[Array, "B D"], ...] | None
    keys: Key[Array, " B"]
    choices: Choices | None = None


class Emitted(NamedTuple):
    """What one step did, for counting and streaming: row b emitted `tokens[b, :count[b]]`.

    `accepted` of them came from the draft; `verified` draft depths were judged (fewer than G where a stop token ended the
    answer before the verdict was reached); `active` rows were not done before the step. Of several drafts `proposers` says
    which proposed each token accepted, and `offered` how many of the verified draft tokens are counted for each.
    """

    tokens: Int[Array, "B G1"]
    count: Int[Array, " B"]
    accepted: Int[Array, " B"]
    verified: Int[Array, " B"]
    active: Bool[Array, " B"]
    proposers: Int[Array, "B G"] | None = None
    offered: Int[Array, "B E"] | None = None
