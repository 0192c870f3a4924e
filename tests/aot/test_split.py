"""A target split over "model", compiled for four times two TPUs: what its devices exchange, and with whom."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import SHAPE, TOY

from jsfdd.base.records import Batch
from jsfdd.commands.ahead import topology_mesh
from jsfdd.models.sharding import param_sharding
from jsfdd.models.target import init_params
from jsfdd.scoring.score import make_score_step


def test_a_layer_has_two_sums_within_a_data_shard():
    """Nothing is exchanged between data shards, and the loop over layers has the two all-reduces of a layer."""
    devices = topology_mesh("v5e:2x4").devices.reshape(4, 2)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def stored(path, leaf):
        name = "/".join(key.key for key in path)
        dtype = jnp.float32 if name.endswith("scale") else jnp.bfloat16
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=param_sharding(name, leaf.shape, mesh))

    params = jax.tree_util.tree_map_with_path(stored, jax.eval_shape(lambda: init_params(TOY, jax.random.key(0))))
    rows, split = 4 * SHAPE.rows, NamedSharding(mesh, P("data"))
    shapes = ((rows, SHAPE.length), jnp.int32), ((rows, SHAPE.length), jnp.bool_), ((rows,), jnp.int32)
    batch = Batch(*[jax.ShapeDtypeStruct(shape, dtype, sharding=split) for shape, dtype in shapes])
    text = make_score_step(TOY, mesh, hidden_dtype="bfloat16").lower(params, batch).compile().as_text()
    found = [line for line in text.splitlines() if re.search(r" (all|collective|reduce-scatter)[\w-]*\(", line)]
    assert found and all("replica_groups=[4,2]<=[8]," in line for line in found), found
    of_layers = [line for line in found if "DecoderLayer" in line]
    assert len(of_layers) == 2 and all(" all-reduce" in line for line in of_layers), of_layers
