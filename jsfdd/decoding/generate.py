"""The decoding loop: prefill, then propose, verify and commit until every row has stopped.

The life of a step. A row has committed tokens x_0 … x_c. The target cache holds x_0 … x_{c−1}; the draft cache holds the
pairs (h_t, x_{t+1}) for t < c; `draft_hidden` is the draft's output at the last pair, its guess of h_c.

    propose  q_1 = head(draft_hidden) gives d_1; the draft then reads its own guesses (ĥ_c, d_1), … for d_2 … d_G
    verify   the target reads x_c, d_1 … d_G in one forward pass: hidden h_c … h_{c+G} and p_0 … p_G
    commit   a accepted tokens and one more from the target; both caches keep a+1 of their new slots
    observe  the draft reads the pairs again with the *true* hidden states, ready for the next step

Draft tokens are a chain (`_chain_round`), sampled from q and judged by speculative sampling, or a tree (`_tree_round`), the
draft's best guesses among which the target's own choice is looked up. Rolling back a rejected tail is lowering a length;
of a tree the accepted path is first moved together. Without a draft the tree is its root, observe falls away, and the
same loop is plain autoregressive decoding: the baseline that every speedup is measured against.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jsfdd.decoding.tree import Tree, TreeShape, grow, keep_path, rerank, root_only, tree_view, walk
from jsfdd.decoding.verify import EVERY_TOKEN, Cutoff, draw, verify
from jsfdd.mesh import map_over_devices
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.draft import Draft, DraftConfig
from jsfdd.models.layers import View, cached_view, empty_cache
from jsfdd.models.target import decode, embed_tokens, head_logits, unstack_layers
from jsfdd.records import DecodeStats, Generation, KVCache


@dataclasses.dataclass(frozen=True)
class DecodeSetup:
    """All that is fixed at compile time. `draft=None` (then `num_draft_tokens` must be 0) decodes autoregressively."""

    target: DecoderConfig
    draft: DraftConfig | None
    num_draft_tokens: int  # G: of a chain, or the depth of a tree
    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    tree: TreeShape | None = None  # None proposes a chain
    cutoff: Cutoff = EVERY_TOKEN

    def __post_init__(self):
        if (self.draft is None) != (self.num_draft_tokens == 0):
            raise ValueError(f"num_draft_tokens={self.num_draft_tokens} with draft={self.draft}: both or neither")
        if self.tree and self.tree.depth != self.num_draft_tokens:
            raise ValueError(f"num_draft_tokens={self.num_draft_tokens} with a tree of depth {self.tree.depth}")
        for name, top_k in (("tree's top-k", self.tree.top_k if self.tree else 0), ("top-k", self.cutoff.top_k)):
            if top_k > self.target.vocab_size:
                raise ValueError(f"{name} {top_k} exceeds the vocabulary of {self.target.vocab_size} tokens")
        if self.tree and self.draft.vocabulary and self.tree.top_k > len(self.draft.vocabulary):
            size = len(self.draft.vocabulary)
            raise ValueError(f"tree's top-k {self.tree.top_k} exceeds the draft's vocabulary of {size} tokens")

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
    draft_cache: KVCache | None
    draft_hidden: Float[Array, "B D"] | None
    keys: Key[Array, " B"]


class Emitted(NamedTuple):
    """What one step did, for counting and streaming: row b emitted `tokens[b, :count[b]]`.

    `accepted` of them came from the draft; `verified` draft depths were judged (fewer than G where a stop token ended the
    answer before the verdict was reached); `active` rows were not done before the step.
    """

    tokens: Int[Array, "B G1"]
    count: Int[Array, " B"]
    accepted: Int[Array, " B"]
    verified: Int[Array, " B"]
    active: Bool[Array, " B"]


def prepare_params(target_params: dict, draft_params: dict | None = None) -> dict:
    """{"target": for prompts, "stepping": the target again, for steps of few rows, "draft": if there is one}.

    Prompts and steps want different layouts on a CPU (see `unstack_layers`); elsewhere both names are one tree.
    """
    stepping = unstack_layers(target_params) if jax.default_backend() == "cpu" else target_params
    params = {"target": target_params, "stepping": stepping}
    return params if draft_params is None else params | {"draft": draft_params}


def prefill(setup: DecodeSetup, params: dict, batch: PromptBatch, temperature: Float[Array, ""]) -> DecodeState:
    """Read the prompts, draw each row's first token from the target, and show the draft all true pairs."""
    rows, width = batch.tokens.shape
    dtype = params["target"]["norm"]["scale"].dtype
    cache = empty_cache(setup.target, rows, setup.cache_slots(width), dtype)
    hidden, cache = decode(setup.target, params["target"], batch.tokens, cached_view(cache, width), cache)
    row, last = jnp.arange(rows), jnp.maximum(batch.lengths - 1, 0)
    logits = head_logits(setup.target, params["target"], hidden[row, last])
    first = draw(_keys_at(batch.keys, batch.lengths), logits, temperature, setup.cutoff)
    generated = jnp.zeros((rows, setup.max_new_tokens + setup.num_draft_tokens + 1), jnp.int32).at[:, 0].set(first)
    state = DecodeState(
        generated=generated,
        num_generated=jnp.ones_like(batch.lengths),
        last_token=first,
        done=(batch.lengths == 0) | _is_stop(setup, first) | (setup.max_new_tokens <= 1),
        target_cache=cache._replace(length=batch.lengths),
        draft_cache=None,
        draft_hidden=None,
        keys=batch.keys,
    )
    if setup.draft is None:
        return state
    draft_cache = empty_cache(setup.draft.decoder, rows, setup.cache_slots(width), dtype)
    next_tokens = jnp.roll(batch.tokens, -1, axis=1).at[row, last].set(first)
    return _observe(setup, params, state._replace(draft_cache=draft_cache), hidden, next_tokens, batch.lengths)


