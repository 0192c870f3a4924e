"""All device knowledge: the mesh, the data-parallel map, and where arrays live.

`map_over_devices` is the brief's "pmap over accelerators" in its form of today: `jax.pmap` itself has become
`jit(shard_map)` and is in maintenance mode; a test holds the two equal.
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

from jsfdd.base.split_map import split_map


def make_mesh(data: int = -1, model: int = 1) -> Mesh:
    """A mesh with axes "data" (rows of a batch) and "model" (shards of one target); data=-1 takes all devices.

    Axes are Auto: under the default Explicit ones Linen's Embed refuses to trace.
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
    """How many ways a batch's rows are split: every batch must be a multiple of it."""
    return mesh.shape["data"]


def round_up_to_shards(rows: int, mesh: Mesh) -> int:
    """The least number of rows, at least `rows`, that the mesh's data shards divide."""
    return -(-rows // num_data_shards(mesh)) * num_data_shards(mesh)


def own_data_shards(mesh: Mesh) -> tuple[int, ...]:
    """The data shards whose rows this process reads and whose results it keeps: each belongs to exactly one process.

    Where a model axis spans processes, it is the process of the shard's first device.
    """
    return tuple(i for i, devices in enumerate(mesh.devices) if devices[0].process_index == jax.process_index())


def put(x, sharding: NamedSharding) -> jax.Array:
    """`x`, which every process has whole or which is sharded already, under `sharding`. Costs nothing where it is so."""
    if sharding.is_fully_addressable or isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding))
    # device_put would do it as well, but compares x over all processes first.
    host = np.asarray(x)
    return place(host.shape, sharding, lambda index: host[index])


def place(shape: tuple[int, ...], sharding: NamedSharding, build: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """An array of which this process builds only what its own devices hold: `build(index)` gives the block at `index`.

    A block that several devices hold is built once, and one block after the other, so the host never has more than one.
    """
    devices_of: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices_of.setdefault(tuple(s.indices(n)[:2] for s, n in zip(index, shape)), []).append(device)

    def placed(bounds, devices):
        block = build(tuple(slice(*each) for each in bounds))
        # device_put returns before it has copied, and keeps the block until then.
        return jax.block_until_ready([jax.device_put(block, device) for device in devices])

    parts = [part for each in devices_of.items() for part in placed(*each)]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def shard_rows(tree, mesh: Mesh):
    """Host arrays, leading axis split over "data"; of several processes all have all rows, and each uploads its own."""
    rows = {len(x) for x in jax.tree.leaves(tree)}
    if any(count % num_data_shards(mesh) for count in rows):
        raise ValueError(f"{sorted(rows)} rows do not divide among {num_data_shards(mesh)} data shards; pad the batch")
    sharding = NamedSharding(mesh, P("data"))
    return jax.tree.map(lambda x: put(x, sharding), tree)


def shard_built_rows(build: Callable[[int, int], Any], num_rows: int, mesh: Mesh):
    """As `shard_rows`, but each process only builds its own rows: `build(start, stop)` gives a tree of them."""
    shards = num_data_shards(mesh)
    if num_rows % shards:
        raise ValueError(f"{num_rows} rows do not divide among {shards} data shards; pad the batch")
    sharding = NamedSharding(mesh, P("data"))
    bounds = {
        device: index[0].indices(num_rows)[:2]
        for device, index in sharding.addressable_devices_indices_map((num_rows,)).items()
    }
    trees = {each: build(*each) for each in dict.fromkeys(bounds.values())}

    def assemble(*blocks):
        block_of = dict(zip(trees, blocks))
        parts = [jax.device_put(block_of[each], device) for device, each in bounds.items()]
        return jax.make_array_from_single_device_arrays((num_rows, *blocks[0].shape[1:]), sharding, parts)

    return jax.tree.map(assemble, *trees.values())


def own_rows(tree, mesh: Mesh) -> dict[int, Any]:
    """Of results whose leading axis is split over "data": {data shard: its rows on the host}, of `own_data_shards` only."""
    owned = {mesh.devices[shard][0]: shard for shard in own_data_shards(mesh)}
    leaves, structure = jax.tree.flatten(tree)
    on_device = [{shard.device: shard.data for shard in leaf.addressable_shards} for leaf in leaves]
    fetched = jax.device_get([[parts[device] for parts in on_device] for device in owned])
    return {shard: jax.tree.unflatten(structure, list(map(np.asarray, each))) for shard, each in zip(owned.values(), fetched)}


def replicate(tree, mesh: Mesh):
    """Put arrays whole on every device of the mesh."""
    sharding = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: put(x, sharding), tree)


def split_over_data(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where an array lives of which every device keeps a part: cut along its largest axis that the data shards divide.

    Whole on every device where they divide none.
    """
    divisible = [axis for axis, size in enumerate(shape) if size % num_data_shards(mesh) == 0]
    cut = max(divisible, key=lambda axis: shape[axis], default=None)
    return NamedSharding(mesh, P(*["data" if axis == cut else None for axis in range(len(shape))]))


def map_over_devices(f: Callable, mesh: Mesh, *, num_sharded: int = 1) -> Callable:
    """Compile `f(params, *args)` to run on each data shard's rows by itself, without communication between them.

    Args:
      f: takes pytrees; `params` whole or split over "model", then `num_sharded` trees whose leading axis is split over
        "data".
      mesh: from `make_mesh`. Where it has a "model" axis, see `split_map`.
      num_sharded: how many arguments after `params` are split by rows.

    Returns:
      The compiled function; the leading axis of all its results is split over "data". A leading axis that the number of
      data shards does not divide is an error at the call. Build it once: every new wrapper compiles again.
    """
    in_specs = (P(),) + (P("data"),) * num_sharded
    if mesh.shape["model"] == 1:
        # check_vma: a loop whose carry starts from a constant is a type error under the check.
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=P("data"), check_vma=False))
    mapped = split_map(f, mesh)

    def placed(*args):
        return mapped(*[_on_mesh(arg, NamedSharding(mesh, spec)) for arg, spec in zip(args, in_specs, strict=True)])

    return placed


def _on_mesh(tree, sharding: NamedSharding):
    """Arrays that are on the mesh already stay as they are split; the rest go under `sharding`."""

    def placed(x):
        on_mesh = isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) and x.sharding.mesh == sharding.mesh
        return x if on_mesh else put(x, sharding)

    return jax.tree.map(placed, tree)


def sum_over_devices(f: Callable, mesh: Mesh, *, num_sharded: int = 1) -> Callable:
    """`f(params, *args)` on each device's rows, its results summed: one all-reduce, whole on every device. Not compiled."""

    def summed(params, *args):
        return jax.lax.psum(f(params, *args), "data")

    return jax.shard_map(
        summed,
        mesh=mesh,
        axis_names={"data"},
        in_specs=(P(),) + (P("data"),) * num_sharded,
        out_specs=P(),
        check_vma=False,
    )


def to_host(tree):
    """Fetch arrays to numpy in one go; what other processes hold of them comes over the network."""

    def whole(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.tree.map(np.asarray, jax.device_get(jax.tree.map(whole, tree)))
