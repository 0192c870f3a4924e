"""The decoding loop: prefill, then propose, verify and commit until every row has stopped.

The life of a step. A row has committed tokens x_0 … x_c. The target cache holds x_0 … x_{c−1}; the draft cache holds the
pairs (h_t, x_{t+1}) for t < c; `draft_hidden` is the draft's output at the last pair, its guess of h_c.

    propose  q_1 = head(draft_hidden) gives d_1; the draft then reads its own guesses (ĥ_c, d_1), … for d_2 … d_G
    verify   the target reads x_c, d_1 … d_G in one forward pass: hidden h_c … h_{c+G} and p_0 … p_G
    commit   a accepted tokens and one more from the target; both caches keep a+1 of their new slots
    observe  the draft reads the pairs again with the *true* hidden states, ready for the next step

Rolling back a rejected tail is lowering a length: nothing is copied. Without a draft G is 0, propose and observe fall
away, and the same loop is plain autoregressive decoding: the baseline that every speedup is measured against.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jsfdd.decoding.verify import draw, verify
from jsfdd.mesh import map_over_devices
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.draft import Draft, DraftConfig
from jsfdd.models.layers import cached_view, empty_cache
from jsfdd.models.target import decode, embed_tokens, head_logits, unstack_layers
from jsfdd.records import DecodeStats, Generation, KVCache


@dataclasses.dataclass(frozen=True)
class DecodeSetup:
    """All that is fixed at compile time. `draft=None` (then `num_draft_tokens` must be 0) decodes autoregressively."""

    target: DecoderConfig
    draft: DraftConfig | None
    num_draft_tokens: int  # G
    max_new_tokens: int
    stop_tokens: tuple[int, ...]

    def __post_init__(self):
        if (self.draft is None) != (self.num_draft_tokens == 0):
            raise ValueError(f"num_draft_tokens={self.num_draft_tokens} with draft={self.draft}: both or neither")

    def cache_slots(self, prompt_length: int) -> int:
        """Slots for a prompt bucket, its answer, and the draft tokens of a last step that starts one token short."""
        return prompt_length + self.max_new_tokens + self.num_draft_tokens + 1


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
    first = draw(_keys_at(batch.keys, batch.lengths), logits, temperature)
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
    rows, depth = state.done.shape[0], setup.num_draft_tokens
    keys = _keys_at(state.keys, state.target_cache.length + 1)
    draft_tokens, draft_logits, draft_cache = _propose(setup, params, state, keys, temperature)

    block = jnp.concatenate([state.last_token[:, None], draft_tokens], axis=1)
    view = cached_view(state.target_cache, depth + 1)
    hidden, target_cache = decode(setup.target, params["stepping"], block, view, state.target_cache)
    target_logits = head_logits(setup.target, params["target"], hidden)
    verdict = verify(_purpose(keys, depth), draft_tokens, draft_logits, target_logits, temperature)

    # The emitted tokens: accepted ones, then the target's own, up to a stop token.
    row, column = jnp.arange(rows), jnp.arange(depth + 1)[None, :]
    tokens = jnp.concatenate([draft_tokens, verdict.next_token[:, None]], axis=1)
    tokens = tokens.at[row, verdict.num_accepted].set(verdict.next_token)
    stops = _is_stop(setup, tokens) & (column <= verdict.num_accepted[:, None])
    stopped = jnp.any(stops, axis=1)
    count = jnp.where(stopped, jnp.argmax(stops, axis=1), verdict.num_accepted) + 1
    count = jnp.where(state.done, 0, count)
    accepted = jnp.minimum(verdict.num_accepted, count)
    # The verdict at depth accepted+1 is known unless a stop token came first or the chain was at its end.
    verified = jnp.where(count > verdict.num_accepted, jnp.minimum(accepted + 1, depth), accepted)
    emitted = Emitted(tokens, count, accepted, jnp.where(state.done, 0, verified), ~state.done)

    num_generated = state.num_generated + count
    state = state._replace(
        generated=_write_rows(state.generated, tokens, state.num_generated, state.done),
        num_generated=num_generated,
        last_token=jnp.where(state.done, state.last_token, verdict.next_token),
        done=state.done | stopped | (num_generated >= setup.max_new_tokens),
        target_cache=target_cache._replace(length=state.target_cache.length + count),
    )
    if setup.draft is not None:
        state = _observe(setup, params, state._replace(draft_cache=draft_cache), hidden, tokens, count)
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


def _propose(setup: DecodeSetup, params: dict, state: DecodeState, keys, temperature):
    """G draft tokens int32[B,G], the logits they were drawn from [B,G,V], and the draft cache they were written to."""
    rows = state.done.shape[0]
    if setup.draft is None:
        empty = jnp.zeros((rows, 0, setup.target.vocab_size), jnp.float32)
        return jnp.zeros((rows, 0), jnp.int32), empty, None

    def draw_at(depth, hidden):
        logits = head_logits(setup.target, params["target"], hidden)
        return draw(_purpose(keys, depth), logits, temperature), logits

    def deeper(carry, depth):
        hidden, token, cache = carry
        hidden, cache = _draft_forward(setup, params, cache, hidden[:, None], token[:, None])
        cache = cache._replace(length=cache.length + 1)
        token, logits = draw_at(depth, hidden[:, 0])
        return (hidden[:, 0], token, cache), (token, logits)

    first, first_logits = draw_at(0, state.draft_hidden)
    carry = (state.draft_hidden, first, state.draft_cache)
    (_, _, cache), (tokens, logits) = jax.lax.scan(deeper, carry, jnp.arange(1, setup.num_draft_tokens))
    tokens = jnp.concatenate([first[None], tokens]).swapaxes(0, 1)
    logits = jnp.concatenate([first_logits[None], logits]).swapaxes(0, 1)
    return tokens, logits, cache._replace(length=state.draft_cache.length)


def _observe(setup: DecodeSetup, params: dict, state: DecodeState, hidden, next_tokens, count) -> DecodeState:
    """Show the draft the true pairs (hidden[:, i], next_tokens[:, i]), i < count; it keeps its output at the last one."""
    output, cache = _draft_forward(setup, params, state.draft_cache, hidden, next_tokens)
    rows = jnp.arange(count.shape[0])
    last = output[rows, jnp.maximum(count - 1, 0)]
    if state.draft_hidden is not None:  # after prefill there is nothing older to keep
        last = jnp.where((count > 0)[:, None], last, state.draft_hidden)
    return state._replace(draft_cache=cache._replace(length=cache.length + count), draft_hidden=last)


def _draft_forward(setup: DecodeSetup, params: dict, cache: KVCache, hidden, tokens):
    """The draft over pairs (hidden [B,T,D], tokens int[B,T]) that continue its cache."""
    embedding = embed_tokens(setup.target, params["target"], tokens)
    return Draft(setup.draft).apply(
        {"params": params["draft"]}, embedding, hidden, cached_view(cache, tokens.shape[1]), cache, method="decode"
    )


def _keys_at(keys, position):
    """Each row's key for the verification that decides the token at `position`: no two steps share one."""
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
