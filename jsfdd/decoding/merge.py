"""Several drafts' trees as one to verify: shared prefixes once, the best paths within a budget (TAPS, arXiv 2603.27027).

    together  the nodes of all trees behind each other, each tree in its own order: U of them
    twins     nodes of one path: the same token below twins, or roots. The first of them stands for all
    score     a path's probability under the drafts' mixture: the mean over drafts, 0 for a draft whose tree lacks the path
    keep      the best `budget` paths

Why the mean. The target's text runs through a node or does not, so a tree's expected number of accepted tokens is the sum of
its paths' probabilities. If each draft is as likely to be the one that is right, these are the means, and the best `budget` of
them are the best tree. No draft finds a path more probable than its parent, and one that has the path has its parent, so
means never grow downwards either: no kept node loses its parent. (The largest of the probabilities, in place of the mean,
would keep parents too, but would count a path that all drafts propose no higher than one that a single draft does.)

The paper's code leaves twins in, and verifies all nodes of both trees. Text is lossless either way, for it is the target's own
(`tree.walk`); but a twin takes a place from another path, and hides what hangs below it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jsfdd.decoding.tree import Tree, ancestors_of


def merge(
    trees: Sequence[Tree], probs: Sequence[Float[Array, "B N"]], depth: int, budget: int
) -> tuple[Tree, Int[Array, "B N"]]:
    """The drafts' trees below one root as a single tree, and which draft proposed each of its nodes.

    A node that several drafts propose is of the one that finds its path most probable, of equals the earlier. Nodes come in
    the order of the first tree, then what only the second has, and so on: equal trees merge to themselves.

    Args:
      trees: one a draft, their roots alike; they may differ in size.
      probs: each tree's `path_probs`.
      depth: G, the deepest that a node may lie.
      budget: nodes to keep, the root not counted. Where the trees have fewer different ones, places stay empty: of token −1,
        below nothing but themselves.
    """
    starts = np.cumsum([0, *(tree.tokens.shape[1] for tree in trees)])
    tokens, depths = (jnp.concatenate(arrays, axis=1) for arrays in zip(*((tree.tokens, tree.depths) for tree in trees)))
    parents = jnp.concatenate([tree.parents + start for tree, start in zip(trees, starts)], axis=1)
    first = _first_twins(tokens, depths, parents, depth)

    rows, nowhere = jnp.arange(tokens.shape[0])[:, None], jnp.zeros(tokens.shape, jnp.float32)
    places = [first[:, start:end] for start, end in zip(starts, starts[1:])]
    by_draft = jnp.stack([nowhere.at[rows, place].set(p) for place, p in zip(places, probs)])
    # Added up in one order for every node, so that rounding cannot lift a child above its parent.
    score = jnp.where(first == jnp.arange(starts[-1])[None, :], sum(by_draft), -1.0)
    _, chosen = jax.lax.top_k(score, budget + 1)  # of equals the earlier, so a parent before its child
    chosen = jnp.sort(chosen, axis=1)

    filled = _take(score, chosen) >= 0
    above = jax.vmap(jnp.searchsorted)(chosen, _take(_take(first, parents), chosen)).astype(jnp.int32)
    above = jnp.where(filled, above, jnp.arange(budget + 1)[None, :])
    merged = Tree(
        tokens=jnp.where(filled, _take(tokens, chosen), -1),
        parents=above,
        depths=_take(depths, chosen),
        ancestors=ancestors_of(above, depth),
    )
    return merged, jnp.argmax(jnp.take_along_axis(by_draft, chosen[None], axis=2), axis=0).astype(jnp.int32)


def _first_twins(tokens, depths, parents, depth) -> Int[Array, "B U"]:
    """The first node of the same path as each node, all roots being one: known a level further down in each round."""
    alike = (tokens[:, :, None] == tokens[:, None, :]) & (depths[:, :, None] == depths[:, None, :])
    first = jnp.zeros_like(tokens)
    for _ in range(depth):
        above = _take(first, parents)
        first = jnp.argmax(alike & (above[:, :, None] == above[:, None, :]), axis=2).astype(jnp.int32)
    return first


def _take(values, index):
    return jnp.take_along_axis(values, index, axis=1)
