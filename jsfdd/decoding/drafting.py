"""The drafts' part of a step: propose tokens for the target to verify, then observe the outcome.

A draft reads pairs: a state at a position and the token after it (`read_pairs`). The state is what the draft makes of the
target's hidden states there (`read_states`), or its own output one position earlier, which the draft's head turns into a
distribution (`next_logits`). Several drafts run one after the other, each with its own cache; `ensemble.py` and `merge.py`
decide which of their proposals are verified. Only `models/draft.py` knows what kind a draft is of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jsfdd.base.records import KVCache
from jsfdd.decoding.ensemble import certainty, confidence, route, still_needed
from jsfdd.decoding.merge import merge
from jsfdd.decoding.settings import DecodeSetup
from jsfdd.decoding.state import DecodeParams, DecodeState
from jsfdd.decoding.tree import Proposals, Tree, grow, path_probs, propose_nothing, rerank, root_only
from jsfdd.decoding.verify import draw, fold_in_rows
from jsfdd.models.attention import View, cached_view, causal_view
from jsfdd.models.draft import draft_head_logits, layer_of
from jsfdd.models.target import embed_tokens


def draft_chain(
    setup: DecodeSetup, params: DecodeParams, state: DecodeState, keys: Key[Array, " B"], temperature: Float[Array, ""]
) -> tuple[Int[Array, "B G"], Float[Array, "B G V"], DecodeState]:
    """Sample a chain of G draft tokens from the draft.

    Args:
      keys: one per row; folding in i gives the key of draft token i.

    Returns:
      The tokens, the logits that they were sampled from, and the state. The draft cache's slots beyond its length hold the
      pairs that were read.
    """

    def draw_next(number, hidden):
        logits = next_logits(setup, params, 0, hidden)
        return draw(fold_in_rows(keys, number), logits, temperature, setup.cutoff), logits

    def deeper(carry, number):
        hidden, token, cache = carry
        hidden, cache = read_pairs(setup, params, 0, cache, cached_view(cache, 1), hidden[:, None], token[:, None])
        token, logits = draw_next(number, hidden[:, 0])
        return (hidden[:, 0], token, cache._replace(length=cache.length + 1)), (token, logits)

    (cache,), (hidden,) = state.draft_caches, state.draft_hidden
    token, logits = draw_next(0, hidden)
    (_, _, grown), deeper_ones = jax.lax.scan(deeper, (hidden, token, cache), jnp.arange(1, setup.num_draft_tokens))
    tokens, logits = (jnp.concatenate([a[None], b]).swapaxes(0, 1) for a, b in zip((token, logits), deeper_ones))
    return tokens, logits, state._replace(draft_caches=(grown._replace(length=cache.length),))


def draft_tree(setup: DecodeSetup, params: DecodeParams, state: DecodeState) -> tuple[Tree, Int[Array, "B N"], DecodeState]:
    """Make the tree that the target verifies: only a root without a draft, one draft's tree, or several drafts combined.

    Trees grow by the drafts' probabilities, without a temperature.

    Returns:
      The tree, which draft proposed each node, and the state. The draft caches' slots beyond their length hold the pairs
      that were read.
    """
    proposals, caches = [], []
    for number, (cache, hidden) in enumerate(zip(state.draft_caches, state.draft_hidden, strict=True)):
        read = partial(read_pairs, setup, params, number)
        log_probs = partial(next_log_probs, setup, params, number)
        propose = partial(grow, setup.tree, hidden, forward=read, log_probs=log_probs)
        skip = partial(propose_nothing, setup.tree)
        proposed, cache = _unless_idle(setup, state, number, propose, skip, cache)
        proposals.append(proposed)
        caches.append(cache)
    state = state._replace(draft_caches=tuple(caches))
    if setup.combine is not None:
        return _combine(setup, params, state, proposals)
    tree = rerank(setup.tree, proposals[0], state.last_token) if proposals else root_only(state.last_token)
    return tree, jnp.zeros_like(tree.tokens), state


def _combine(
    setup: DecodeSetup, params: DecodeParams, state: DecodeState, proposals: Sequence[Proposals]
) -> tuple[Tree, Int[Array, "B N"], DecodeState]:
    """`draft_tree` for several drafts: merge their trees, or pick the tree of the draft that each row is routed to."""
    if setup.combine.rule == "merge":
        trees = [rerank(setup.tree, proposed, state.last_token) for proposed in proposals]
        probs = [path_probs(setup.tree, proposed) for proposed in proposals]
        tree, proposers = merge(trees, probs, setup.tree.depth, setup.tree.nodes)
        return tree, proposers, state
    if setup.combine.route_by == "entropy":
        sureness = [certainty(next_log_probs(setup, params, n, hidden)) for n, hidden in enumerate(state.draft_hidden)]
    else:
        sureness = [confidence(setup.tree, proposed) for proposed in proposals]
    winner, routing = route(setup.combine, jnp.stack(sureness, axis=1), state.routing, state.done)
    rows = jnp.arange(winner.shape[0])
    verified = jax.tree.map(lambda *arrays: jnp.stack(arrays)[winner, rows], *proposals)
    tree = rerank(setup.tree, verified, state.last_token)
    return tree, jnp.broadcast_to(winner[:, None], tree.tokens.shape), state._replace(routing=routing)


def observe(
    setup: DecodeSetup,
    params: DecodeParams,
    state: DecodeState,
    hidden: Float[Array, "B T S"],
    next_tokens: Int[Array, "B T"],
    count: Int[Array, " B"],
    whole: bool = False,
) -> DecodeState:
    """Feed every draft the true pairs (hidden[:, i], next_tokens[:, i]), i < count, and keep its output at the last one.

    `hidden` is the target's, with the streams that enter `setup.layers` in front. `whole`: these are the first pairs, and the
    caches are empty.
    """
    rows, last = jnp.arange(count.shape[0]), jnp.maximum(count - 1, 0)

    def read(number, cache, kept):
        view = causal_view(*next_tokens.shape) if whole else cached_view(cache, next_tokens.shape[1])
        states = read_states(setup, params, number, hidden)
        outputs, cache = read_pairs(setup, params, number, cache, view, states, next_tokens)
        kept = jnp.where((count > 0)[:, None], outputs[rows, last], kept)
        return cache._replace(length=cache.length + count), kept

    observed = [
        _unless_idle(setup, state, number, partial(read, number), lambda *unchanged: unchanged, cache, kept)
        for number, (cache, kept) in enumerate(zip(state.draft_caches, state.draft_hidden, strict=True))
    ]
    caches, outputs = zip(*observed)
    return state._replace(draft_caches=caches, draft_hidden=outputs)


def read_states(setup: DecodeSetup, params: DecodeParams, number: int, hidden: Float[Array, "B T S"]) -> Float[Array, "B T D"]:
    """The states that draft `number` reads, from the target's hidden states."""
    draft = setup.drafts[number]
    if draft.target_layers and draft.target_layers != setup.layers:  # other drafts read other layers
        streams = jnp.split(hidden, len(setup.layers) + 1, axis=-1)
        hidden = jnp.concatenate([*(streams[setup.layers.index(layer)] for layer in draft.target_layers), streams[-1]], axis=-1)
    return layer_of(draft).apply({"params": params.drafts[number]}, hidden, method="read")


