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

Several drafts (`ensemble.py`) are one more way to propose a tree: each does its part of a step as if it were the only one
(`drafting.py`), with a cache of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jsfdd.base.mesh import map_over_devices
from jsfdd.base.records import DecodeStats, DraftShares, Generation, KVCache
from jsfdd.decoding.drafting import Proposed, draft_forward, next_logits, observe, propose
from jsfdd.decoding.ensemble import Choices, no_choices
from jsfdd.decoding.state import DecodeSetup, DecodeState, Emitted, PromptBatch
from jsfdd.decoding.tree import Path, keep_path, tree_view, walk
from jsfdd.decoding.verify import draw, verify
from jsfdd.models.attention import cached_view, empty_cache
from jsfdd.models.target import decode, head_logits, unstack_layers


def prepare_params(target_params: dict, draft_params: dict | tuple[dict, ...] | None = None) -> dict:
    """{"target": for prompts, "stepping": the target again, for steps of few rows, "draft": if there is one or are several}.

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
        num_generated=jnp.minimum(batch.lengths, 1),  # a row that only fills the batch stays empty
        last_token=first,
        done=(batch.lengths == 0) | _is_stop(setup, first) | (setup.max_new_tokens <= 1),
        target_cache=cache._replace(length=batch.lengths),
        draft_cache=None,
        draft_hidden=None,
        keys=batch.keys,
    )
    if setup.draft is None:
        return state
    next_tokens = jnp.roll(batch.tokens, -1, axis=1).at[row, last].set(first)
    return show_prompt(setup, params, state, hidden, next_tokens, setup.cache_slots(width))


def show_prompt(setup: DecodeSetup, params: dict, state: DecodeState, hidden, next_tokens, slots: int) -> DecodeState:
    """The state with draft caches of so many slots, of drafts that were shown all pairs up to the answer's first token."""
    rows, dtype = state.done.shape[0], params["target"]["norm"]["scale"].dtype
    caches = tuple(empty_cache(draft.decoder, rows, slots, dtype) for draft in setup.drafts)
    if setup.combine is None:
        state = state._replace(draft_cache=caches[0])
    else:
        state = state._replace(draft_cache=caches, draft_hidden=(None,) * len(caches))
    state = observe(setup, params, state, hidden, next_tokens, state.target_cache.length)
    return state._replace(choices=no_choices(setup.combine, rows, len(caches)))


def speculative_step(
    setup: DecodeSetup, params: dict, state: DecodeState, temperature: Float[Array, ""]
) -> tuple[DecodeState, Emitted]:
    """One verification: (state) -> (state, what was emitted). Rows that are done stay as they are."""
    chain = setup.draft is not None and setup.tree is None
    return commit(setup, params, state, (_chain_round if chain else _tree_round)(setup, params, state, temperature))


def commit(setup: DecodeSetup, params: dict, state: DecodeState, round_: Round) -> tuple[DecodeState, Emitted]:
    """The state after a round, and what it emitted. Rows that are done stay as they are."""
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
    verified = jnp.where(state.done, 0, verified)
    emitted = Emitted(tokens, count, accepted, verified, ~state.done, round_.proposers, round_.offered)

    num_generated = state.num_generated + count
    state = state._replace(
        generated=_write_rows(state.generated, tokens, state.num_generated, state.done),
        num_generated=num_generated,
        last_token=jnp.where(state.done, state.last_token, next_token),
        done=state.done | stopped | (num_generated >= setup.max_new_tokens),
        target_cache=round_.target_cache._replace(length=state.target_cache.length + count),
        draft_cache=round_.draft_cache,
        choices=round_.choices,
    )
    if setup.draft is not None:
        state = observe(setup, params, state, round_.hidden, tokens, count)
    return state, emitted


def generate(setup: DecodeSetup, params: dict, batch: PromptBatch, temperature: Float[Array, ""]) -> Generation:
    """Whole answers: prefill, then steps until every row is done, as one program."""
    state = prefill(setup, params, batch, temperature)
    return until_done(setup, state, lambda state: speculative_step(setup, params, state, temperature))


