"""Dynamic draft trees (EAGLE-2, arXiv 2406.16858, section 4): grow, re-rank, verify, keep the accepted path.

    grow    level by level: the draft reads the `top_k` most probable paths so far and proposes `top_k` next tokens for each
    rerank  keep the `nodes` most probable of all proposed paths; a path's probability is the product of its tokens'
    view    the target reads all nodes in one pass; a node sees the committed tokens and its own ancestors
    walk    from the root, go to the child that holds the target's choice, until no child does
    keep    move the accepted nodes' keys and values next to the committed ones; leave the rest of the cache

The children of a node are the draft's best tokens, not samples from it. Papers verify them one after the other, each against
the mass of p that the earlier ones left. That is the same as sampling one token from p and looking it up among the children.
So `walk` samples as plain decoding does, with the same keys, and the text equals plain decoding's at every temperature.

Letters: n = top_k, M = nodes, N = M + 1 with the root, G = depth, P = proposals in all. Node 0 is the root, the last
committed token; a parent's number is below its children's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsfdd.base.records import KVCache
from jsfdd.decoding.settings import TreeShape
from jsfdd.models.attention import View


class Proposals(NamedTuple):
    """All tokens that the draft proposed, level by level. The parent −1 is the root."""

    tokens: Int[Array, "B P"]
    scores: Float[Array, "B P"]  # log-probability of the whole path
    parents: Int[Array, "B P"]  # index of a proposal


class Tree(NamedTuple):
    """The tree that the target verifies. `ancestors[b, i, j]` is True if node j is node i or above it."""

    tokens: Int[Array, "B N"]
    parents: Int[Array, "B N"]  # the root is its own parent
    depths: Int[Array, "B N"]
    ancestors: Bool[Array, "B N N"]


class Path(NamedTuple):
    """The target's way down a tree, or along a chain.

    Attributes:
      nodes, tokens: `tokens[:, i]` is the target's choice at `nodes[:, i]`, for i ≤ `num_accepted`.
      num_accepted: draft tokens that are the target's choice, 0 … G.
      num_judged: draft depths that were verified: one more than were accepted, unless the path ended at a leaf.
    """

    nodes: Int[Array, "B G1"]
    tokens: Int[Array, "B G1"]
    num_accepted: Int[Array, " B"]
    num_judged: Int[Array, " B"]


def root_only(tokens: Int[Array, " B"]) -> Tree:
    """The tree without draft tokens, for plain decoding."""
    return one_branch(tokens, jnp.zeros((tokens.shape[0], 0), jnp.int32))


def one_branch(root_tokens: Int[Array, " B"], draft_tokens: Int[Array, "B G"]) -> Tree:
    """The tree of a chain: every node but the last has one child."""
    tokens = jnp.concatenate([root_tokens[:, None], draft_tokens], axis=1)
    numbers = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    ancestors = jnp.broadcast_to(jnp.tri(tokens.shape[1], dtype=bool), (*tokens.shape, tokens.shape[1]))
    return Tree(tokens, jnp.maximum(numbers - 1, 0), numbers, ancestors)


def grow(
    shape: TreeShape,
    root_hidden: Float[Array, "B D"],
    cache: KVCache,
    forward: Callable[[KVCache, View, Float[Array, "B n D"], Int[Array, "B n"]], tuple[Float[Array, "B n D"], KVCache]],
    log_probs: Callable[[Float[Array, "B n D"]], Float[Array, "B n V"]],
) -> tuple[Proposals, KVCache]:
    """Grow all proposals below the root. The draft's cache comes back with the nodes that it read, beyond its `length`.

    Args:
      root_hidden: the draft's guess of the hidden state at the last committed token.
      cache: the draft's cache; `length` does not change.
      forward: runs the draft on pairs (hidden, token) under a view, and writes them at the cache's length.
      log_probs: the draft's log-probabilities of the token after a hidden state.
    """
    rows, width, slots = root_hidden.shape[0], shape.top_k, cache.v.shape[3]
    start = cache.length
    scores, tokens = jax.lax.top_k(log_probs(root_hidden[:, None])[:, 0], width)
    first = Proposals(tokens.astype(jnp.int32), scores, jnp.full((rows, width), -1, jnp.int32))
    if shape.depth == 1:
        return first, cache

    def level(carry, number):
        tokens, scores, index, hidden, seen, cache = carry
        # A node sees the committed tokens, and among the nodes read so far itself and its ancestors.
        slot = number * width + jnp.arange(width)
        seen = seen | (jnp.arange(shape.draft_slots)[None, None, :] == slot[None, :, None])
        view = _view_after(start, slots, jnp.broadcast_to(number, (rows, width)), seen, None)
        hidden, cache = forward(cache._replace(length=start + number * width), view, hidden, tokens)
        steps, children = jax.lax.top_k(log_probs(hidden), width)
        scores = (scores[:, :, None] + steps).reshape(rows, -1)
        children = children.astype(jnp.int32).reshape(rows, -1)
        proposals = Proposals(children, scores, jnp.repeat(index, width, axis=1))
        # The draft reads the best children of this level next, whoever their parents are.
        scores, chosen = jax.lax.top_k(scores, width)
        parent = chosen // width
        carry = (
            _take(children, chosen),
            scores,
            width + number * width**2 + chosen,
            jnp.take_along_axis(hidden, parent[:, :, None], axis=1),
            jnp.take_along_axis(seen, parent[:, :, None], axis=1),
            cache,
        )
        return carry, proposals

    index = jnp.broadcast_to(jnp.arange(width), (rows, width))
    hidden = jnp.broadcast_to(root_hidden[:, None], (rows, width, root_hidden.shape[1]))
    seen = jnp.zeros((rows, width, shape.draft_slots), bool)
    carry = (first.tokens, scores, index, hidden, seen, cache)
    (*_, cache), deeper = jax.lax.scan(level, carry, jnp.arange(shape.depth - 1))
    deeper = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1), deeper)
    proposals = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, deeper)
    return proposals, cache._replace(length=start)


def propose_nothing(shape: TreeShape, cache: KVCache) -> tuple[Proposals, KVCache]:
    """Proposals of probability 0, in the form that `grow` returns."""
    numbers = jnp.zeros((cache.length.shape[0], shape.num_proposals), jnp.int32)
    return Proposals(numbers, jnp.full(numbers.shape, -jnp.inf), numbers), cache


def rerank(shape: TreeShape, proposals: Proposals, root_tokens: Int[Array, " B"]) -> Tree:
    """Make the tree of the `nodes` best proposals. A path is never more probable than its parent, so no parent is missing."""
    rows = root_tokens.shape[0]
    chosen = _best(shape, proposals)
    above = _take(proposals.parents, chosen)
    number = jax.vmap(jnp.searchsorted)(chosen, above).astype(jnp.int32)
    level = jnp.where(chosen < shape.top_k, 1, 2 + (chosen - shape.top_k) // shape.top_k**2).astype(jnp.int32)
    root = jnp.zeros((rows, 1), jnp.int32)
    parents = jnp.concatenate([root, jnp.where(above < 0, 0, number + 1)], axis=1)
    return Tree(
        tokens=jnp.concatenate([root_tokens[:, None], _take(proposals.tokens, chosen)], axis=1),
        parents=parents,
        depths=jnp.concatenate([root, level], axis=1),
        ancestors=ancestors_of(parents, shape.depth),
    )


def path_probs(shape: TreeShape, proposals: Proposals) -> Float[Array, "B N"]:
    """The draft's probability of the path to each node of `rerank`'s tree; 1 for the root."""
    scores = _take(proposals.scores, _best(shape, proposals))
    return jnp.exp(jnp.pad(scores, ((0, 0), (1, 0))))


def tree_view(cache: KVCache, tree: Tree) -> View:
    """The view for a tree's nodes in slots length … length + N − 1: depth sets a node's position, and it sees its ancestors."""
    return _view_after(cache.length, cache.v.shape[3], tree.depths, tree.ancestors, tree.depths)


def walk(
    tree: Tree,
    depth: int,
    logits: Float[Array, "B N V"],
    choose: Callable[[Int[Array, ""], Float[Array, "B V"]], Int[Array, " B"]],
) -> Path:
    """Follow the target's choices down the tree.

    Args:
      depth: G, the depth of the deepest node.
      logits: the target's float32 logits at each node.
      choose: picks the target's next token at a level (0 is the root's) from its logits there.
    """
    rows = jnp.arange(tree.tokens.shape[0])
    numbers = jnp.arange(tree.tokens.shape[1])

    def level(carry, number):
        node, walking, num_accepted, went_on = carry
        token = choose(number, logits[rows, node])
        below = (tree.parents == node[:, None]) & (numbers > 0)[None, :]
        held = below & (tree.tokens == token[:, None])
        accepted = walking & jnp.any(held, axis=1)
        went_on = jnp.where(walking, jnp.any(below, axis=1), went_on)
        child = jnp.where(accepted, jnp.argmax(held, axis=1), node).astype(jnp.int32)
        return (child, accepted, num_accepted + accepted, went_on), (node, token)

    start = jnp.zeros(rows.shape, jnp.int32)
    carry = (start, jnp.ones(rows.shape, bool), start, jnp.zeros(rows.shape, bool))
    (_, _, num_accepted, went_on), (nodes, tokens) = jax.lax.scan(level, carry, jnp.arange(depth + 1))
    return Path(nodes.swapaxes(0, 1), tokens.swapaxes(0, 1), num_accepted, num_accepted + went_on)


def keep_path(cache: KVCache, nodes: Int[Array, "B G1"]) -> KVCache:
    """Move the slots of a path's nodes (slot length + node) to the consecutive slots length, length + 1, …"""
    rows = jnp.arange(nodes.shape[0])[:, None]
    old = cache.length[:, None] + nodes
    new = cache.length[:, None] + jnp.arange(nodes.shape[1])[None, :]
    return cache._replace(
        k=cache.k.at[:, rows, :, :, new].set(cache.k[:, rows, :, :, old]),
        v=cache.v.at[:, rows, :, new].set(cache.v[:, rows, :, old]),
    )


