"""Causal attention of whole sequences in memory that grows with their length, not with its square.

    y, lse = blocked_attention(q, k, v, scale, Reach())       # the equation is attention.quadratic_attention

Queries and keys are cut into blocks. A loop visits the pairs of blocks in which a query sees a key, half of all pairs or fewer,
and keeps for every query the largest logit so far, the sum of the exponentials below it and the values' sum: the softmax of
all keys without all logits at once (arXiv 1805.02867; with values, arXiv 2205.14135). The backward pass works the weights out
again from the logarithm of that sum, `lse`, visiting the same pairs, so that it needs no more than the forward one.

Everything is plain JAX, for any device. How many rounds the loop has is known when it is compiled, so no device waits for the
host to decide on the next.

Letters: as in `models/attention.py`; n blocks of C positions, in which R = C · G queries share a key/value head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

BLOCK = 256  # the most positions of a block


class Reach(NamedTuple):
    """Which keys of its own sequence a query sees: those at positions p with t − window < p ≤ t − behind.

    Attributes:
      window: None for no limit. A number cuts the pairs that are visited; an array, as of a scan over layers of which some
        slide, does not.
      behind: how many of the nearest keys it does not see.
    """

    window: int | Int[Array, ""] | None = None
    behind: int = 0


def sees(reach: Reach, queries: Int[Array, " T"], keys: Int[Array, " S"]) -> Bool[Array, "T S"]:
    """Whether the query at a position sees the key at another."""
    distance = queries[:, None] - keys[None, :]
    seen = distance >= reach.behind
    return seen if reach.window is None else seen & (distance < reach.window)


def blocked_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B K H T"],
    v: Float[Array, "B K T H"],
    scale: float,
    reach: Reach,
    block: int | None = None,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """`attention.quadratic_attention`: what queries read, in v's dtype, and the float32 log-sum-exp of their logits.

    A query that sees no key reads 0, and its sum's logarithm is −inf. A sequence of at most `BLOCK` positions is one block.
    """
    length, group = q.shape[1], q.shape[3]
    block = block or _block(length)
    pairs, limit = _visited(length, block, reach)
    k, v = _cut(k, block, 3), _cut(v, block, 2)
    y, lse = _over_pairs(scale, pairs, reach.behind, _cut_queries(q, block), k, v, limit)
    return _join_queries(y, length, group), _join_queries(lse, length, group)


def blocked_gradient(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B K H T"],
    v: Float[Array, "B K T H"],
    scale: float,
    reach: Reach,
    results: tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]],
    slopes: tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]],
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B K H T"], Float[Array, "B K T H"]]:
    """The gradient of `blocked_attention` by q, k and v from its `results`, whatever computed them, and the slopes by them."""
    length, group, block = q.shape[1], q.shape[3], _block(q.shape[1])
    pairs, limit = _visited(length, block, reach)
    y, lse, *slopes = (_cut_queries(x, block) for x in (*results, *slopes))
    kept = _cut_queries(q, block), _cut(k, block, 3), _cut(v, block, 2), limit, y, lse
    by_q, by_k, by_v, _ = _backward(scale, pairs, reach.behind, kept, slopes)
    return _join_queries(by_q, length, group), _join(by_k, length, 3), _join(by_v, length, 2)


def _visited(length: int, block: int, reach: Reach):
    """The pairs of blocks that are visited, and the limit of `_over_pairs`."""
    window = reach.window if isinstance(reach.window, int) else None
    # No key is as far as this; it only has the shape of a limit.
    limit = jnp.asarray(2 * length + block if reach.window is None else reach.window, jnp.int32)
    return _pairs(-(-length // block), block, window, reach.behind), limit


def _cut(x, block: int, axis: int):
    """Keys or values in blocks of positions, padded to whole blocks; the blocks' axis comes first."""
    size = x.shape[axis]
    x = jnp.pad(x, [(0, -size % block if i == axis else 0) for i in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _join(x, length: int, axis: int):
    """What `_cut` made, whole again."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def _cut_queries(x, block: int):
    """[B,T,K,G,…] as [n,B,K,C·G,…], T padded to whole blocks."""
    rows, length, heads, group, *size = x.shape
    x = jnp.pad(x, [(0, -length % block if i == 1 else 0) for i in range(x.ndim)])
    x = jnp.moveaxis(x.reshape(rows, -1, block, heads, group, *size), (1, 3), (0, 2))
    return x.reshape(*x.shape[:3], block * group, *size)


def _join_queries(x, length: int, group: int):
    """What `_cut_queries` made, whole again."""
    blocks, rows, heads, queries, *size = x.shape
    x = jnp.moveaxis(x.reshape(blocks, rows, heads, queries // group, group, *size), (0, 2), (1, 3))
    return x.reshape(rows, -1, heads, group, *size)[:, :length]


def num_pairs(length: int, window: int | None = None) -> int:
    """How many logits of a head and row `blocked_attention` computes: of all pairs of positions in blocks that it visits."""
    block = _block(length)
    return len(_pairs(-(-length // block), block, window, 0)) * block**2


def _block(length: int) -> int:
    """The positions of a block: as few blocks as can be, all of one size, so that little is added to the last."""
    return -(-length // -(-length // BLOCK))


def _pairs(num_blocks: int, block: int, window: int | None, behind: int) -> tuple[tuple[int, int], ...]:
    """The pairs (block of queries, block of keys) in which some query sees some key."""
    return tuple(
        (i, j)
        for i in range(num_blocks)
        for j in range(i + 1)
        if (i - j + 1) * block > behind and (window is None or (i - j - 1) * block + 1 < window)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _over_pairs(scale, pairs, behind, q, k, v, limit):
    """(y [n,B,K,R,H], lse [n,B,K,R]) of q [n,B,K,R,H], k [n,B,K,H,C] and v [n,B,K,C,H]."""

    def visit(carry, pair):
        i, j = pair
        top, total, read = (_get(x, i) for x in carry)
        logits, seen = _logits(scale, behind, _get(q, i), _get(k, j), limit, pair)
        logits = jnp.where(seen, logits, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(logits, axis=-1))
        finite = jnp.where(jnp.isneginf(higher), 0.0, higher)
        weights, before = jnp.exp(logits - finite[..., None]), jnp.exp(top - finite)
        new = jnp.einsum("bkrc,bkch->bkrh", weights.astype(v.dtype), _get(v, j), preferred_element_type=jnp.float32)
        new = higher, before * total + jnp.sum(weights, axis=-1), before[..., None] * read + new
        return tuple(_set(x, part, i) for x, part in zip(carry, new)), None

    # Like q and not of its shape alone: on a mesh with explicit axes a carry must be split as what is written into it.
    nothing = jnp.zeros_like(q, jnp.float32)
    carry = nothing[..., 0] - jnp.inf, nothing[..., 0], nothing
    (top, total, read), _ = jax.lax.scan(visit, carry, _columns(pairs))
    y = read / jnp.where(total > 0, total, 1.0)[..., None]
    return y.astype(v.dtype), top + jnp.log(total)


def _forward(scale, pairs, behind, q, k, v, limit):
    y, lse = _over_pairs(scale, pairs, behind, q, k, v, limit)
    return (y, lse), (q, k, v, limit, y, lse)


def _backward(scale, pairs, behind, kept, slopes):
    q, k, v, limit, y, lse = kept
    by_y, by_lse = slopes
    # d weight = weight · (by_y · v − by_y · y + by_lse): what the softmax takes off, a number a query.
    off = jnp.sum(by_y.astype(jnp.float32) * y.astype(jnp.float32), axis=-1) - by_lse
    finite = jnp.where(jnp.isneginf(lse), 0.0, lse)

    def visit(carry, pair):
        i, j = pair
        (q_i, by_y_i, finite_i, off_i), (k_j, v_j) = (_get(x, i) for x in (q, by_y, finite, off)), (_get(x, j) for x in (k, v))
        logits, seen = _logits(scale, behind, q_i, k_j, limit, pair)
        weights = jnp.where(seen, jnp.exp(logits - finite_i[..., None]), 0.0)
        by_weights = jnp.einsum("bkrh,bkch->bkrc", by_y_i, v_j, preferred_element_type=jnp.float32)
        by_logits = (weights * (by_weights - off_i[..., None]) * scale).astype(q.dtype)
        new = (
            jnp.einsum("bkrc,bkhc->bkrh", by_logits, k_j, preferred_element_type=jnp.float32),
            jnp.einsum("bkrh,bkrc->bkhc", q_i, by_logits, preferred_element_type=jnp.float32),
            jnp.einsum("bkrc,bkrh->bkch", weights.astype(v.dtype), by_y_i, preferred_element_type=jnp.float32),
        )
        return tuple(_set(x, _get(x, at) + part, at) for x, part, at in zip(carry, new, (i, j, j))), None

    carry = tuple(jnp.zeros_like(x, jnp.float32) for x in (q, k, v))
    (by_q, by_k, by_v), _ = jax.lax.scan(visit, carry, _columns(pairs))
    return by_q.astype(q.dtype), by_k.astype(k.dtype), by_v.astype(v.dtype), None


_over_pairs.defvjp(_forward, _backward)


def _get(blocks, number):
    return jax.lax.dynamic_index_in_dim(blocks, number, keepdims=False)


def _set(blocks, block, number):
    return jax.lax.dynamic_update_index_in_dim(blocks, block, number, 0)


def _logits(scale, behind, q, k, limit, pair):
    """A pair's logits [B,K,R,C], and which of them count."""
    size, queries = k.shape[-1], q.shape[-2]
    positions = jnp.arange(queries) // (queries // size) + pair[0] * size
    seen = sees(Reach(limit, behind), positions, jnp.arange(size) + pair[1] * size)
    return jnp.einsum("bkrh,bkhc->bkrc", q, k, preferred_element_type=jnp.float32) * scale, seen[None, None]


def _columns(pairs) -> Int[np.ndarray, "2 pairs"]:
    i, j = np.array(pairs, np.int32).reshape(-1, 2).T
    return i, j
