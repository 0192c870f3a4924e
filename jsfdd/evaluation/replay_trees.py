"""Trees on text that the target wrote once: `replay.py`'s idea for one draft's trees and for several drafts together.

The decoding loop itself, with a target that has nothing left to compute: its choice at every node is the text's own next token,
and its hidden states are those that it had when it read the text. A tree's text is plain decoding's own at every temperature
(`decoding.tree`), so the counts are the decoder's, to the last one, at every temperature too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jsfdd.base.mesh import map_over_devices, num_data_shards, replicate, shard_rows, to_host
from jsfdd.base.records import DraftShares, Generation
from jsfdd.data.batches import pad_rows
from jsfdd.decoding.drafting import propose
from jsfdd.decoding.generate import Round, commit, round_along, show_prompt, until_done
from jsfdd.decoding.prompts import bucket_width
from jsfdd.decoding.state import DecodeSetup, DecodeState
from jsfdd.decoding.tree import walk
from jsfdd.evaluation.acceptance import AcceptanceCounts
from jsfdd.evaluation.replay import Recorded
from jsfdd.evaluation.shares import no_shares
from jsfdd.models.attention import empty_cache
from jsfdd.training.batch import PerToken
from jsfdd.weights.target import Target


class Text(NamedTuple):
    """Recorded texts of a batch, right-padded: `starts` tokens of prompt, then the answer. A start of 0 only fills up."""

    tokens: Int[Array, "B T"]
    hidden: Float[Array, "B T D"]
    starts: Int[Array, " B"]


def make_tree_replay(
    target: Target, hidden: PerToken, recorded: Recorded, setup: DecodeSetup, mesh: Mesh, batch_size: int = 16
) -> Callable[[Any], tuple[AcceptanceCounts, DraftShares]]:
    """`replay(draft_params)`: what decoding by `setup` would count, by prompt; shares are empty but of several drafts.

    Args:
      hidden: the target's hidden states of the samples, by id; float32.
      setup: with a tree; its answers are at most as long as recorded ones, its depth is at most `recorded.ahead`.
      batch_size: texts at a time.

    Raises:
      ValueError: `setup` is of chains, or reaches further than what was recorded.
    """
    if setup.tree is None or setup.num_draft_tokens > recorded.ahead or setup.max_new_tokens > recorded.max_new_tokens:
        raise ValueError(
            f"a tree of depth {setup.num_draft_tokens if setup.tree else None} and {setup.max_new_tokens} new tokens: recorded "
            f"were answers of {recorded.max_new_tokens} tokens for depths up to {recorded.ahead}"
        )
    run = map_over_devices(lambda params, text: _replay(setup, params, text), mesh)
    frozen = replicate({name: each for name, each in target.params.items() if name != "layers"}, mesh)
    batches = list(_batches(hidden, recorded, -(-batch_size // num_data_shards(mesh)) * num_data_shards(mesh), mesh))

    def replay(draft_params) -> tuple[AcceptanceCounts, DraftShares]:
        size, depth = int(recorded.prompts.max()) + 1, setup.num_draft_tokens
        counts = AcceptanceCounts(*(np.zeros((size, columns), np.int64) for columns in (depth + 1, depth, depth)))
        shares = no_shares(size, len(setup.drafts) if setup.combine else 0)
        params = {"target": frozen, "draft": replicate(draft_params, mesh)}
        for own, text in batches:
            out = to_host(run(params, text))
            for total, rows in zip((*counts, *shares), (*out.stats, *(out.shares or ()))):
                np.add.at(total, recorded.prompts[own], rows[: len(own)])
        return counts, shares

    return replay


def _batches(hidden: PerToken, recorded: Recorded, batch_size: int, mesh: Mesh):
    """(sample numbers, Text) of rows of one width."""
    widths = np.array([bucket_width(len(sample.tokens)) for sample in recorded.samples])
    for width in np.unique(widths):
        of_width = np.flatnonzero(widths == width)
        for begin in range(0, len(of_width), batch_size):
            own = of_width[begin : begin + batch_size]
            shape = (batch_size, int(width))
            starts = np.zeros(batch_size, np.int32)
            starts[: len(own)] = [np.argmax(recorded.samples[i].assistant_mask) for i in own]
            tokens = pad_rows([recorded.samples[i].tokens for i in own], shape)
            states = pad_rows([np.asarray(hidden[recorded.samples[i].id], np.float32) for i in own], shape)
            yield own, shard_rows(Text(tokens, states, starts), mesh)


def _replay(setup: DecodeSetup, params: dict, text: Text) -> Generation:
    rows, width = text.tokens.shape
    numbers = jnp.arange(rows)
    first = text.tokens[numbers, text.starts]
    nothing = empty_cache(setup.target, rows, 0, jnp.float32)._replace(length=text.starts)
    state = DecodeState(
        generated=jnp.zeros((rows, setup.max_new_tokens + setup.num_draft_tokens + 1), jnp.int32),
        num_generated=jnp.minimum(text.starts, 1),
        last_token=first,
        done=(text.starts == 0) | jnp.isin(first, jnp.asarray(setup.stop_tokens)) | (setup.max_new_tokens <= 1),
        target_cache=nothing,  # no slots: of the target's cache the loop only needs how long it would be
        draft_cache=None,
        draft_hidden=None,
        keys=None,
    )
    next_tokens = jnp.roll(text.tokens, -1, axis=1)
    state = show_prompt(setup, params, state, text.hidden, next_tokens, setup.cache_slots(width))
    return until_done(setup, state, lambda state: commit(setup, params, state, _round(setup, params, state, text)))


def _round(setup: DecodeSetup, params: dict, state: DecodeState, text: Text) -> Round:
    """As `generate`'s round of a tree, all that the target would compute looked up."""
    proposed = propose(setup, params, state)
    rows, last = jnp.arange(text.starts.shape[0]), state.target_cache.length

    def choose(level, _):
        return text.tokens[rows, last + 1 + level]

    path = walk(proposed.tree, setup.num_draft_tokens, proposed.tree.tokens, choose)
    ahead = jnp.arange(setup.num_draft_tokens + 1)
    hidden = text.hidden[rows[:, None], last[:, None] + ahead[None, :]]
    return round_along(setup, proposed, path, hidden, state.target_cache)
