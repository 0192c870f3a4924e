"""The data-parallel map is pmap, one device and four alike, and it does not communicate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsfdd.base.mesh import make_mesh, map_over_devices, replicate, round_up_to_shards, shard_rows, sum_over_devices


def _rows(params, batch):
    """A loop per device, so that a hidden collective would have something to wait for."""
    x = batch["x"] @ params["w"]
    return {"y": jax.lax.fori_loop(0, 3, lambda _, v: jnp.tanh(v), x), "n": jnp.sum(x, axis=1)}


@pytest.fixture
def inputs():
    key = jax.random.key(0)
    return {"w": jax.random.normal(key, (8, 5))}, {"x": jax.random.normal(jax.random.key(1), (12, 8))}


def test_equal_to_pmap_and_to_one_device_bit_for_bit(inputs):
    params, batch = inputs
    mapped = map_over_devices(_rows, make_mesh())(params, batch)
    one = map_over_devices(_rows, make_mesh(data=1))(params, batch)
    split = jax.tree.map(lambda x: x.reshape(4, 3, *x.shape[1:]), batch)
    old = jax.pmap(_rows, in_axes=(None, 0))(params, split)
    for name in mapped:
        assert np.array_equal(mapped[name], np.asarray(old[name]).reshape(mapped[name].shape))
        assert np.allclose(mapped[name], one[name], atol=1e-6)


def test_no_collective(inputs):
    params, batch = inputs
    text = map_over_devices(_rows, make_mesh()).lower(params, batch).compile().as_text()
    assert not any(name in text for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))


def test_sum_over_devices_is_the_sum_with_one_reduction(inputs):
    params, batch = inputs
    mesh = make_mesh()

    def total(params, batch):
        return jnp.sum(batch["x"] @ params["w"], axis=0)

    summed = jax.jit(sum_over_devices(total, mesh))
    assert np.allclose(summed(params, batch), total(params, batch), rtol=1e-5)
    text = summed.lower(replicate(params, mesh), shard_rows(batch, mesh)).compile().as_text()
    assert text.count(" all-reduce(") == 1


def test_a_model_axis_is_left_to_the_compiler(inputs):
    params, batch = inputs
    assert np.allclose(
        map_over_devices(_rows, make_mesh(data=2, model=2))(params, batch)["y"], _rows(params, batch)["y"], atol=1e-6
    )


def test_indivisible_rows_are_an_error(inputs):
    params, batch = inputs
    with pytest.raises(ValueError, match="divisible"):
        map_over_devices(_rows, make_mesh())(params, {"x": batch["x"][:10]})


@pytest.mark.parametrize("data, model", [(-1, 3), (8, 1), (4, 2), (-1, 0)])
def test_impossible_meshes_are_named(data, model):
    with pytest.raises(ValueError, match="devices"):
        make_mesh(data, model)


@pytest.mark.parametrize("rows, padded", [(1, 4), (4, 4), (5, 8)])
def test_rows_are_rounded_up_to_the_data_shards(rows, padded):
    assert round_up_to_shards(rows, make_mesh()) == padded and round_up_to_shards(rows, make_mesh(data=1)) == rows
