"""How a target's parameters are split over the mesh's "model" axis: one axis of each, by name.

The split is Megatron's (arXiv 1909.08053 §3): the projections that widen are cut by their outputs, the ones that narrow
by their inputs, and the vocabulary by its tokens, so that a layer needs only two sums over "model". The compiler inserts these
sums; of the split the model's code says only that heads stay whole.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jsfdd.base.mesh import is_split_over_model, put

# Name -> the axis that is split; None: small, whole on every device. Leaves under layers/ have the layers in front.
_SPLIT_AXIS = {
    "embed/embedding": 0,
    "head/kernel": 1,
    "norm/scale": None,
    "layers/input_norm/scale": None,
    "layers/mlp_norm/scale": None,
    "layers/post_attention_norm/scale": None,
    "layers/post_mlp_norm/scale": None,
    "layers/attention/q_norm/scale": None,
    "layers/attention/k_norm/scale": None,
    "layers/attention/q_proj/kernel": 2,
    "layers/attention/k_proj/kernel": 2,
    "layers/attention/v_proj/kernel": 2,
    "layers/attention/q_proj/bias": 1,
    "layers/attention/k_proj/bias": 1,
    "layers/attention/v_proj/bias": 1,
    "layers/attention/o_proj/kernel": 1,
    "layers/mlp/gate_proj/kernel": 2,
    "layers/mlp/up_proj/kernel": 2,
    "layers/mlp/down_proj/kernel": 1,
    # Every expert is cut as the MLP is: of experts cut by their number, a TPU's compiler gathers the weights.
    "layers/mlp/router/kernel": None,
    "layers/mlp/gate_experts/kernel": 3,
    "layers/mlp/up_experts/kernel": 3,
    "layers/mlp/down_experts/kernel": 2,
}


def param_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where the target's parameter `name` ("layers/mlp/up_proj/kernel", of `shape` in the params tree) lives.

    Errors as in `shard_shape`.
    """
    parts = zip(shape, shard_shape(name, shape, mesh.shape["model"]))
    return NamedSharding(mesh, P(*["model" if part < size else None for size, part in parts]))


def shard_shape(name: str, shape: tuple[int, ...], model_shards: int) -> tuple[int, ...]:
    """The shape of the part of the parameter `name`, of `shape`, that one device holds.

    Raises:
      ValueError: no rule names it, or the model shards do not divide the axis that its rule splits.
    """
    if name not in _SPLIT_AXIS:
        raise ValueError(f"parameter {name} {list(shape)}: no rule in models/sharding.py says how it is split; add one")
    axis = _SPLIT_AXIS[name]
    if axis is None:
        return shape
    if shape[axis] % model_shards:
        raise ValueError(
            f"--model-shards: {model_shards} does not divide the {shape[axis]} of parameter {name} {list(shape)}; "
            "choose a divisor of it"
        )
    return (*shape[:axis], shape[axis] // model_shards, *shape[axis + 1 :])


def whole_heads(x: Float[Array, "B T heads H"]) -> Float[Array, "B T heads H"]:
    """`x`, of which no device holds a part of a head: more model shards than heads would cut them, and halves that rotate
    against each other would change devices (`base.mesh.is_split_over_model`)."""
    if not is_split_over_model():
        return x
    return jax.lax.with_sharding_constraint(x, P(*[P.UNCONSTRAINED] * 3, None))


def split_vocabulary(tree, mesh: Mesh):
    """Matrices [V, …] split over "model" by their tokens, which the model shards must divide."""
    return jax.tree.map(lambda x: put(x, NamedSharding(mesh, P("model"))), tree)


def place_params(params: dict, mesh: Mesh) -> dict:
    """A target's params tree (layout: `models/target.py`) where it lives on `mesh`. Errors as in `param_sharding`."""

    def placed(path, leaf):
        name = "/".join(key.key for key in path)
        return put(leaf, param_sharding(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(placed, params)
