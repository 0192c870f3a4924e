"""Plain decoding that keeps what the target computes on the way: hidden states, scores, and the prompts' states.

    decode = make_recorded(setup, mesh, tail=(end_of_turn, newline), layers=(), dtype="bfloat16")
    out = decode(params, batch, temperature)                  # `Recorded`: what `make_generate` returns, and the rest

A step reads one token and so computes that token's hidden state and the distribution of the next. Scores are of that
distribution as it is, before temperature, top-k and top-p. When all rows are done, one more step reads each row's last token
and the tokens that the chat template writes after an answer, so that a whole conversation has its states.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jsfdd.base.mesh import map_over_devices
from jsfdd.base.records import DecodeStats, TokenScores
from jsfdd.decoding.generate import commit, start
from jsfdd.decoding.settings import DecodeSetup
from jsfdd.decoding.state import DecodeParams, DecodeState, PromptBatch
from jsfdd.decoding.tree import Path
from jsfdd.decoding.verify import draw, fold_in_rows
from jsfdd.models.attention import cached_view, causal_view, empty_cache
from jsfdd.models.target import decode, final_state, head_logits
from jsfdd.scoring.fast_scores import fast_token_scores
from jsfdd.scoring.prompt_state import prompt_states


class Recorded(NamedTuple):
    """Answers to a batch of prompts, with what the target computed. Row b's answer is `tokens[b, :lengths[b]]`.

    Attributes:
      tokens, lengths, stats: as in `Generation`.
      prompts: the prompts' states.
      prompt_hidden: hidden states of the prompts' tokens.
      hidden: of the answers' tokens but the last.
      tail_hidden: of an answer's last token and of the template's tokens after it.
      scores: at i those of the distribution after an answer's token i; 0 for the last token and beyond.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]
    stats: DecodeStats
    prompts: Float[Array, "B P"]
    prompt_hidden: Float[Array, "B T S"]
    hidden: Float[Array, "B N S"]
    tail_hidden: Float[Array, "B W S"]
    scores: TokenScores


@functools.lru_cache(maxsize=8)
def make_recorded(
    setup: DecodeSetup, mesh: Mesh, *, tail: tuple[int, ...], layers: tuple[int, ...], dtype: Literal["bfloat16", "float32"]
) -> Callable[[DecodeParams, PromptBatch, float], Recorded]:
    """Compile `(params, batch, temperature) -> Recorded`, like `generate.make_generate`.

    Args:
      setup: without drafts.
      tail: the tokens that the template writes after an answer, the end-of-turn token first.
      layers: the streams that enter these layers stand in front of the final state.
      dtype: of the hidden states.
    """
    if setup.drafts:
        raise ValueError("states are recorded in plain decoding; leave the drafts out")

    def run(arguments, batch):
        params, temperature = arguments
        return record(setup, params, batch, temperature, tail, layers, dtype)

    compiled = map_over_devices(run, mesh)
    return lambda params, batch, temperature: compiled((params, jnp.asarray(temperature, jnp.float32)), batch)


def record(
    setup: DecodeSetup,
    params: DecodeParams,
    batch: PromptBatch,
    temperature: Float[Array, ""],
    tail: tuple[int, ...],
    layers: tuple[int, ...],
    dtype,
) -> Recorded:
    """Decode whole answers, recording; one program."""
    (rows, width), longest = batch.tokens.shape, setup.max_new_tokens
    slots = setup.cache_slots(width) + len(tail)
    cache = empty_cache(setup.target, rows, slots, params.target["embed"]["embedding"].dtype)
    prompt_hidden, cache = decode(setup.target, params.target, batch.tokens, causal_view(rows, width), cache, layers)
    row, last = jnp.arange(rows), jnp.maximum(batch.lengths - 1, 0)
    final = final_state(setup.target, prompt_hidden)
    logits = head_logits(setup.target, params.target, final[row, last])
    first = draw(fold_in_rows(batch.keys, batch.lengths), logits, temperature, setup.cutoff)
    state = start(setup, first, batch.lengths, cache._replace(length=batch.lengths), batch.keys)
    hidden = jnp.zeros((rows, longest, prompt_hidden.shape[-1]), dtype)
    scores = TokenScores(*[jnp.zeros((rows, longest), jnp.float32) for _ in TokenScores._fields])

    def step(carry: tuple[DecodeState, Array, TokenScores]):
        state, hidden, scores = carry
        place = jnp.where(state.done, longest, state.num_generated - 1)  # of the token that is read; past the end to drop it
        view = cached_view(state.target_cache, 1)
        read, cache = decode(setup.target, params.stepping, state.last_token[:, None], view, state.target_cache, layers)
        logits = head_logits(setup.target, params.target, final_state(setup.target, read))[:, 0]
        keys = fold_in_rows(state.keys, state.target_cache.length + 1)
        chosen = draw(keys, logits, temperature, setup.cutoff)
        hidden = hidden.at[row, place].set(read[:, 0].astype(dtype), mode="drop")
        seen = fast_token_scores(logits, chosen)
        scores = jax.tree.map(lambda kept, new: kept.at[row, place].set(new, mode="drop"), scores, seen)
        nothing = jnp.zeros((rows, 1), jnp.int32)
        path = Path(nothing, chosen[:, None], nothing[:, 0], nothing[:, 0])
        state, _ = commit(setup, params, state, path, nothing, read, cache)
        return state, hidden, scores

    state, hidden, scores = jax.lax.while_loop(lambda carry: ~jnp.all(carry[0].done), step, (state, hidden, scores))
    end = tail_tokens(state.last_token, tail)
    view = cached_view(state.target_cache, end.shape[1])
    tail_hidden, _ = decode(setup.target, params.stepping, end, view, state.target_cache, layers)
    lengths = jnp.minimum(state.num_generated, longest)
    steps = jnp.maximum(lengths - 1, 0)
    none = jnp.zeros((rows, 0), jnp.int32)
    return Recorded(
        state.generated[:, :longest], lengths, DecodeStats(steps[:, None], none, none), prompt_states(final, batch.lengths),
        prompt_hidden.astype(dtype), hidden, tail_hidden.astype(dtype), scores,
    )  # fmt: skip


def tail_tokens(last: Int[Array, " B"], tail: tuple[int, ...]) -> Int[Array, "B W"]:
    """An answer's last token and what the template writes after it: all of `tail`, or what follows the end-of-turn token if
    that is the last. Filled up with 0."""
    whole = jnp.asarray([*tail, 0], jnp.int32)
    ended = last == whole[0] if tail else jnp.zeros(last.shape, bool)
    after = jnp.where(ended[:, None], whole[1:], whole[:-1]) if tail else jnp.zeros((*last.shape, 0), jnp.int32)
    return jnp.concatenate([last[:, None], after], axis=1)
