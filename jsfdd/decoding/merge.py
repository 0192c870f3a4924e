"""Several drafts' trees as one tree to verify: shared prefixes once, the best paths within a budget (TAPS, arXiv 2603.27027).

    together  the nodes of all trees, one tree after the other: U nodes
    twins     nodes of the same path: the same token below twins, or roots. The first twin stands for all
    score     a path's probability under the drafts' mixture: the mean over drafts, with 0 for a draft whose tree lacks the path
    keep      the best `budget` paths

Why the mean. A tree's expected number of accepted tokens is the sum of its paths' probabilities. If every draft is equally
likely to be right, a path's probability is the mean, and the best `budget` paths are the best tree. A draft never finds a path
more probable than its parent, and it has the parent of every path that it has. So the mean of a child is never above its
parent's, and no kept node loses its parent. (The maximum would keep parents too, but a path that all drafts propose would count
no more than a path that one draft proposes.)

The paper's code leaves twins in and verifies all nodes of both trees. The text is the target's either way (`tree.walk`), but a
twin takes the place of another path and hides the nodes below it.
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

    Where several drafts propose a node, it counts for the draft that finds its path most probable, and in a tie for the earlier
    one. Nodes keep the order of the first tree, followed by those that only the second has, and so on: equal trees merge to
    themselves.

    Args:
      trees: one for each draft, with equal roots; their sizes may differ.
      probs: each tree's `path_probs`.
      depth: G, the depth of the deepest node.
      budget: nodes to keep, without the root. If the trees have fewer different nodes, places stay empty: their token is −1 and
        each is its own parent.
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