def speculative_step(
    setup: DecodeSetup, params: dict, state: DecodeState, temperature: Float[Array, ""]
) -> tuple[DecodeState, Emitted]:
    """One verification: (state) -> (state, what was emitted). Rows that are done stay as they are."""
    chain = setup.draft is not None and setup.tree is None
    round_ = (_chain_round if chain else _tree_round)(setup, params, state, temperature)

    # The emitted tokens: accepted ones, then the target's own, up to a stop token.
    row, column = jnp.arange(state.done.shape[0]), jnp.arange(setup.num_draft_tokens + 1)[None, :]
    tokens, next_token = round_.tokens, round_.tokens[row, round_.num_accepted]
    stops = _is_stop(setup, tokens) & (column <= round_.num_accepted[:, None])
    stopped = jnp.any(stops, axis=1)
    count = jnp.where(stopped, jnp.argmax(stops, axis=1), round_.num_accepted) + 1
    count = jnp.where(state.done, 0, count)
    accepted = jnp.minimum(round_.num_accepted, count)
    # Where a stop token came first, what lies behind it was not judged.
    verified = jnp.where(count > round_.num_accepted, round_.num_judged, accepted)
    emitted = Emitted(tokens, count, accepted, jnp.where(state.done, 0, verified), ~state.done)

    num_generated = state.num_generated + count
    state = state._replace(
        generated=_write_rows(state.generated, tokens, state.num_generated, state.done),
        num_generated=num_generated,
        last_token=jnp.where(state.done, state.last_token, next_token),
        done=state.done | stopped | (num_generated >= setup.max_new_tokens),
        target_cache=round_.target_cache._replace(length=state.target_cache.length + count),
    )
    if setup.draft is not None:
        state = _observe(setup, params, state._replace(draft_cache=round_.draft_cache), round_.hidden, tokens, count)
    return state, emitted


def generate(setup: DecodeSetup, params: dict, batch: PromptBatch, temperature: Float[Array, ""]) -> Generation:
    """Whole answers: prefill, then steps until every row is done, as one program."""
    state = prefill(setup, params, batch, temperature)
    rows, depth = state.done.shape[0], setup.num_draft_tokens
    stats = DecodeStats(
        accept_counts=jnp.zeros((rows, depth + 1), jnp.int32),
        reached=jnp.zeros((rows, depth), jnp.int32),
        accepted=jnp.zeros((rows, depth), jnp.int32),
    )

    def step(carry):
        state, stats = carry
        state, emitted = speculative_step(setup, params, state, temperature)
        return state, count_step(stats, emitted)

    state, stats = jax.lax.while_loop(lambda carry: ~jnp.all(carry[0].done), step, (state, stats))
    lengths = jnp.where(batch.lengths == 0, 0, jnp.minimum(state.num_generated, setup.max_new_tokens))
    return Generation(state.generated[:, : setup.max_new_tokens], lengths, stats)


