"""Merge several drafts' trees into one: shared prefixes once, the best paths within a budget (TAPS, arXiv 2603.27027).

    concatenate  the nodes of all trees, one tree after the other: U nodes
    twins        nodes that end the same path: roots, or the same token below twins. The first twin represents all of them
    score        the mean over drafts of a path's probability, which is 0 for a draft whose tree lacks the path
    keep         the best `budget` paths

Why the mean: a tree's expected number of accepted tokens is the sum of its paths' probabilities. If every draft is equally
likely to be right, a path's probability is the mean over drafts, and the best `budget` paths are the best tree. In one draft's
tree a child is never more probable than its parent, which the tree also holds. So a child's mean never exceeds its parent's,
and no kept node loses its parent. (The maximum would keep parents too, but would rank a path that all drafts propose no higher
than a path that one draft proposes.)

The paper's code keeps twins and verifies all nodes of both trees. That does not change the text (`tree.walk`), but a twin takes
the place of another path and hides the nodes below it.
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
    """Merge the drafts' trees into one, and say which draft proposed each of its nodes.

    A node that several drafts propose counts for the draft that gives its path the highest probability, the earlier one in a
    tie. Nodes keep the order of the first tree, followed by the nodes that only the second has, and so on; merging equal trees
    returns the same tree.

    Args:
      trees: one per draft, with equal roots; their sizes may differ.
      probs: each tree's `path_probs`.
      depth: G, the depth of the deepest node.
      budget: nodes to keep, without the root. If the trees have fewer distinct nodes, the remaining places are empty: their
        token is −1, and each is its own parent.
    """
    starts = np.cumsum([0, *(tree.tokens.shape[1] for tree in trees)])
    tokens, depths = (jnp.concatenate(arrays, axis=1) for arrays in zip(*((tree.tokens, tree.depths) for tree in trees)))
    parents = jnp.concatenate([tree.parents + start for tree, start in zip(trees, starts)], axis=1)
    first = _first_twins(tokens, depths, parents, depth)

    rows, nowhere = jnp.arange(tokens.shape[0])[:, None], jnp.zeros(tokens.shape, jnp.float32)
    places = [first[:, start:end] for start, end in zip(starts, starts[1:])]
    by_draft = jnp.stack([nowhere.at[rows, place].set(p) for place, p in zip(places, probs)])
    # All nodes sum over drafts in the same order, so rounding cannot lift a child above its parent.
    score = jnp.where(first == jnp.arange(starts[-1])[None, :], sum(by_draft), -1.0)
    _, chosen = jax.lax.top_k(score, budget + 1)  # ties go to the earlier node, so to a parent before its child
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
    """For each node, the first node that ends the same path. All roots are twins; each round settles one more level."""
    alike = (tokens[:, :, None] == tokens[:, None, :]) & (depths[:, :, None] == depths[:, None, :])
    first = jnp.zeros_like(tokens)
    for _ in range(depth):
        above = _take(first, parents)
        first = jnp.argmax(alike & (above[:, :, None] == above[:, None, :]), axis=2).astype(jnp.int32)
    return first


def _take(values, index):
    return jnp.take_along_axis(values, index, axis=1)