def ancestors_of(parents: Int[Array, "B N"], depth: int) -> Bool[Array, "B N N"]:
    """Compute `Tree.ancestors` for a tree at most `depth` deep."""
    itself = jnp.eye(parents.shape[1], dtype=bool)[None]
    seen = jnp.broadcast_to(itself, (parents.shape[0], *itself.shape[1:]))
    for _ in range(depth):
        seen = itself | jnp.take_along_axis(seen, parents[:, :, None], axis=1)
    return seen


def _view_after(start, slots, depths, visible, slot_depths):
    """The view for nodes written at slot `start` and after it: they see every slot before, and later ones by `visible` [B,n,R].

    `slot_depths` [B,R] gives the positions of the slots from `start` on; None if positions of keys are not needed.
    """
    slot = jnp.arange(slots)[None, :]
    behind = slot - start[:, None]
    inside = (behind >= 0) & (behind < visible.shape[2])
    behind = jnp.clip(behind, 0, visible.shape[2] - 1)
    sight = jnp.take_along_axis(visible, behind[:, None, :], axis=2)
    mask = (slot < start[:, None])[:, None, :] | (inside[:, None, :] & sight)
    key_positions = jnp.broadcast_to(slot, inside.shape)
    if slot_depths is not None:
        key_positions = jnp.where(inside, start[:, None] + _take(slot_depths, behind), key_positions)
    return View(start[:, None] + depths, key_positions, mask)


def _best(shape: TreeShape, proposals: Proposals) -> Int[Array, "B M"]:
    """The numbers of the `nodes` best proposals, ascending."""
    _, chosen = jax.lax.top_k(proposals.scores, shape.nodes)  # ties go to the earlier one, so to a parent before its child
    return jnp.sort(chosen, axis=1)


def _take(values, index):
    return jnp.take_along_axis(values, index, axis=1)
