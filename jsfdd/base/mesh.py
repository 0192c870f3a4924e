"""Devices: the mesh, the data-parallel map, and how arrays are placed.

`map_over_devices` does what `jax.pmap` did. `jax.pmap` is in maintenance mode, and JAX itself now implements it as
`jit(shard_map)`; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(data: int = -1, model: int = 1) -> Mesh:
    """Make a mesh with axes "data" (rows of a batch) and "model" (shards of one target); data=-1 takes all devices.

    The axes are Auto, because Linen's Embed does not trace under Explicit ones, JAX's default.
    """
    available = jax.device_count()
    if model < 1 or available % model:
        raise ValueError(f"model={model} does not divide the {available} devices; choose a divisor")
    data = available // model if data == -1 else data
    if data < 1 or data * model > available:
        raise ValueError(f"a {data}x{model} mesh needs {data * model} devices and there are {available}")
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def num_data_shards(mesh: Mesh) -> int:
    """The number of parts that a batch's rows are split into; it must divide the number of rows."""
    return mesh.shape["data"]


def round_up_to_shards(rows: int, mesh: Mesh) -> int:
    """The smallest multiple of the mesh's data shards that is at least `rows`."""
    return -(-rows // num_data_shards(mesh)) * num_data_shards(mesh)


def own_data_shards(mesh: Mesh) -> tuple[int, ...]:
    """The data shards whose rows this process reads and whose results it keeps. Each shard belongs to exactly one process.

    If a model axis spans processes, a shard belongs to the process of its first device.
    """
    return tuple(i for i, devices in enumerate(mesh.devices) if devices[0].process_index == jax.process_index())


def put(x, sharding: NamedSharding) -> jax.Array:
    """Place `x` under `sharding`; free if it is there already. Every process must hold all of `x`, or `x` must be sharded."""
    if sharding.is_fully_addressable or isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding))
    # device_put would also work, but first compares x over all processes.
    host = np.asarray(x)
    return place(host.shape, sharding, lambda index: host[index])


def place(shape: tuple[int, ...], sharding: NamedSharding, build: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """Make an array block by block: `build(index)` returns the block at `index`, on the host.

    A process builds only the blocks that its own devices hold, once each and one at a time, so the host holds one block.
    """
    holders: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(tuple(s.indices(n)[:2] for s, n in zip(index, shape)), []).append(device)

    def place_block(bounds, devices):
        block = build(tuple(slice(start, stop) for start, stop in bounds))
        # device_put returns before it has copied the block, and keeps it alive until then.
        return jax.block_until_ready([jax.device_put(block, device) for device in devices])

    parts = [part for bounds, devices in holders.items() for part in place_block(bounds, devices)]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def shard_rows(tree, mesh: Mesh):
    """Split the leading axis of host arrays over "data". Every process holds all rows, and uploads its own."""
    rows = {len(x) for x in jax.tree.leaves(tree)}
    if any(count % num_data_shards(mesh) for count in rows):
        raise ValueError(f"{sorted(rows)} rows do not divide among {num_data_shards(mesh)} data shards; pad the batch")
    sharding = NamedSharding(mesh, P("data"))
    return jax.tree.map(lambda x: put(x, sharding), tree)


def shard_built_rows(build: Callable[[int, int], Any], num_rows: int, mesh: Mesh):
    """Like `shard_rows`, but each process builds only its own rows: `build(start, stop)` returns a tree of them."""
    shards = num_data_shards(mesh)
    if num_rows % shards:
        raise ValueError(f"{num_rows} rows do not divide among {shards} data shards; pad the batch")
    sharding = NamedSharding(mesh, P("data"))
    bounds = {
        device: index[0].indices(num_rows)[:2]
        for device, index in sharding.addressable_devices_indices_map((num_rows,)).items()
    }
    trees = {(start, stop): build(start, stop) for start, stop in dict.fromkeys(bounds.values())}

    def assemble(*leaves):
        blocks = dict(zip(trees, leaves))
        parts = [jax.device_put(blocks[rows], device) for device, rows in bounds.items()]
        return jax.make_array_from_single_device_arrays((num_rows, *leaves[0].shape[1:]), sharding, parts)

    return jax.tree.map(assemble, *trees.values())


def own_rows(tree, mesh: Mesh) -> dict[int, Any]:
    """Fetch this process's rows of results whose leading axis is split over "data": {data shard: rows on the host}."""
    shards = own_data_shards(mesh)
    leaves, structure = jax.tree.flatten(tree)
    on_device = [{part.device: part.data for part in leaf.addressable_shards} for leaf in leaves]
    fetched = jax.device_get([[parts[mesh.devices[shard][0]] for parts in on_device] for shard in shards])
    return {shard: jax.tree.unflatten(structure, list(map(np.asarray, rows))) for shard, rows in zip(shards, fetched)}


def replicate(tree, mesh: Mesh):
    """Put whole arrays on every device of the mesh."""
    sharding = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: put(x, sharding), tree)


