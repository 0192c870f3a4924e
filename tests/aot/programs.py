"""Every stage's compiled program for a TPU that need not be there: libtpu's compiler runs on a CPU.

    mesh = topology_mesh("v5e:2x4")
    text = score(mesh, TOY).compile().as_text()        # the schedule that eight TPU v5e would run

Arguments are shapes with a place on the mesh, so nothing is allocated. Norm scales are float32 and all else is bfloat16, as
`load_target` reads a target for an accelerator.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jsfdd.base.mesh import map_over_devices
from jsfdd.base.records import Batch, DraftBatch
from jsfdd.decoding.generate import generate, prepare_drafts
from jsfdd.decoding.settings import DecodeSetup, TreeShape
from jsfdd.decoding.state import DecodeParams, PromptBatch
from jsfdd.hidden.capture import make_hidden_step
from jsfdd.models.architecture import DecoderConfig, Rope
from jsfdd.models.draft import draft_config, init_draft
from jsfdd.models.target import init_params
from jsfdd.scoring.score import make_score_step
from jsfdd.training.loss import borrow
from jsfdd.training.recipe import Recipe
from jsfdd.training.step import init_state, make_optimizer, make_train_step

# The widths of a tile, so that what is read in the programs is not padding; seven layers, as an EAGLE-3 draft needs.
TOY = DecoderConfig(
    family="llama", vocab_size=2048, hidden_size=256, intermediate_size=512, num_layers=7, num_heads=4, num_kv_heads=2,
    head_dim=128, max_position=4096, rms_norm_eps=1e-5, rope=Rope(1e4), tie_embeddings=False,
)  # fmt: skip
SMOLLM2 = DecoderConfig(
    family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
    head_dim=64, max_position=8192, rms_norm_eps=1e-5, rope=Rope(1e5), tie_embeddings=True,
)  # fmt: skip
LLAMA_8B = DecoderConfig(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, max_position=131072, rms_norm_eps=1e-5, rope=Rope(5e5), tie_embeddings=False,
)  # fmt: skip
TREE = TreeShape(depth=4, top_k=4, nodes=12)


def topology_mesh(name: str) -> Mesh:
    """A mesh over "data" of the devices of a TPU slice, as `base.mesh.make_mesh` makes it of devices that are there."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return Mesh(np.array(devices).reshape(-1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def score(mesh, config, rows=1, length=512, hidden=True):
    """`score --keep-hidden` of `rows` rows a device, or without the hidden states."""
    return make_score_step(config, mesh, hidden_dtype="bfloat16" if hidden else None).lower(
        _whole(_target(config), mesh), _split(_batch(mesh, rows, length), mesh)
    )


def capture(mesh, config, rows=1, length=512, layers=()):
    """The pass that computes hidden states alone."""
    batch = _split(_batch(mesh, rows, length), mesh)
    return make_hidden_step(config, mesh, "bfloat16", layers).lower(_whole(_target(config), mesh), batch)


def train(mesh, config, rows=1, length=512, recipe=Recipe(compute_dtype="bfloat16")):  # noqa: B008
    """A training step with stored means, or as the recipe says."""
    draft = draft_config(config, kind=recipe.draft_kind)
    optimizer = make_optimizer(recipe, 100)
    state = jax.eval_shape(lambda: init_state(draft, optimizer, 0))
    frozen = jax.eval_shape(lambda: borrow(config, _zeros(_target(config))))
    rows *= mesh.shape["data"]
    width = (len(draft.target_layers) + 1) * config.hidden_size
    stored = {"eagle": ((config.hidden_size + 1,), jnp.bfloat16), "eagle3": ((96,), jnp.uint16)}[recipe.draft_kind]
    batch = DraftBatch(
        _shape((rows, length), jnp.int32),
        _shape((rows, length), jnp.bool_),
        _shape((rows, length), jnp.float32),
        _shape((rows, length, width), jnp.bfloat16),
        _shape((rows, length, *stored[0]), stored[1]),
    )
    step = make_train_step(draft, optimizer, mesh, recipe)
    return step.lower(_whole(frozen, mesh), _whole(state, mesh), _split(batch, mesh))


def decode(mesh, config, rows=1, length=128, tree=None, drafts=1, max_new_tokens=64):
    """Prompts read and answers decoded: with chains of four, a tree, or plainly."""
    draft = draft_config(config)
    depth = {"num_draft_tokens": 4, "tree": tree} if drafts else {}
    setup = DecodeSetup(target=config, drafts=(draft,) * drafts, max_new_tokens=max_new_tokens, stop_tokens=(2,), **depth)
    target = _target(config)
    trained = [jax.eval_shape(lambda: init_draft(draft, jax.random.key(0)))] * drafts
    weights = DecodeParams(target, target, jax.eval_shape(prepare_drafts, trained, target))

    def run(arguments, batch):
        return generate(setup, arguments[0], batch, arguments[1])

    rows *= mesh.shape["data"]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    batch = PromptBatch(_shape((rows, length), jnp.int32), _shape((rows,), jnp.int32), keys)
    arguments = _whole((weights, _shape((), jnp.float32)), mesh)
    return map_over_devices(run, mesh).lower(arguments, _split(batch, mesh))


def _target(config):
    def stored(path, leaf):
        return _shape(leaf.shape, jnp.float32 if path[-1].key == "scale" else jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(stored, jax.eval_shape(lambda: init_params(config, jax.random.key(0))))


def _zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _batch(mesh, rows, length):
    rows *= mesh.shape["data"]
    return Batch(_shape((rows, length), jnp.int32), _shape((rows, length), jnp.bool_), _shape((rows,), jnp.int32))


def _shape(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def _whole(tree, mesh):
    return _placed(tree, NamedSharding(mesh, P()))


def _split(tree, mesh):
    return _placed(tree, NamedSharding(mesh, P("data")))


def _placed(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