def until_done(
    setup: DecodeSetup, state: DecodeState, take_step: Callable[[DecodeState], tuple[DecodeState, Emitted]]
) -> Generation:
    """Steps until every row is done."""
    rows, depth = state.done.shape[0], setup.num_draft_tokens
    stats = DecodeStats(
        accept_counts=jnp.zeros((rows, depth + 1), jnp.int32),
        reached=jnp.zeros((rows, depth), jnp.int32),
        accepted=jnp.zeros((rows, depth), jnp.int32),
    )
    nothing = jnp.zeros((rows, len(setup.drafts)), jnp.int32)
    shares = DraftShares(nothing, nothing) if setup.combine else None

    def step(carry):
        state, stats, shares = carry
        state, emitted = take_step(state)
        return state, count_step(stats, emitted), count_shares(shares, emitted) if setup.combine else None

    carry = (state, stats, shares)
    state, stats, shares = jax.lax.while_loop(lambda carry: ~jnp.all(carry[0].done), step, carry)
    lengths = jnp.minimum(state.num_generated, setup.max_new_tokens)
    return Generation(state.generated[:, : setup.max_new_tokens], lengths, stats, shares)


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


def count_shares(shares: DraftShares, emitted: Emitted) -> DraftShares:
    """Add one step of several drafts to their shares."""
    drafts, level = jnp.arange(shares.offered.shape[1]), jnp.arange(emitted.proposers.shape[1])
    accepted = level[None, :, None] < emitted.accepted[:, None, None]
    own = (emitted.proposers[:, :, None] == drafts[None, None, :]) & accepted
    return DraftShares(
        offered=shares.offered + jnp.where(emitted.active[:, None], emitted.offered, 0),
        accepted=shares.accepted + jnp.sum(own, axis=1, dtype=jnp.int32),
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


class Round(NamedTuple):
    """One proposal and its verification, chain or tree. `tokens[:, :num_accepted + 1]` are the target's own choice.

    `num_judged` draft depths were judged; `hidden` are the target's at the last committed and the accepted tokens. Both
    caches have their old length; the accepted tokens' slots follow it. Of several drafts the rest is as in `Emitted`.
    """

    tokens: Int[Array, "B G1"]
    num_accepted: Int[Array, " B"]
    num_judged: Int[Array, " B"]
    hidden: Float[Array, "B G1 D"]
    target_cache: KVCache
    draft_cache: KVCache | tuple[KVCache, ...] | None
    proposers: Int[Array, "B G"] | None = None
    offered: Int[Array, "B E"] | None = None
    choices: Choices | None = None


def _chain_round(setup: DecodeSetup, params: dict, state: DecodeState, temperature) -> Round:
    """G draft tokens, each drawn from q after the one before it, judged by speculative sampling."""
    depth = setup.num_draft_tokens
    keys = _keys_at(state.keys, state.target_cache.length + 1)

    def draw_at(number, hidden):
        logits = next_logits(setup, params, hidden)
        return draw(_purpose(keys, number), logits, temperature, setup.cutoff), logits

    def deeper(carry, number):
        hidden, token, cache = carry
        view = cached_view(cache, 1)
        hidden, cache = draft_forward(setup, params, cache, view, hidden[:, None], token[:, None])
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
    return Round(
        tokens, verdict.num_accepted, judged, hidden, target_cache, draft_cache._replace(length=state.draft_cache.length)
    )


def _tree_round(setup: DecodeSetup, params: dict, state: DecodeState, temperature) -> Round:
    """A tree of the draft's best guesses, or without a draft its root alone; the target's own choices lead through it."""
    proposed = propose(setup, params, state)
    tree = proposed.tree
    view = tree_view(state.target_cache, tree)
    hidden, target_cache = decode(setup.target, params["stepping"], tree.tokens, view, state.target_cache)
    logits = head_logits(setup.target, params["target"], hidden)

    def choose(level, logits):
        return draw(_keys_at(state.keys, state.target_cache.length + 1 + level), logits, temperature, setup.cutoff)

    path = walk(tree, setup.num_draft_tokens, logits, choose)
    if setup.draft is not None:
        hidden = jnp.take_along_axis(hidden, path.nodes[:, :, None], axis=1)
        target_cache = keep_path(target_cache, path.nodes)
    return round_along(setup, proposed, path, hidden, target_cache)


def round_along(setup: DecodeSetup, proposed: Proposed, path: Path, hidden, target_cache: KVCache) -> Round:
    """The round in which the target took `path` through what was proposed."""
    judged = path.num_accepted + path.went_on
    round_ = Round(path.tokens, path.num_accepted, judged, hidden, target_cache, proposed.draft_cache)
    if setup.combine is None:
        return round_
    drafts = jnp.arange(len(setup.draft))[None, None, :]
    return round_._replace(
        proposers=jnp.take_along_axis(proposed.proposers, path.nodes[:, 1:], axis=1),
        offered=jnp.sum(proposed.proposers[:, 1:, None] == drafts, axis=1, dtype=jnp.int32),
        choices=proposed.choices,
    )


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