def split_over_data(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding that cuts an array along its largest axis that the data shards divide, or along none if there is none."""
    divisible = [axis for axis, size in enumerate(shape) if size % num_data_shards(mesh) == 0]
    cut = max(divisible, key=lambda axis: shape[axis], default=None)
    return NamedSharding(mesh, P(*["data" if axis == cut else None for axis in range(len(shape))]))


def map_over_devices(f: Callable, mesh: Mesh, *, num_sharded: int = 1) -> Callable:
    """Compile `f(params, *args)` to run on each data shard's rows separately, without communication between shards.

    Args:
      f: takes pytrees: `params`, whole or split over "model", then `num_sharded` trees whose leading axis is split over
        "data".
      mesh: from `make_mesh`. Over "model" the compiler divides the work, by where the parameters are.
      num_sharded: how many arguments after `params` are split by rows.

    Returns:
      The compiled function; the leading axis of all its results is split over "data". Call `map_over_devices` once and
      keep the function: each new one compiles again.

    Raises (at the call):
      ValueError: the number of data shards does not divide a leading axis.
    """
    mapped = _over_data(f, mesh, P("data"), num_sharded)
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, P("data")))


def sum_over_devices(f: Callable, mesh: Mesh, *, num_sharded: int = 1) -> Callable:
    """Map `f(params, *args)` over each device's rows and sum the results with one all-reduce. The caller compiles it."""

    def summed(params, *args):
        return jax.lax.psum(f(params, *args), "data")

    return _over_data(summed, mesh, P(), num_sharded)


def _over_data(f: Callable, mesh: Mesh, out_spec: P, num_sharded: int) -> Callable:
    """`f(params, *args)` of each data shard's rows; "model" is left to the compiler, whose collectives stay within a shard.

    So data shards need not agree how often a loop goes round. Only XLA's CPU backend takes one kind of collective, a
    permutation, for a meeting of all devices, and waits in such a loop for ever: see `is_split_over_model`.
    """
    in_specs = (P(),) + (P("data"),) * num_sharded
    # With nothing left to the compiler, kernels written for one device can be used (`models/splash_attention.py`).
    axes = {"data"} if mesh.shape["model"] > 1 else set(mesh.axis_names)
    # check_vma would reject a loop whose carry starts from a constant.
    return jax.shard_map(f, mesh=mesh, axis_names=axes, in_specs=in_specs, out_specs=out_spec, check_vma=False)


def is_split_over_model() -> bool:
    """Whether the code that is being traced runs on arrays that the compiler splits over "model".

    Code for which the compiler would insert permutations takes another way then: on a CPU all devices meet for one, and wait
    for ever where data shards go round a loop a different number of times.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return "model" in mesh.auto_axes and mesh.shape["model"] > 1


def to_host(tree):
    """Fetch arrays to numpy in one transfer; parts that other processes hold come over the network."""

    def whole(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.tree.map(np.asarray, jax.device_get(jax.tree.map(whole, tree)))