def read_pairs(
    setup: DecodeSetup,
    params: DecodeParams,
    number: int,
    cache: KVCache,
    view: View,
    states: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Run draft `number` on pairs that follow its cache, attending as `view` allows; return its outputs and the cache."""
    embedding = embed_tokens(setup.target, params.target, tokens)
    layer = layer_of(setup.drafts[number])
    return layer.apply({"params": params.drafts[number]}, embedding, states, view, cache, method="decode")


def next_logits(
    setup: DecodeSetup, params: DecodeParams, number: int, output: Float[Array, "*shape D"]
) -> Float[Array, "*shape V"]:
    """Draft `number`'s logits after an output; −inf for tokens that the draft's reduced vocabulary lacks."""
    return draft_head_logits(setup.target, params.target, setup.drafts[number], params.drafts[number], output)


def next_log_probs(
    setup: DecodeSetup, params: DecodeParams, number: int, hidden: Float[Array, "*shape D"]
) -> Float[Array, "*shape V"]:
    """Draft `number`'s log-probabilities."""
    return jax.nn.log_softmax(next_logits(setup, params, number, hidden), axis=-1)


def _unless_idle(setup: DecodeSetup, state: DecodeState, number: int, run: Callable, idle: Callable, *memory):
    """`run(*memory)`, or `idle(*memory)` if no row that is not done can still be routed to draft `number`."""
    if state.routing is None:
        return run(*memory)
    needed = still_needed(setup.combine, state.routing, state.done)
    return jax.lax.cond(needed[number], run, idle, *memory)
