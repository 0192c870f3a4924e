"""Checksums of arrays: against plain integers, on any mesh, and every changed bit counts."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jsfdd.base.checksums import array_checksums
from jsfdd.base.mesh import make_mesh


def plain_sums(x: np.ndarray) -> list[int]:
    """The slow twin: Python's integers, one word after the other."""
    words = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").reshape(-1).tolist()
    odd = sum(word * (2 * place + 1) for place, word in enumerate(words))
    scattered = sum(word * ((place * 0x9E3779B1 % 2**32) | 1) for place, word in enumerate(words))
    return [odd % 2**32, scattered % 2**32]


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16, "int8", "uint32", "int32"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 2), (0, 3)])
def test_they_are_the_sums_of_all_words(shape, dtype):
    values = np.asarray(np.random.default_rng(0).normal(size=shape) * 50).astype(dtype)
    assert array_checksums(jnp.asarray(values)) == {"": plain_sums(values)}


def test_every_changed_bit_changes_both_sums():
    values = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    before = array_checksums([jnp.asarray(values)])["[0]"]
    for bit in range(0, values.nbytes * 8, 7):
        changed = bytearray(values.tobytes())
        changed[bit // 8] ^= 1 << bit % 8
        after = plain_sums(np.frombuffer(changed, np.float32).reshape(4, 3))
        assert after[0] != before[0] and after[1] != before[1]
    assert plain_sums(values[::-1]) != before  # order counts


def test_a_mesh_does_not_matter():
    mesh, values = make_mesh(), jnp.arange(64.0).reshape(8, 8)
    tree = {"a": values, "key": jax.random.key(3), "flag": jnp.array([True, False])}
    split = tree | {"a": jax.device_put(values, NamedSharding(mesh, P("data")))}
    split |= {name: jax.device_put(tree[name], NamedSharding(mesh, P())) for name in ("key", "flag")}
    assert array_checksums(split) == array_checksums(tree)
    assert array_checksums(tree)["['key']"] == plain_sums(np.asarray(jax.random.key_data(tree["key"])))
