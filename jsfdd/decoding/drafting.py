"""The drafts' part of a step: propose a tree for the target to verify, and observe what became of it.

Of several drafts each does its part as if it were the only one (`_each_draft`), with a cache of its own; `ensemble.py` and
`merge.py` say what their proposals come to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsfdd.base.records import KVCache
from jsfdd.decoding.ensemble import Choices, certainty, confidence, route, still_needed
from jsfdd.decoding.merge import merge
from jsfdd.decoding.state import DecodeSetup, DecodeState
from jsfdd.decoding.tree import Proposals, Tree, grow, path_probs, rerank, root_only
from jsfdd.models.attention import View, cached_view
from jsfdd.models.draft import EagleLayer
from jsfdd.models.target import embed_tokens, head_logits


class Proposed(NamedTuple):
    """A tree to verify, and the drafts' caches with what growing it wrote behind their `length`.

    Of several drafts also which one proposed each node, and what routing goes on with.
    """

    tree: Tree
    draft_cache: KVCache | tuple[KVCache, ...] | None
    proposers: Int[Array, "B N"] | None = None
    choices: Choices | None = None


def propose(setup: DecodeSetup, params: dict, state: DecodeState) -> Proposed:
    """The root alone without a draft; the draft's tree; the tree of the surest of several drafts, or all of theirs merged."""
    if setup.draft is None:
        return Proposed(root_only(state.last_token), None)
    if setup.combine is None:
        proposals, cache = _grow(setup, params, state)
        return Proposed(rerank(setup.tree, proposals, state.last_token), cache)
    told, after = _each_draft(setup, params, state, functools.partial(_propose_alone, setup.combine.route_by))
    proposals, sureness = zip(*told)
    if setup.combine.rule == "merge":
        trees = [rerank(setup.tree, its, state.last_token) for its in proposals]
        probs = [path_probs(setup.tree, its) for its in proposals]
        tree, proposers = merge(trees, probs, setup.tree.depth, setup.tree.nodes)
        return Proposed(tree, after.draft_cache, proposers)
    winner, choices = route(setup.combine, jnp.stack(sureness, axis=1), state.choices, state.done)
    rows = jnp.arange(winner.shape[0])
    tree = rerank(setup.tree, jax.tree.map(lambda *its: jnp.stack(its)[winner, rows], *proposals), state.last_token)
    return Proposed(tree, after.draft_cache, jnp.broadcast_to(winner[:, None], tree.tokens.shape), choices)


def observe(setup: DecodeSetup, params: dict, state: DecodeState, hidden, next_tokens, count) -> DecodeState:
    """Show the draft the true pairs (hidden[:, i], next_tokens[:, i]), i < count; it keeps its output at the last one."""
    if setup.combine is not None:
        return _each_draft(setup, params, state, lambda *own: (None, observe(*own, hidden, next_tokens, count)))[1]
    view = cached_view(state.draft_cache, next_tokens.shape[1])
    output, cache = draft_forward(setup, params, state.draft_cache, view, hidden, next_tokens)
    rows = jnp.arange(count.shape[0])
    last = output[rows, jnp.maximum(count - 1, 0)]
    if state.draft_hidden is not None:  # after prefill there is nothing older to keep
        last = jnp.where((count > 0)[:, None], last, state.draft_hidden)
    return state._replace(draft_cache=cache._replace(length=cache.length + count), draft_hidden=last)


def _each_draft(setup: DecodeSetup, params: dict, state: DecodeState, run: Callable) -> tuple[list, DecodeState]:
    """`run(setup, params, state) -> (told, state)` for each of several drafts as the only one: what they told, and the state.

    A draft that no row needs any more computes nothing, tells zeros and stays as it is.
    """
    needed = None if state.choices is None else still_needed(setup.combine, state.choices, state.done)
    told, caches, hiddens = [], [], []
    for number, own in enumerate(zip(state.draft_cache, state.draft_hidden, strict=True)):
        alone = functools.partial(_run_alone, run, setup, params, state, number)
        if needed is None:
            said, cache, hidden = alone(*own)
        else:
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(alone, *own)[0])
            said, cache, hidden = jax.lax.cond(needed[number], alone, functools.partial(_stay, nothing), *own)
        told.append(said)
        caches.append(cache)
        hiddens.append(hidden)
    return told, state._replace(draft_cache=tuple(caches), draft_hidden=tuple(hiddens))


def _run_alone(run, setup, params, state, number, cache, hidden):
    setup = dataclasses.replace(setup, draft=setup.draft[number], combine=None)
    params = params | {"draft": params["draft"][number]}
    told, state = run(setup, params, state._replace(draft_cache=cache, draft_hidden=hidden, choices=None))
    return told, state.draft_cache, state.draft_hidden


def _stay(told, cache, hidden):
    return told, cache, hidden


def _propose_alone(route_by, setup: DecodeSetup, params: dict, state: DecodeState):
    """One of several drafts: ((its proposals, how sure it is), the state with its cache)."""
    proposals, cache = _grow(setup, params, state)
    if route_by == "entropy":
        sureness = certainty(_log_probs(setup, params, state.draft_hidden))
    else:
        sureness = confidence(setup.tree, proposals)
    return (proposals, sureness), state._replace(draft_cache=cache)


def _grow(setup: DecodeSetup, params: dict, state: DecodeState) -> tuple[Proposals, KVCache]:
    """What the draft proposes below the last committed token. Its probabilities are its own, without a temperature."""

    def forward(cache, view, hidden, tokens):
        return draft_forward(setup, params, cache, view, hidden, tokens)

    return grow(setup.tree, state.draft_hidden, state.draft_cache, forward, functools.partial(_log_probs, setup, params))


def _log_probs(setup: DecodeSetup, params: dict, hidden) -> Float[Array, "*shape V"]:
    return jax.nn.log_softmax(next_logits(setup, params, hidden), axis=-1)


def draft_forward(setup: DecodeSetup, params: dict, cache: KVCache, view: View, hidden, tokens):
    """The draft over pairs (hidden [B,T,D], tokens int[B,T]) that continue its cache, seeing what the view shows."""
    embedding = embed_tokens(setup.target, params["target"], tokens)
    return EagleLayer(setup.draft).apply({"params": params["draft"]}, embedding, hidden, view, cache, method="decode")


def next_logits(setup: DecodeSetup, params: dict, hidden) -> Float[Array, "*shape V"]:
    """The draft's logits: the target's head, −inf where the draft has a vocabulary and a token is not in it."""
    if not setup.draft.vocabulary:
        return head_logits(setup.target, params["target"], hidden)
    tokens = np.array(setup.draft.vocabulary)
    logits = head_logits(setup.target, params["target"], hidden, tokens)
    return jnp.full((*logits.shape[:-1], setup.target.vocab_size), -jnp.inf).at[..., tokens].set(logits)
