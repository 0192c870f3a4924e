"""Replay for trees of one or several drafts, on answers that the target wrote once (see `replay.py`).

This is the decoding loop with the target looked up instead of computed: its choice at a node is the text's next token, and its
hidden states were stored when it read the text. With trees, the text equals plain decoding's at every temperature
(`decoding.tree`), so the counts are exactly the decoder's at every temperature.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jsfdd.base.mesh import map_over_devices, replicate, round_up_to_shards, shard_rows, to_host
from jsfdd.base.records import DraftShares, Generation
from jsfdd.data.batches import pad_rows
from jsfdd.decoding.drafting import draft_tree
from jsfdd.decoding.generate import commit, prepare_drafts, show_prompt, start, until_done
from jsfdd.decoding.prompts import bucket_width
from jsfdd.decoding.settings import DecodeSetup
from jsfdd.decoding.state import DecodeParams, DecodeState, Emitted
from jsfdd.decoding.tree import walk
from jsfdd.evaluation.acceptance import AcceptanceCounts, no_counts
from jsfdd.evaluation.replay import Recorded
from jsfdd.evaluation.shares import no_shares
from jsfdd.models.attention import empty_cache
from jsfdd.training.batch import PerToken
from jsfdd.weights.target import Target


class Text(NamedTuple):
    """Recorded texts of a batch, right-padded: `starts` prompt tokens, then the answer. Start 0 marks a padding row."""

    tokens: Int[Array, "B T"]
    hidden: Float[Array, "B T S"]
    starts: Int[Array, " B"]


@functools.lru_cache(maxsize=8)
def _make_replay_step(setup: DecodeSetup, mesh: Mesh):
    return map_over_devices(lambda params, text: _replay(setup, params, text), mesh)


def make_tree_replay(
    target: Target, hidden: PerToken, recorded: Recorded, setup: DecodeSetup, mesh: Mesh, batch_size: int = 16
) -> Callable[[Sequence[dict]], tuple[AcceptanceCounts, DraftShares]]:
    """Make `replay(draft_params)`, which returns the counts that decoding with `setup` would give, by prompt and by draft.

    Args:
      hidden: the target's hidden states of the samples, by id, with the streams that the drafts read in front, if any; float32.
      setup: with a tree of a depth up to `recorded.ahead`, and max_new_tokens up to the recorded one.
      batch_size: texts per batch.

    Raises:
      ValueError: `setup` has no tree, or goes beyond what was recorded.
    """
    if setup.tree is None or setup.num_draft_tokens > recorded.ahead or setup.max_new_tokens > recorded.max_new_tokens:
        raise ValueError(
            f"a tree of depth {setup.num_draft_tokens if setup.tree else None} and {setup.max_new_tokens} new tokens cannot be "
            f"replayed: the recorded answers have {recorded.max_new_tokens} tokens and allow depths up to {recorded.ahead}"
        )
    run = _make_replay_step(setup, mesh)
    frozen = replicate({name: value for name, value in target.params.items() if name != "layers"}, mesh)
    batches = list(_batches(hidden, recorded, round_up_to_shards(batch_size, mesh), mesh))

    def replay(draft_params: Sequence[dict]) -> tuple[AcceptanceCounts, DraftShares]:
        size = int(recorded.prompts.max()) + 1
        counts, shares = no_counts(size, setup.num_draft_tokens), no_shares(size, len(setup.drafts))
        params = DecodeParams(frozen, stepping={}, drafts=prepare_drafts(draft_params, frozen, mesh))
        for texts, batch in batches:
            out = to_host(run(params, batch))
            for total, rows in zip((*counts, *shares), (*out.stats, *out.shares)):
                np.add.at(total, recorded.prompts[texts], rows[: len(texts)])
        return counts, shares

    return replay


def _batches(hidden: PerToken, recorded: Recorded, batch_size: int, mesh: Mesh):
    """Yield (sample numbers, Text) for batches of texts of the same padded width."""
    widths = np.array([bucket_width(len(sample.tokens)) for sample in recorded.samples])
    for width in np.unique(widths):
        rows = np.flatnonzero(widths == width)
        for begin in range(0, len(rows), batch_size):
            numbers = rows[begin : begin + batch_size]
            samples, shape = [recorded.samples[i] for i in numbers], (batch_size, int(width))
            starts = np.zeros(batch_size, np.int32)
            starts[: len(samples)] = [np.argmax(sample.assistant_mask) for sample in samples]
            tokens = pad_rows([sample.tokens for sample in samples], shape)
            states = pad_rows([np.asarray(hidden[sample.id], np.float32) for sample in samples], shape)
            yield numbers, shard_rows(Text(tokens, states, starts), mesh)


def _replay(setup: DecodeSetup, params: DecodeParams, text: Text) -> Generation:
    """`generate.decode_prompts`, with the target's outputs looked up."""
    rows, width = text.tokens.shape
    first = text.tokens[jnp.arange(rows), text.starts]
    # The loop needs only the length of the target's cache, so the cache has no slots.
    lengths = empty_cache(setup.target, rows, 0, jnp.float32)._replace(length=text.starts)
    keys = jax.random.split(jax.random.key(0), rows)  # unused: nothing is sampled
    state = start(setup, first, text.starts, lengths, keys)
    next_tokens = jnp.roll(text.tokens, -1, axis=1)
    state = show_prompt(setup, params, state, text.hidden, next_tokens, setup.cache_slots(width))
    return until_done(setup, state, lambda state: _step(setup, params, state, text))


def _step(setup: DecodeSetup, params: DecodeParams, state: DecodeState, text: Text) -> tuple[DecodeState, Emitted]:
    """`generate.speculative_step` for a tree, with the target's outputs looked up."""
    tree, proposers, state = draft_tree(setup, params, state)
    rows, last = jnp.arange(text.starts.shape[0]), state.target_cache.length

    def choose(level, _):
        return text.tokens[rows, last + 1 + level]

    path = walk(tree, setup.num_draft_tokens, tree.tokens, choose)
    ahead = jnp.arange(setup.num_draft_tokens + 1)
    hidden = text.hidden[rows[:, None], last[:, None] + ahead[None, :]]
    return commit(setup, params, state, path, proposers, hidden, state.target_cache)
