"""The programs of every stage, compiled for accelerators that need not be there: their compilers run on a CPU.

    mesh = topology_mesh("v5p:2x2x2")                            # or "h200:8"; topology_mesh(…, 8) splits the target over 8
    read_program(lower_score(config, mesh, Shape(4, 2048)))      # bytes, collectives, cycles, seconds of compiling

Arguments are shapes with a place on the mesh, so nothing is allocated. They are those of real runs on accelerators: norm scales
and what trains are float32, all else is bfloat16. Rows are those of one data shard; every shard has as many.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jsfdd.base.mesh import map_over_devices, num_data_shards
from jsfdd.base.records import Batch, DraftBatch
from jsfdd.base.tuning import scoring_block, vocabulary_block
from jsfdd.commands.gpu_kinds import KINDS, target_config
from jsfdd.commands.schedule import schedule
from jsfdd.data.batches import Shape
from jsfdd.decoding.generate import decode_prompts, prepare_drafts
from jsfdd.decoding.settings import DecodeSetup
from jsfdd.decoding.state import DecodeParams, PromptBatch
from jsfdd.hidden.capture import make_hidden_step
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.draft import draft_config, init_draft
from jsfdd.models.sharding import param_sharding
from jsfdd.models.target import init_params
from jsfdd.scoring.score import make_score_step
from jsfdd.training.loss import borrow
from jsfdd.training.recipe import Recipe
from jsfdd.training.soft_rows import row_words
from jsfdd.training.step import init_state, make_optimizer, make_train_step

if TYPE_CHECKING:
    from jax.stages import Lowered

# There is no TPU to ask about: libtpu is told what it would see, and that other processes may load it too.
_NO_AUTOTUNING = "--xla_gpu_autotune_level=0"
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d+)\[([\d,]*)\]")


class Program(NamedTuple):
    """What the compiler says of a program; bytes are of one device.

    Attributes:
      arguments, temporaries: bytes that it is given, and that it takes beside them and its results.
      results: bytes of its results, without those that take over an argument's.
      collectives: bytes of the results of each kind of exchange between devices, and how many there are.
      cycles: the compiler's own estimate, if it gives one (TPUs): see `schedule`. Of decoding, the prompts and one step.
      round_cycles: those of one round of the loops that depend on data: a block of counted tokens, or a step of decoding.
      seconds: CPU seconds of compiling.
    """

    arguments: int
    temporaries: int
    results: int
    collectives: Mapping[str, tuple[int, int]]
    cycles: float
    round_cycles: float
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes of one device."""
        return self.arguments + self.temporaries + self.results


class Compiled(NamedTuple):
    """A stage compiled for a batch of `shape`, and what it takes; where it does not fit, None and why."""

    name: str
    shape: Shape
    program: Program | None
    refused: str | None = None


def topology_mesh(name: str, model_shards: int = 1) -> Mesh:
    """A mesh of the devices of a TPU slice, such as v5e:2x4, v5p:2x2x2 or tpu7x:2x2x1, or of GPUs, such as h200:8.

    Raises:
      ValueError: the compiler's wheel is not installed, it knows no such devices, or the model shards do not divide them.
    """
    devices = _gpus(name) if name.partition(":")[0] in KINDS else _tpus(name)
    if len(devices) % model_shards:
        raise ValueError(f"--model-shards: {model_shards} does not divide the {len(devices)} devices of {name}")
    return Mesh(np.array(devices).reshape(-1, model_shards), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def _tpus(name: str) -> list:
    from jax.experimental import topologies

    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    try:
        import libtpu  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(f"{name}: compiling for TPUs needs libtpu: pip install 'jsfdd[tpu]'") from None
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("INVALID_ARGUMENT"):  # a fault of libtpu itself is no wrong name
            raise
        reason = str(error).removeprefix("INVALID_ARGUMENT: ").splitlines()[0]
        raise ValueError(f"{name}: no slice that libtpu knows ({reason}); write it as v5e:2x4, v5p:2x2x2 or v6e:4x4") from None


def _gpus(name: str) -> list:
    from jax.experimental import topologies

    kind, _, count = name.partition(":")
    if not re.fullmatch("[1-9][0-9]*", count) or (int(count) > 8 and int(count) % 8):
        raise ValueError(f"{name}: write how many GPUs, up to eight or whole hosts of eight, as {kind}:8")
    try:
        import jax_cuda13_plugin  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(f"{name}: compiling for GPUs needs CUDA's compiler: pip install 'jsfdd[cuda]'") from None
    # Kernels would be timed on a device to choose among them: without one XLA takes its default.
    flags = os.environ.get("XLA_FLAGS", "")
    if _NO_AUTOTUNING not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_NO_AUTOTUNING}"
    hosts, devices = max(int(count) // 8, 1), min(int(count), 8)
    return topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology=f"1x{hosts}x{devices}", target_config=target_config(KINDS[kind])
    ).devices


def lower_score(config: DecoderConfig, mesh: Mesh, shape: Shape, keep_hidden: bool = False) -> Lowered:
    """Scoring a batch, and keeping its hidden states."""
    step = make_score_step(config, mesh, hidden_dtype="bfloat16" if keep_hidden else None)
    return step.lower(_target(config, mesh), _split(_batch(mesh, shape), mesh))


def lower_hidden(config: DecoderConfig, mesh: Mesh, shape: Shape, layers: tuple[int, ...] = ()) -> Lowered:
    """Computing hidden states alone."""
    step = make_hidden_step(config, mesh, "bfloat16", layers)
    return step.lower(_target(config, mesh), _split(_batch(mesh, shape), mesh))