def count_step(stats: DecodeStats, emitted: Emitted) -> DecodeStats:
    """Add one step to the counts. A step cut short by a stop token counts the draft tokens before and at it."""
    depth = stats.reached.shape[1]
    histogram = (jnp.arange(depth + 1)[None, :] == emitted.accepted[:, None]) & emitted.active[:, None]
    level = jnp.arange(depth)[None, :]
    return DecodeStats(
        accept_counts=stats.accept_counts + histogram,
        reached=stats.reached + (level < emitted.verified[:, None]),
        accepted=stats.accepted + ((level < emitted.accepted[:, None]) & emitted.active[:, None]),
    )


def make_generate(setup: DecodeSetup, mesh: Mesh) -> Callable[[tuple[dict, Any], PromptBatch], Generation]:
    """Compile `generate((params, temperature), batch)`: rows split over devices, each device stopping by itself.

    `params` is what `prepare_params` returns. A new (B, P) shape compiles anew.
    """

    def run(everywhere, batch):
        params, temperature = everywhere
        return generate(setup, params, batch, temperature)

    return map_over_devices(run, mesh)


def make_stream(setup: DecodeSetup):
    """Compile (prefill, step) for text that is shown while it is decoded: one call a step, the state donated."""

    def start(params, batch, temperature):
        return prefill(setup, params, batch, temperature)

    def step(params, state, temperature):
        return speculative_step(setup, params, state, temperature)

    return jax.jit(start), jax.jit(step, donate_argnames=("state",))


class _Round(NamedTuple):
    """One proposal and its verification, chain or tree. `tokens[:, :num_accepted + 1]` are the target's own choice.

    `num_judged` draft depths were judged; `hidden` are the target's at the last committed and the accepted tokens. Both
    caches have their old length; the accepted tokens' slots follow it.
    """

    tokens: Int[Array, "B G1"]
    num_accepted: Int[Array, " B"]
    num_judged: Int[Array, " B"]
    hidden: Float[Array, "B G1 D"]
    target_cache: KVCache
    draft_cache: KVCache | None


def _chain_round(setup: DecodeSetup, params: dict, state: DecodeState, temperature) -> _Round:
    """G draft tokens, each drawn from q after the one before it, judged by speculative sampling."""
    depth = setup.num_draft_tokens
    keys = _keys_at(state.keys, state.target_cache.length + 1)

    def draw_at(number, hidden):
        logits = _draft_logits(setup, params, hidden)
        return draw(_purpose(keys, number), logits, temperature, setup.cutoff), logits

    def deeper(carry, number):
        hidden, token, cache = carry
        view = cached_view(cache, 1)
        hidden, cache = _draft_forward(setup, params, cache, view, hidden[:, None], token[:, None])
        cache = cache._replace(length=cache.length + 1)
        token, logits = draw_at(number, hidden[:, 0])
        return (hidden[:, 0], token, cache), (token, logits)

    first, first_logits = draw_at(0, state.draft_hidden)
    carry = (state.draft_hidden, first, state.draft_cache)
    (_, _, draft_cache), (tokens, logits) = jax.lax.scan(deeper, carry, jnp.arange(1, depth))
    draft_tokens = jnp.concatenate([first[None], tokens]).swapaxes(0, 1)
    draft_logits = jnp.concatenate([first_logits[None], logits]).swapaxes(0, 1)

    block = jnp.concatenate([state.last_token[:, None], draft_tokens], axis=1)
    view = cached_view(state.target_cache, depth + 1)
    hidden, target_cache = decode(setup.target, params["stepping"], block, view, state.target_cache)
    target_logits = head_logits(setup.target, params["target"], hidden)
    verdict = verify(_purpose(keys, depth), draft_tokens, draft_logits, target_logits, temperature, setup.cutoff)
    tokens = jnp.concatenate([draft_tokens, verdict.next_token[:, None]], axis=1)
    tokens = tokens.at[jnp.arange(tokens.shape[0]), verdict.num_accepted].set(verdict.next_token)
    judged = jnp.minimum(verdict.num_accepted + 1, depth)
    return _Round(
        tokens, verdict.num_accepted, judged, hidden, target_cache, draft_cache._replace(length=state.draft_cache.length)
    )


