"""Attention of whole sequences: blocks and the TPU's kernel against the equation, harmonised columns against their definition,
memory by length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_config

from jsfdd.base.mesh import make_mesh, map_over_devices
from jsfdd.models.attention import attention, harmonised_attention, quadratic_attention
from jsfdd.models.blocked_attention import BLOCK, Reach, blocked_attention, num_pairs
from jsfdd.models.splash_attention import has_kernel, splash_attention
from jsfdd.models.target import hidden_states, init_params

REACHES = {
    "causal": Reach(),
    "window": Reach(5),
    "window of one block": Reach(4),
    "window as an array": Reach(jnp.int32(5)),
    "window longer than the sequence": Reach(99),
    "behind": Reach(behind=2),
    "behind by a block": Reach(behind=4),
    "window and behind": Reach(7, 2),
    "nothing is seen": Reach(2, 2),
    "behind by more than there are": Reach(behind=20),
}


def inputs(length=18, dtype=jnp.float32, rows=2):
    """q, k, v of 2 rows, 2 key/value heads and 3 queries that share one."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (rows, length, 2, 3, 8), (rows, 2, 8, length), (rows, 2, length, 8)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes)]


def both(form, reach, **changes):
    """What queries read, the log-sum-exps, and the gradients of a sum that both enter."""

    def mixed(q, k, v):
        y, lse = form(q, k, v, 0.3, reach, **changes)
        finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return jnp.sum(jnp.sin(3 * y)) + jnp.sum(jnp.cos(finite)), (y, lse)

    return jax.jit(jax.grad(mixed, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES.keys())
@pytest.mark.parametrize("block", [4, None], ids=["blocks", "one block"])
def test_blocks_compute_the_equation_and_its_gradient(reach, block):
    """18 positions in blocks of 4, of which the last is half full; and in one of 18."""
    gradients, (y, lse) = both(blocked_attention, reach, block=block)(*inputs())
    expected_gradients, (expected, expected_lse) = both(quadratic_attention, reach)(*inputs())
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, expected_gradients)
    assert reach in (Reach(2, 2), Reach(behind=20)) or np.abs(expected_gradients[1]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("reach", [Reach(), Reach(130), Reach(behind=2)], ids=["causal", "window", "behind"])
def test_the_kernel_computes_the_equation_and_its_gradient(monkeypatch, reach):
    """300 positions in blocks of 128, of which one cannot be seen from the last; the last block is not full."""
    monkeypatch.setattr("jsfdd.models.splash_attention.BLOCK", 128)
    q, k, v = inputs(300, rows=1)
    gradients, (y, lse) = both(splash_attention, reach, with_lse=True, interpret=True)(q, k, v)
    expected_gradients, (expected, expected_lse) = both(quadratic_attention, reach)(q, k, v)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), gradients, expected_gradients)


@pytest.mark.slow
def test_the_kernel_has_a_gradient_where_no_log_sum_exp_is_wanted(monkeypatch):
    """Four blocks of 128, two of keys at a time, and the kernel's own backward pass."""
    monkeypatch.setattr("jsfdd.models.splash_attention.BLOCK", 128)
    q, k, v = inputs(500, rows=1)

    def mixed(form, **changes):
        def total(q, k, v):
            y, lse = form(q, k, v, 0.3, Reach(), **changes)
            return jnp.sum(jnp.sin(3 * y)), (y, lse)

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    gradients, (y, lse) = mixed(splash_attention, interpret=True)
    expected_gradients, (expected, _) = mixed(quadratic_attention)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), gradients, expected_gradients)
    assert lse is None


def test_a_cpu_has_no_kernel():
    """Neither where nothing says what device it is, nor where a mesh says that it is a CPU."""
    assert not has_kernel(4096, Reach())
    found = []

    def look(_, x):
        found.append(has_kernel(4096, Reach()))
        return x

    jax.eval_shape(map_over_devices(look, make_mesh(2)), None, jnp.zeros(2))
    assert found == [False]


def test_the_equation_is_attention_under_a_mask():
    q, k, v = inputs()
    y, lse = quadratic_attention(q, k, v, 0.3, Reach(6))
    mask = np.tri(18, dtype=bool) & ~np.tri(18, k=-6, dtype=bool)
    np.testing.assert_allclose(y, attention(q, k, v, jnp.broadcast_to(mask, (2, 18, 18)), 0.3), atol=1e-6)
    logits = np.where(mask, 0.3 * np.einsum("btkgh,bkhs->bkgts", q, k), -np.inf)
    np.testing.assert_allclose(lse, np.log(np.exp(logits).sum(-1)).transpose(0, 3, 1, 2), atol=1e-5)


def test_blocks_in_bfloat16_are_as_near_to_float32_as_the_equation():
    exact, _ = quadratic_attention(*inputs(), 0.3, Reach())
    q, k, v = inputs(dtype=jnp.bfloat16)
    y, lse = blocked_attention(q, k, v, 0.3, Reach(), 4)
    rounded, _ = quadratic_attention(q, k, v, 0.3, Reach())
    assert (y.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert np.abs(y - exact).max() < 1.5 * np.abs(rounded - exact).max() < 0.05


@pytest.mark.parametrize("block", [18, 4, 1])
def test_harmonised_columns_share_one_softmax(monkeypatch, block):
    """Written out: step n sees step 1's keys up to t − n + 1, and of step m > 1 the key at t − (n − m)."""
    monkeypatch.setattr("jsfdd.models.blocked_attention.BLOCK", block)
    q = inputs()[0]
    steps = [(k + n, v - n) for n, (_, k, v) in enumerate([inputs()] * 3)]

    def slow(q, steps):
        masks = [np.tri(18, k=-2, dtype=bool), np.eye(18, k=-1, dtype=bool), np.eye(18, dtype=bool)]
        mask = jnp.broadcast_to(np.concatenate(masks, axis=1), (2, 18, 54))
        k, v = (jnp.concatenate(x, axis=axis) for x, axis in zip(zip(*steps), (3, 2)))
        return attention(q, k, v, mask, 0.3)

    def fast(q, steps):
        return harmonised_attention(q, steps, 0.3)

    np.testing.assert_allclose(jax.jit(fast)(q, steps), slow(q, steps), atol=1e-6)
    got, expected = (jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(3 * f(*x))), (0, 1)))(q, steps) for f in (fast, slow))  # noqa: B023
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


@pytest.mark.parametrize("trained", [False, True], ids=["read", "trained"])
def test_memory_grows_linearly_with_length(trained):
    """Four times the tokens, four times the temporaries: [T, T] logits would be sixteen."""
    config = toy_config(num_heads=8)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def total(params, tokens):
        return jnp.sum(hidden_states(config, params, tokens))

    def temporaries(length):
        f = jax.jit(jax.grad(total) if trained else total)
        compiled = f.lower(params, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(8 * BLOCK), temporaries(32 * BLOCK)
    assert long < 4.2 * short
    assert long < 32 * BLOCK * config.num_heads * 8 * BLOCK  # a tenth of all logits and less


def test_blocks_are_of_one_size():
    assert [num_pairs(length) for length in (BLOCK // 2, BLOCK, 2 * BLOCK)] == [BLOCK**2 // 4, BLOCK**2, 3 * BLOCK**2]
    assert num_pairs(BLOCK + 2) == 3 * (BLOCK // 2 + 1) ** 2  # two blocks of half the size, not two whole ones
