"""Clusters of like prompts, so that a selection can keep a share of every kind: spherical k-means of the prompts' states.

    clusters = cluster_prompts(table.prompt_states[rows], seed=0)                    # a number for every row

Flatness within such clusters beat chance twice (experiments/014 and 022), where flatness over all chats mostly chose between
their sources. A prompt's state is the mean of the target's states of its tokens (`scoring/prompt_state.py`). The states are
centred and scaled to length 1; a prompt belongs to the centre with the largest cosine. The first centres are drawn by k-means++
(Arthur and Vassilvitskii, 2007): a prompt far from those drawn so far is likelier.

Nothing here runs on a device, all sums are float64 in one order, and the draws are hashes of the seed, so the clusters depend
on the states, on their order and on the seed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

MOST = 20  # as many as won in experiments 014 and 022; more were not tried
FEWEST_SAMPLES = 20  # in a cluster, on average; there it was 21
_ROUNDS = 30
_BLOCK = 1 << 14  # rows at a time


def number_of_clusters(samples: int) -> int:
    """20, or so many that a cluster has 20 samples on average, if that is fewer; at least one."""
    return max(1, min(MOST, samples // FEWEST_SAMPLES))


def cluster_prompts(states: Float[np.ndarray, "N P"], seed: int, count: int | None = None) -> Int[np.ndarray, " N"]:
    """The number of each row's cluster, from 0 in the order in which the rows reach them. No cluster is empty.

    Memory is one float32 copy of the states and a block of cosines. Rows with the same direction are in one cluster, so there
    are no more clusters than directions; a row at the common mean has no direction, and joins the first.

    Args:
      states: finite; at least one row. For the same clusters whatever the order of the data, sort the rows by id.
      seed: of the first centres.
      count: the most clusters; by default `number_of_clusters`.

    Example:
      >>> cluster_prompts(np.array([[9.0, 1.0], [8.0, 0.0], [0.0, 7.0], [1.0, 9.0]]), seed=0, count=2)
      array([0, 0, 1, 1])
    """
    points = _directions(states)
    centres = _first_centres(points, count or number_of_clusters(len(points)), seed)
    nearest = _nearest(points, centres)[0]
    for _ in range(_ROUNDS):
        centres = _means(points, nearest, centres)
        before, nearest = nearest, _nearest(points, centres)[0]
        if (nearest == before).all():
            break
    # Named by their first rows, not by the draw of their first centres; a centre that lost all its rows vanishes.
    _, first, inverse = np.unique(nearest, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _directions(states: Float[np.ndarray, "N P"]) -> Float[np.ndarray, "N P"]:
    """The states less their mean, each of length 1, or 0 where rounding is all that is left of one."""
    mean = np.mean(states, axis=0, dtype=np.float64)
    points = np.empty(np.shape(states), np.float32)
    for rows in _blocks(len(points)):
        block = states[rows].astype(np.float64)
        size = np.linalg.norm(block, axis=1, keepdims=True)
        block -= mean
        length = np.linalg.norm(block, axis=1, keepdims=True)
        points[rows] = np.divide(block, length, out=np.zeros_like(block), where=length > 1e-6 * size)
    return points


def _first_centres(points: Float[np.ndarray, "N P"], count: int, seed: int) -> Float[np.ndarray, "K P"]:
    """K ≤ count rows: the first by chance, every other with a probability that grows with 1 − its cosine to those before it."""
    chosen = [int(_draw(seed, 0) * len(points))]
    similarity = np.full(len(points), -1.0)
    for number in range(1, count):
        similarity = np.maximum(similarity, _nearest(points, points[chosen[-1:]].astype(np.float64))[1])
        # Rounding leaves a little of a row that equals a centre, which must not be drawn.
        weight = np.where(similarity < 1 - 1e-6, 1 - similarity, 0.0)
        total = np.cumsum(weight)
        if not total[-1] > 0:
            break
        chosen.append(int(np.searchsorted(total, _draw(seed, number) * total[-1], side="right")))
    return points[chosen].astype(np.float64)


def _draw(seed: int, number: int) -> float:
    """A uniform number in [0, 1) that no version of a library changes."""
    digest = hashlib.sha256(f"jsfdd clusters: {seed}: {number}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _nearest(
    points: Float[np.ndarray, "N P"], centres: Float[np.ndarray, "K P"]
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """(the centre with the largest cosine, the first of equal ones; that cosine)."""
    nearest, similarity = np.empty(len(points), np.int64), np.empty(len(points))
    for rows in _blocks(len(points)):
        cosines = points[rows].astype(np.float64) @ centres.T
        nearest[rows] = np.argmax(cosines, axis=1)
        similarity[rows] = np.max(cosines, axis=1)
    return nearest, similarity


def _means(
    points: Float[np.ndarray, "N P"], nearest: Int[np.ndarray, " N"], centres: Float[np.ndarray, "K P"]
) -> Float[np.ndarray, "K P"]:
    """The directions of the clusters' means; a centre without rows, or whose rows cancel out, stays."""
    sums = np.zeros_like(centres)
    for rows in _blocks(len(points)):
        member = nearest[rows][:, None] == np.arange(len(centres))
        sums += member.astype(np.float64).T @ points[rows].astype(np.float64)
    length = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.divide(sums, length, out=centres.copy(), where=length > 1e-9)


def _blocks(number: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, number, _BLOCK))