def _tree_round(setup: DecodeSetup, params: dict, state: DecodeState, temperature) -> _Round:
    """A tree of the draft's best guesses, or without a draft its root alone; the target's own choices lead through it."""
    tree, draft_cache = root_only(state.last_token), None
    if setup.draft is not None:
        tree, draft_cache = _grow_tree(setup, params, state)
    view = tree_view(state.target_cache, tree)
    hidden, target_cache = decode(setup.target, params["stepping"], tree.tokens, view, state.target_cache)
    logits = head_logits(setup.target, params["target"], hidden)

    def choose(level, logits):
        return draw(_keys_at(state.keys, state.target_cache.length + 1 + level), logits, temperature, setup.cutoff)

    path = walk(tree, setup.num_draft_tokens, logits, choose)
    if setup.draft is not None:
        hidden = jnp.take_along_axis(hidden, path.nodes[:, :, None], axis=1)
        target_cache = keep_path(target_cache, path.nodes)
    return _Round(path.tokens, path.num_accepted, path.num_accepted + path.went_on, hidden, target_cache, draft_cache)


def _grow_tree(setup: DecodeSetup, params: dict, state: DecodeState) -> tuple[Tree, KVCache]:
    """The draft's tree below the last committed token. Its probabilities are the draft's own, without a temperature."""

    def forward(cache, view, hidden, tokens):
        return _draft_forward(setup, params, cache, view, hidden, tokens)

    def log_probs(hidden):
        return jax.nn.log_softmax(_draft_logits(setup, params, hidden), axis=-1)

    proposals, cache = grow(setup.tree, state.draft_hidden, state.draft_cache, forward, log_probs)
    return rerank(setup.tree, proposals, state.last_token), cache


def _observe(setup: DecodeSetup, params: dict, state: DecodeState, hidden, next_tokens, count) -> DecodeState:
    """Show the draft the true pairs (hidden[:, i], next_tokens[:, i]), i < count; it keeps its output at the last one."""
    view = cached_view(state.draft_cache, next_tokens.shape[1])
    output, cache = _draft_forward(setup, params, state.draft_cache, view, hidden, next_tokens)
    rows = jnp.arange(count.shape[0])
    last = output[rows, jnp.maximum(count - 1, 0)]
    if state.draft_hidden is not None:  # after prefill there is nothing older to keep
        last = jnp.where((count > 0)[:, None], last, state.draft_hidden)
    return state._replace(draft_cache=cache._replace(length=cache.length + count), draft_hidden=last)


def _draft_forward(setup: DecodeSetup, params: dict, cache: KVCache, view: View, hidden, tokens):
    """The draft over pairs (hidden [B,T,D], tokens int[B,T]) that continue its cache, seeing what the view shows."""
    embedding = embed_tokens(setup.target, params["target"], tokens)
    return Draft(setup.draft).apply({"params": params["draft"]}, embedding, hidden, view, cache, method="decode")


def _draft_logits(setup: DecodeSetup, params: dict, hidden) -> Float[Array, "*shape V"]:
    """The draft's logits: the target's head, −inf where the draft has a vocabulary and a token is not in it."""
    if not setup.draft.vocabulary:
        return head_logits(setup.target, params["target"], hidden)
    tokens = np.array(setup.draft.vocabulary)
    logits = head_logits(setup.target, params["target"], hidden, tokens)
    return jnp.full((*logits.shape[:-1], setup.target.vocab_size), -jnp.inf).at[..., tokens].set(logits)


def _keys_at(keys, position):
    """Each row's key for the token at `position`: a chain's step splits it by purpose, all else draws that token with it."""
    return jax.vmap(jax.random.fold_in)(keys, position)


def _purpose(keys, number):
    """Independent keys within a step: numbers 0 … G−1 draw the draft tokens, G verifies them."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def _is_stop(setup: DecodeSetup, tokens):
    stops = jnp.asarray(setup.stop_tokens, jnp.int32)
    return jnp.any(jnp.expand_dims(tokens, -1) == stops.reshape((1,) * tokens.ndim + (-1,)), axis=-1)


def _write_rows(buffer, block, start, keep):
    """`block` written into each row of `buffer` at `start`; rows to `keep` stay. Slots past a row's count are free."""

    def write(row, new, at, keep_row):
        old = jax.lax.dynamic_slice(row, (at,), new.shape)
        return jax.lax.dynamic_update_slice(row, jnp.where(keep_row, old, new), (at,))

    return jax.vmap(write)(buffer, block, start, keep)
