"""The map over devices for a target split over "model": one program per data shard, over that shard's model devices.

A single program for all data shards could hang in a loop. XLA places some collectives over all devices, so data shards
whose rows need different numbers of steps would wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def split_map(f: Callable, mesh: Mesh) -> Callable:
    """Compile `f(*args)` separately for the devices of each data shard.

    Args:
      f: takes pytrees of arrays that are whole, split over "model", or split over "data" by their leading axis.
      mesh: has axes "data" and "model".

    Returns:
      A function of arrays that are placed on `mesh`. The leading axis of its results is split over "data".
    """
    groups = {
        shard: Mesh(devices[None], mesh.axis_names, axis_types=mesh.axis_types)
        for shard, devices in enumerate(mesh.devices)
        if any(device.process_index == jax.process_index() for device in devices)
    }
    programs = {shard: jax.jit(f, out_shardings=NamedSharding(group, P("data"))) for shard, group in groups.items()}

    def mapped(*args):
        # Dispatch is asynchronous, so the shards run side by side.
        results = [
            program(*jax.tree.map(lambda x, group=groups[shard]: _part_on(x, group, mesh), args))
            for shard, program in programs.items()
        ]
        return jax.tree.map(lambda *parts: _joined(parts, mesh), *results)

    return mapped


def _part_on(x: jax.Array, group: Mesh, mesh: Mesh) -> jax.Array:
    """The part of `x` on one data shard's devices, as an array on those devices only; nothing is copied."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_part_on(jax.random.key_data(x), group, mesh))
    spec = (*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec)))
    shape = tuple(size // mesh.shape["data"] if part == "data" else size for size, part in zip(x.shape, spec))
    data = {part.device: part.data for part in x.addressable_shards}
    parts = [data[device] for device in group.local_devices]
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(group, P(*spec)), parts)


def _joined(parts: tuple[jax.Array, ...], mesh: Mesh) -> jax.Array:
    """Join the results of this process's data shards into one array whose leading axis is split over "data"."""
    shape = (parts[0].shape[0] * mesh.shape["data"], *parts[0].shape[1:])
    data = [shard.data for part in parts for shard in part.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, P("data")), data)
