"""Checksums of arrays where they are: two integer sums for each leaf, computed on its devices, the same on any mesh.

    array_checksums({"a": jnp.arange(3)})                     # {"['a']": [8, 2654435779]}

Sums of integers modulo 2³² do not depend on their order, so a leaf may lie in parts on many devices, and nothing is fetched.
Every word is multiplied by an odd number of its place: one changed word always changes both sums, and other damage escapes
both with a chance of about 2⁻⁶⁴.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jsfdd.base.mesh import to_host

_FACTOR = 0x9E3779B1  # odd; its multiples scatter over all 32 bits (Knuth's multiplicative hashing)


def array_checksums(tree) -> dict[str, list[int]]:
    """{path of a leaf: its two sums}, JSON-ready; typed keys count as their words."""
    leaves = jax.tree.leaves_with_path(tree)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    sums = to_host(_all_sums([_as_words_are(leaf) for _, leaf in leaves]))
    return {name: [int(value) for value in pair] for name, pair in zip(names, sums, strict=True)}


def _as_words_are(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


@jax.jit
def _all_sums(leaves):
    return [_sums(leaf) for leaf in leaves]


def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    # A word's place in the whole leaf, without bringing the leaf's parts into one row.
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        step = np.uint32(np.prod(x.shape[axis + 1 :], dtype=np.uint64) & 0xFFFFFFFF)
        place = place + lax.broadcasted_iota(jnp.uint32, x.shape, axis) * step
    odd, scattered = 2 * place + 1, (place * np.uint32(_FACTOR)) | np.uint32(1)
    return jnp.sum(words * odd, dtype=jnp.uint32), jnp.sum(words * scattered, dtype=jnp.uint32)
