"""Settings of the decoding loop, fixed when it is compiled. This module imports nothing slow, for the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from jsfdd.models.architecture import DecoderConfig
    from jsfdd.models.draft import Draft, DraftConfig
    from jsfdd.weights.target import Target

CombineBy = Literal["average", "route", "merge"]
RouteBy = Literal["confidence", "entropy"]


@dataclasses.dataclass(frozen=True)
class Cutoff:
    """Which tokens may be sampled, fixed at compile time; by default all."""

    top_k: int = 0
    """Keep the k most probable tokens, and all that tie with the k-th; 0 keeps all."""
    top_p: float = 1.0
    """Of those, keep the smallest set with at least this probability, and all tokens that tie with its last one."""


EVERY_TOKEN = Cutoff()


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """The size of a draft tree: at most `depth` tokens deep, `top_k` children per node, `nodes` draft tokens in all.

    EAGLE-2's defaults are depth 5 to 7, top_k 10 and 60 nodes. `top_k=1` with `nodes=depth` is a greedy chain.
    """

    depth: int
    top_k: int
    nodes: int

    def __post_init__(self):
        if min(self.depth, self.top_k, self.nodes) < 1:
            raise ValueError(f"a tree of depth {self.depth}, top-k {self.top_k} and {self.nodes} nodes: all must be 1 or more")
        if self.nodes > self.num_proposals:
            raise ValueError(
                f"a tree of {self.nodes} nodes is larger than its depth allows: depth {self.depth} with top-k {self.top_k} "
                f"proposes {self.num_proposals} tokens; take fewer nodes, or a greater depth or top-k"
            )

    @property
    def num_proposals(self) -> int:
        """P, the number of proposals: top_k at the first level, top_k² at each deeper one."""
        return self.top_k + (self.depth - 1) * self.top_k**2

    @property
    def draft_slots(self) -> int:
        """Slots of the draft's cache that a growing tree needs: one for each node that the draft reads."""
        return (self.depth - 1) * self.top_k


@dataclasses.dataclass(frozen=True)
class Combine:
    """How several drafts decode together, fixed at compile time.

    Attributes:
      rule: "route" verifies the tree of one draft in each step; "merge" verifies all trees merged into one.
      route_by: how confidence is measured: the mean path probability of a draft's tree (TAPS), or the negative entropy of
        its distribution of the first token.
      route_steps: 0 chooses the draft anew in every step. K > 0 does so for K steps of an answer, then assigns the rest of
        it to the draft with the highest summed confidence.
    """

    rule: Literal["route", "merge"]
    route_by: RouteBy = "confidence"
    route_steps: int = 0


class Team(NamedTuple):
    """The drafts that decode together, by name: none, one or several. In a tie the earlier one wins."""

    drafts: Mapping[str, Draft]
    combine: Combine | None = None

    @property
    def configs(self) -> tuple[DraftConfig, ...]:
        """The drafts' shapes, in order."""
        return tuple(draft.config for draft in self.drafts.values())

    @property
    def params(self) -> tuple[dict, ...]:
        """The drafts' parameters, in order."""
        return tuple(draft.params for draft in self.drafts.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSetup:
    """All settings that are fixed at compile time.

    Attributes:
      target: the target's architecture.
      drafts: the drafts' shapes. Without any, decoding is plain, token by token; several need `combine`.
      num_draft_tokens: G, the length of a chain or the depth of a tree; 0 without a draft.
      max_new_tokens: the longest answer.
      stop_tokens: tokens that end an answer, as its last token.
      tree: verify trees of this shape; chains if None.
      cutoff: the tokens that may be sampled.
      combine: how several drafts decode together.

    Raises:
      ValueError: the settings contradict each other.
    """

    target: DecoderConfig
    drafts: tuple[DraftConfig, ...] = ()
    num_draft_tokens: int = 0
    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()
    tree: TreeShape | None = None
    cutoff: Cutoff = EVERY_TOKEN
    combine: Combine | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, but it must be 1 or more")
        if bool(self.drafts) != (self.num_draft_tokens > 0):
            raise ValueError(f"num_draft_tokens={self.num_draft_tokens} with {len(self.drafts)} drafts: both or neither")
        for number in self.layers:
            if number >= self.target.num_layers:
                raise ValueError(
                    f"a draft reads the input of layer {number}, and the target has {self.target.num_layers} layers"
                )
        if self.tree and self.tree.depth != self.num_draft_tokens:
            raise ValueError(f"num_draft_tokens={self.num_draft_tokens} with a tree of depth {self.tree.depth}")
        for name, top_k in (("tree's top-k", self.tree.top_k if self.tree else 0), ("top-k", self.cutoff.top_k)):
            if top_k > self.target.vocab_size:
                raise ValueError(f"{name} {top_k} exceeds the vocabulary of {self.target.vocab_size} tokens")
        if self.combine and not self.tree:
            raise ValueError(f"{self.combine.rule} needs a tree: chains are drawn, and no choice between them is lossless")
        if len(self.drafts) > 1 and not self.combine:
            raise ValueError(f"{len(self.drafts)} drafts, but `combine` does not say how they decode together")
        for draft in self.drafts if self.tree else ():
            if draft.vocabulary and self.tree.top_k > (size := len(draft.vocabulary)):
                raise ValueError(f"tree's top-k {self.tree.top_k} exceeds the draft's vocabulary of {size} tokens")

    @property
    def layers(self) -> tuple[int, ...]:
        """The target's layers whose inputs some draft reads, ascending: they stand in front of its hidden states."""
        return tuple(sorted({number for draft in self.drafts for number in draft.target_layers}))

    @property
    def is_chain(self) -> bool:
        """Whether a draft proposes one chain, sampled from its distribution."""
        return bool(self.drafts) and self.tree is None

    def cache_slots(self, prompt_length: int) -> int:
        """Cache slots for a padded prompt, its answer, and the draft tokens of a last step that starts one token short."""
        nodes = max(self.tree.nodes + 1, self.tree.draft_slots) if self.tree else self.num_draft_tokens + 1
        return prompt_length + self.max_new_tokens + nodes


def check_temperature(temperature: float) -> None:
    """Raise ValueError for a temperature below 0, which would turn the distribution round, or that is no number."""
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, but it must be 0 (greedy) or more")


def decode_setup(
    target: Target,
    drafts: Sequence[DraftConfig] = (),
    *,
    max_new_tokens: int,
    num_draft_tokens: int = 0,
    tree: TreeShape | None = None,
    cutoff: Cutoff = EVERY_TOKEN,
    combine: Combine | None = None,
) -> DecodeSetup:
    """Make the setup for a target and its drafts. Without drafts, the settings that only drafts use are dropped."""
    proposal = {"num_draft_tokens": num_draft_tokens, "tree": tree, "combine": combine} if drafts else {}
    return DecodeSetup(
        target=target.config,
        drafts=tuple(drafts),
        max_new_tokens=max_new_tokens,
        stop_tokens=target.stop_tokens,
        cutoff=cutoff,
        **proposal,
    )
