"""All device knowledge: the mesh, the data-parallel map, and where arrays live.

`map_over_devices` is the brief's "pmap over accelerators" in its form of today: `jax.pmap` itself has become
`jit(shard_map)` and is in maintenance mode; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


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


def shard_rows(tree, mesh: Mesh):
    """Put host arrays on the devices, leading axis split over "data"."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), tree)


def replicate(tree, mesh: Mesh):
    """Put arrays whole on every device of the mesh."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())), tree)


def map_over_devices(f: Callable, mesh: Mesh, *, num_sharded: int = 1, donate: tuple[int, ...] = ()) -> Callable:
    """Compile `f(params, *args)` to run on each device's rows by itself, without communication.

    Args:
      f: takes pytrees; `params` whole on every device, then `num_sharded` trees whose leading axis is split over "data".
      mesh: from `make_mesh`. A "model" axis is left to the compiler, so `f` may use sharded parameters.
      num_sharded: how many arguments after `params` are split by rows.
      donate: positions of arguments whose buffers the result may reuse.

    Returns:
      The compiled function; the leading axis of all its results is split over "data". A leading axis that the number of
      data shards does not divide is an error at the call. Build it once: every new wrapper compiles again.
    """
    mapped = jax.shard_map(
        f,
        mesh=mesh,
        axis_names={"data"},
        in_specs=(P(),) + (P("data"),) * num_sharded,
        out_specs=P("data"),
        check_vma=False,  # a loop whose carry starts from a constant is a type error under the check
    )
    return jax.jit(mapped, donate_argnums=donate)


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


def describe_hardware() -> dict:
    """What a figure was measured on: platform, device kind and count, host cores."""
    import os

    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
    }


def to_host(tree):
    """Fetch arrays to numpy in one go."""
    return jax.tree.map(np.asarray, jax.device_get(tree))