def lower_train(config: DecoderConfig, mesh: Mesh, shape: Shape, recipe: Recipe) -> Lowered:
    """A training step, with the soft targets that the recipe stores."""
    draft = draft_config(config, kind=recipe.draft_kind, target_layers=recipe.target_layers)
    optimizer = make_optimizer(recipe, 100)
    state = jax.eval_shape(lambda: init_state(draft, optimizer, 0))
    frozen = jax.eval_shape(lambda target: borrow(config, target), _target(config, mesh))
    rows, length = shape.rows * num_data_shards(mesh), shape.length
    stored = recipe.stored_soft_targets(hidden_is_stored=True)
    soft_targets = {
        None: None,
        "means": _array((rows, length, config.hidden_size + 1), jnp.bfloat16),
        "top_k": _array((rows, length, row_words(recipe.likeliest(config.vocab_size), config.vocab_size, 0)), jnp.uint16),
    }[stored]
    batch = DraftBatch(
        tokens=_array((rows, length), jnp.int32),
        counted=_array((rows, length), jnp.bool_),
        weight=_array((rows, length), jnp.float32),
        hidden=_array((rows, length, (len(draft.target_layers) + 1) * config.hidden_size), jnp.bfloat16),
        soft_targets=soft_targets,
    )
    step = make_train_step(draft, optimizer, mesh, recipe)
    frozen = _placed(frozen, NamedSharding(mesh, P("model")))  # by tokens, as `split_vocabulary` does
    return step.lower(frozen, _whole(state, mesh), _split(batch, mesh))


def lower_decode(setup: DecodeSetup, mesh: Mesh, shape: Shape) -> Lowered:
    """Reading prompts of this shape and decoding their answers."""
    target = _target(setup.target, mesh)
    trained = [jax.eval_shape(lambda draft=draft: init_draft(draft, jax.random.key(0))) for draft in setup.drafts]
    drafts = jax.eval_shape(prepare_drafts, trained, target)

    def run(arguments, batch):
        # `prepare_params` gives an accelerator the same arrays for prompts and for steps: one argument, not two.
        target, drafts, temperature = arguments
        return decode_prompts(setup, DecodeParams(target, target, drafts), batch, temperature)

    rows = shape.rows * num_data_shards(mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    batch = PromptBatch(_array((rows, shape.length), jnp.int32), _array((rows,), jnp.int32), keys)
    arguments = target, *_whole((drafts, _array((), jnp.float32)), mesh)
    return map_over_devices(run, mesh).lower(arguments, _split(batch, mesh))


def head_rounds(stage: str, mesh: Mesh, shape: Shape) -> int:
    """How often a stage's loop over counted tokens goes round if all count; 1 of a stage that has none."""
    platform = mesh.devices.flat[0].platform
    size = {"score": scoring_block(platform), "train": vocabulary_block(platform)}.get(stage)
    return 1 if size is None else -(-shape.rows * shape.length // size)


def read_program(lowered: Lowered, rounds: int = 1) -> Program:
    """Compile a program, and what the compiler says of it; `rounds` are those of loops that depend on data.

    Raises:
      jax.errors.JaxRuntimeError: it does not fit (RESOURCE_EXHAUSTED).
    """
    begun = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - begun
    memory, text = compiled.memory_analysis(), compiled.as_text()
    once, never = (sum(step.cycles for step in schedule(text, times)) for times in (1, 0))
    return Program(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        collectives=collectives(text),
        cycles=never + rounds * (once - never),
        round_cycles=once - never,
        seconds=seconds,
    )


def compile_stage(name: str, shape: Shape, lower: Callable[[], Lowered], rounds: int = 1) -> Compiled:
    """`read_program` of a stage; if it does not fit, what the compiler says of that, and the remedy."""
    try:
        return Compiled(name, shape, read_program(lower(), rounds))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).removeprefix("RESOURCE_EXHAUSTED: ").splitlines()[0].rstrip(".")
        largest = re.search(r"Size: (\S+)[\s\S]*?Shape: ([^{\s]+)", str(error))
        array = f"; the largest array is {largest[2]}, {largest[1]}" if largest else ""
        return Compiled(name, shape, None, f"{reason}{array}; run it with --model-shards, or less --batch-tokens")


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """The exchanges between devices in a compiled program: kind -> (bytes of their results, how many)."""
    exchanges: dict[str, tuple[int, int]] = {}
    for arrays, kind in _COLLECTIVE.findall(text):
        size, count = exchanges.get(kind, (0, 0))
        exchanges[kind] = size + sum(_bytes(*array) for array in _ARRAY.findall(arrays)), count + 1
    return exchanges


def _bytes(dtype: str, shape: str) -> int:
    bits = int(re.search(r"\d+", dtype)[0])
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _target(config: DecoderConfig, mesh: Mesh):
    """A target's parameters as `load_target` reads them for an accelerator and `place_params` places them."""

    def stored(path, leaf):
        place = param_sharding("/".join(key.key for key in path), leaf.shape, mesh)
        return _array(leaf.shape, jnp.float32 if path[-1].key == "scale" else jnp.bfloat16, sharding=place)

    return jax.tree_util.tree_map_with_path(stored, jax.eval_shape(lambda: init_params(config, jax.random.key(0))))


def _batch(mesh: Mesh, shape: Shape) -> Batch:
    rows = shape.rows * num_data_shards(mesh)
    return Batch(_array((rows, shape.length), jnp.int32), _array((rows, shape.length), jnp.bool_), _array((rows,), jnp.int32))


_array = jax.ShapeDtypeStruct


def _whole(tree, mesh: Mesh):
    return _placed(tree, NamedSharding(mesh, P()))


def _split(tree, mesh: Mesh):
    return _placed(tree, NamedSharding(mesh, P("data")))


def _placed(tree, sharding: NamedSharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
