"""Trees on text that the target wrote once: `replay.py`'s idea for the trees of one draft or several.

It is the decoding loop with a target that has nothing left to compute: the target's choice at a node is the text's next token,
and its hidden states were kept when it read the text. A tree's text is plain decoding's at every temperature (`decoding.tree`),
so the counts are exactly the decoder's at every temperature.
"""

from __future__ import annotations

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
from jsfdd.decoding.generate import commit, show_prompt, start, until_done
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
    """Recorded texts of a batch, right-padded: `starts` tokens of prompt, then the answer. A start of 0 only fills up."""

    tokens: Int[Array, "B T"]
    hidden: Float[Array, "B T D"]
    starts: Int[Array, " B"]


def make_tree_replay(
    target: Target, hidden: PerToken, recorded: Recorded, setup: DecodeSetup, mesh: Mesh, batch_size: int = 16
) -> Callable[[Sequence[dict]], tuple[AcceptanceCounts, DraftShares]]:
    """`replay(draft_params)`: what decoding by `setup` would count, by prompt, and each draft's part in it.

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
    frozen = replicate({name: value for name, value in target.params.items() if name != "layers"}, mesh)
    batches = list(_batches(hidden, recorded, round_up_to_shards(batch_size, mesh), mesh))

    def replay(draft_params: Sequence[dict]) -> tuple[AcceptanceCounts, DraftShares]:
        size = int(recorded.prompts.max()) + 1
        counts, shares = no_counts(size, setup.num_draft_tokens), no_shares(size, len(setup.drafts))
        params = DecodeParams(frozen, stepping={}, drafts=replicate(tuple(draft_params), mesh))
        for texts, batch in batches:
            out = to_host(run(params, batch))
            for total, rows in zip((*counts, *shares), (*out.stats, *out.shares)):
                np.add.at(total, recorded.prompts[texts], rows[: len(texts)])
        return counts, shares

    return replay


def _batches(hidden: PerToken, recorded: Recorded, batch_size: int, mesh: Mesh):
    """(sample numbers, Text) of rows of one width."""
    widths = np.array([bucket_width(len(sample.tokens)) for sample in recorded.samples])
    for width in np.unique(widths):
        of_width = np.flatnonzero(widths == width)
        for begin in range(0, len(of_width), batch_size):
            numbers = of_width[begin : begin + batch_size]
            samples, shape = [recorded.samples[i] for i in numbers], (batch_size, int(width))
            starts = np.zeros(batch_size, np.int32)
            starts[: len(samples)] = [np.argmax(sample.assistant_mask) for sample in samples]
            tokens = pad_rows([sample.tokens for sample in samples], shape)
            states = pad_rows([np.asarray(hidden[sample.id], np.float32) for sample in samples], shape)
            yield numbers, shard_rows(Text(tokens, states, starts), mesh)


def _replay(setup: DecodeSetup, params: DecodeParams, text: Text) -> Generation:
    """As `generate.generate`, all that the target would compute looked up."""
    rows, width = text.tokens.shape
    first = text.tokens[jnp.arange(rows), text.starts]
    # No slots: of the target's cache the loop only needs how long it would be.
    nothing = empty_cache(setup.target, rows, 0, jnp.float32)._replace(length=text.starts)
    keys = jax.random.split(jax.random.key(0), rows)  # the text is there, so nothing is drawn
    state = start(setup, first, text.starts, nothing, keys)
    next_tokens = jnp.roll(text.tokens, -1, axis=1)
    state = show_prompt(setup, params, state, text.hidden, next_tokens, setup.cache_slots(width))
    return until_done(setup, state, lambda state: _step(setup, params, state, text))


def _step(setup: DecodeSetup, params: DecodeParams, state: DecodeState, text: Text) -> tuple[DecodeState, Emitted]:
    """As `generate.speculative_step` of a tree."""
    tree, proposers, state = draft_tree(setup, params, state)
    rows, last = jnp.arange(text.starts.shape[0]), state.target_cache.length

    def choose(level, _):
        return text.tokens[rows, last + 1 + level]

    path = walk(tree, setup.num_draft_tokens, tree.tokens, choose)
    ahead = jnp.arange(setup.num_draft_tokens + 1)
    hidden = text.hidden[rows[:, None], last[:, None] + ahead[None, :]]
    return commit(setup, params, state, path, proposers, hidden, state.target_cache)
