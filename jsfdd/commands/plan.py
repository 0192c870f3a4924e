"""`jsfdd plan`: estimate whether a run fits on the devices, and its shortest time. `costs.py` computes each stage's cost.

No weights are read and nothing is allocated, so a 70B model's config.json is enough. The time is the FLOPs divided by the
devices' peak or measured rate of matrix products, which is a lower bound. With --compile, an accelerator's compiler says
beside the estimates what its programs take (`plan_compiled.py`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jsfdd.base.disk import free_bytes
from jsfdd.base.numbers import gigabytes
from jsfdd.commands.inputs import describe_target, read_chats_for
from jsfdd.commands.options import (
    ChatOptions,
    DecodingOptions,
    ModelOptions,
    OptionalInt,
    OptionalText,
    RecipeOptions,
    SelectionOptions,
    check_at_least,
    check_share,
)
from jsfdd.commands.outcome import Outcome, rendered, too_little_disk
from jsfdd.models.architecture import DraftKind
from jsfdd.training.recipe import SoftTargets

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from rich.console import Console

    from jsfdd.commands.costs import Lengths, Stage
    from jsfdd.data.chat import Chat
    from jsfdd.models.architecture import DecoderConfig

GB = 1e9
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_CHARACTERS_PER_TOKEN = 4  # an estimate, for targets without a tokenizer
_TEMPLATE_TOKENS = 5  # per message; an estimate, for targets without a tokenizer
_USABLE = 0.9  # share of a device's memory; the runtime and fragmentation take the rest

EXAMPLES = """
jsfdd plan --target smollm2 --data chats.jsonl
jsfdd plan --target DIR --data chats.jsonl --devices 16 --device-kind "TPU v5"
jsfdd plan --target DIR --data chats.jsonl --compile v5p:2x2x2
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Estimate memory, time and disk of every stage, without weights."""

    model: ModelOptions
    chats: ChatOptions
    retain_ratio: float = SelectionOptions.retain_ratio
    """Share of the samples that are trained on."""
    epochs: int = RecipeOptions.epochs
    """Passes over the kept samples."""
    draft_kind: DraftKind = RecipeOptions.draft_kind
    """The kind of draft to train."""
    soft_targets: SoftTargets = RecipeOptions.soft_targets
    """Soft targets to store, as for `jsfdd train`."""
    max_new_tokens: int = DecodingOptions.max_new_tokens
    """Longest answer of an evaluation, in tokens."""
    batch_size: int = 8
    """Prompts decoded together."""
    devices: OptionalInt = None
    """Number of devices. Default: those of this machine."""
    device_kind: OptionalText = None
    """Kind of the devices, as JAX names it: "TPU v5 lite", "NVIDIA H200", … Default: that of this machine."""
    compile: OptionalText = None
    """Also compile every stage for this slice of TPUs, as v5e:2x4 or v5p:2x2x2, or these GPUs, as h200:8, and say what the
    compiler says. Needs libtpu, or CUDA's compiler, no device, and minutes."""

    def __post_init__(self):
        check_share("--retain-ratio", self.retain_ratio)
        check_at_least(1, epochs=self.epochs, devices=self.devices)
        check_at_least(1, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        if self.compile and (self.devices or self.device_kind):
            raise ValueError("--compile: names the devices itself; leave --devices and --device-kind out")
        if self.compile and self.model.model_shards > 1:
            raise ValueError("--compile: compiles targets that fit a device whole; leave --model-shards out")


class Devices(NamedTuple):
    """The devices of a plan.

    Attributes:
      count, kind: their number and JAX's name of their kind.
      memory: bytes of one device.
      rate: FLOP/s of one device in matrix products.
      source: where the rate comes from.
    """

    count: int
    kind: str
    memory: float
    rate: float
    source: str


class Plan(NamedTuple):
    """The estimates; `suggested` is the smallest number of model shards that fits, None if none does. With --compile, `mesh` is
    of the devices and `target` what is compiled for it."""

    stages: list[Stage]
    devices: Devices
    model_shards: int
    suggested: int | None
    lengths: Lengths
    target: DecoderConfig
    mesh: Mesh | None = None

    @property
    def parameters(self) -> tuple[int, int]:
        """The number of the target's parameters, and of those that a token meets."""
        from jsfdd.commands.costs import num_params

        return num_params(self.target)


def prepare(config: PlanConfig) -> Plan:
    """Compute the whole plan.

    Raises:
      ValueError: --model-shards does not divide the devices or a parameter, a device kind or slice is unknown, a compiler is
        wanted and not installed, or the target's config or the chats are wrong.
    """
    mesh = None
    if config.compile:
        from jsfdd.commands.ahead import topology_mesh

        mesh = topology_mesh(config.compile, config.model.model_shards)
    devices = find_devices(config.devices, config.device_kind, mesh)
    model_shards = config.model.model_shards
    if devices.count % model_shards:
        raise ValueError(f"--model-shards: {model_shards} does not divide the {devices.count} devices")
    target, lengths = _read(config)
    stages = plan_stages(config, target, lengths, devices, model_shards)
    suggested = suggest_model_shards(config, target, lengths, devices)
    return Plan(stages, devices, model_shards, suggested, lengths, target, mesh)


def _read(config: PlanConfig) -> tuple[DecoderConfig, Lengths]:
    """Read the target's architecture, and the lengths of the conversations."""
    import numpy as np

    from jsfdd.commands.costs import Lengths
    from jsfdd.data.chat import ReadCounts, stream_chats
    from jsfdd.data.tokenized import usable_processes
    from jsfdd.weights.target import locate_target, read_architecture

    name = config.model.target
    target, path = read_architecture(name), locate_target(name, weights=False)
    if path.is_dir() and not any((path / file).exists() for file in _TOKENIZER_FILES):
        chats = stream_chats(config.chats.data, ReadCounts(), strict=config.chats.strict)
        return target, estimate_lengths(chats, min(config.chats.max_length, target.max_position))
    samples = read_chats_for(describe_target(config.model), config.chats, processes=usable_processes()).samples
    counted = np.fromiter((sample.counted.sum() for sample in samples), np.int64, len(samples))
    return target, Lengths(samples.lengths, counted, "tokenized")


def suggest_model_shards(config: PlanConfig, target: DecoderConfig, lengths: Lengths, devices: Devices) -> int | None:
    """The smallest number of model shards for which every stage fits in 90% of a device's memory; None if there is none."""
    for shards in range(1, devices.count + 1):
        if devices.count % shards == 0 and _divides(target, shards):
            stages = plan_stages(config, target, lengths, devices, shards)
            if max(stage.peak for stage in stages) <= _USABLE * devices.memory:
                return shards
    return None


def plan_stages(
    config: PlanConfig, target: DecoderConfig, lengths: Lengths, devices: Devices, model_shards: int
) -> list[Stage]:
    """The costs of all stages on `devices`, of which groups of `model_shards` share a copy of the target."""
    from jsfdd.commands import costs
    from jsfdd.training.recipe import Recipe

    dtype = _dtype(config, devices)
    recipe = Recipe(draft_kind=config.draft_kind, epochs=config.epochs, soft_targets=config.soft_targets, compute_dtype=dtype)
    itemsize, data_shards = 2 if dtype == "bfloat16" else 4, devices.count // model_shards
    platform = "cpu" if devices.kind == "cpu" else "tpu" if devices.kind.startswith("TPU") else "gpu"
    batch_tokens, kept, slots = config.chats.batch_tokens, config.retain_ratio, config.chats.max_length + config.max_new_tokens
    return [
        costs.score_stage(target, lengths, batch_tokens, itemsize, model_shards, platform),
        costs.hidden_stage(target, lengths, batch_tokens, kept, recipe, itemsize, model_shards, platform),
        costs.soft_targets_stage(target, lengths, batch_tokens, kept, recipe, itemsize, model_shards, platform),
        costs.train_stage(target, lengths, batch_tokens, kept, recipe, itemsize, model_shards, data_shards, platform),
        costs.evaluate_stage(target, recipe, slots, config.batch_size, itemsize, model_shards, data_shards, platform),
    ]


def _dtype(config: PlanConfig, devices: Devices) -> str:
    """Resolve --dtype for these devices."""
    if config.model.dtype != "auto":
        return config.model.dtype
    return "float32" if devices.kind == "cpu" else "bfloat16"


def run(config: PlanConfig, plan: Plan) -> Outcome:
    stages = [{name: _nan_to_none(value) for name, value in stage._asdict().items()} for stage in plan.stages]
    values = {"command": "plan", "stages": stages, "devices": plan.devices._asdict()}
    values |= {"model_shards": plan.model_shards, "suggested_model_shards": plan.suggested}
    values |= dict(zip(("parameters", "active_parameters"), plan.parameters, strict=True))
    text = rendered(lambda out: print_plan(plan, out)).rstrip("\n")
    if plan.mesh is not None:
        from jsfdd.commands.plan_compiled import compile_stages, print_compiled

        compiled = compile_stages(config, plan)
        values["compiled"] = [stage._asdict() | {"program": stage.program and stage.program._asdict()} for stage in compiled]
        text += "\n" + rendered(
            lambda out: print_compiled(config.compile, compiled, plan, out), soft_wrap=True, width=120
        ).rstrip("\n")
    return Outcome(values, text)


def describe(config: PlanConfig, plan: Plan) -> Outcome:
    """A plan runs no model and writes nothing, so its dry run is the plan, but for what is compiled."""
    return run(config, plan._replace(mesh=None))


def _nan_to_none(value):
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def print_plan(plan: Plan, out: Console) -> None:
    """Print the plan as a table."""
    from rich import box
    from rich.table import Table

    devices, lengths = plan.devices, plan.lengths
    out.print(
        f"{devices.count} × {devices.kind}, {devices.memory / GB:.0f} GB and {devices.rate / 1e12:.3g} TFLOP/s each "
        f"({devices.source}), as {devices.count // plan.model_shards} × {plan.model_shards} (data × model)"
    )
    total, active = plan.parameters
    met = f", of which a token meets {active / 1e9:,.3g}" if active < total else ""
    out.print(f"{total / 1e9:,.3g} billion parameters{met}")
    out.print(
        f"{len(lengths.tokens)} conversations, {lengths.tokens.sum():,} tokens, {lengths.counted.sum():,} counted "
        f"({lengths.source})"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("stage", "GB a device", "of which", "PFLOP", "at least", "disk GB"):
        table.add_column(name, justify="left" if name in ("stage", "of which") else "right")
    for stage in plan.stages:
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in stage.memory.items())
        seconds = stage.flops / (devices.count * devices.rate)
        known = not math.isnan(stage.flops)
        table.add_row(
            stage.name, gigabytes(stage.peak), parts, f"{stage.flops / 1e15:.3g}" if known else "",
            f"{seconds:,.0f} s" if known else "", gigabytes(stage.disk),
        )  # fmt: skip
    out.print(table)
    wanted, free = sum(stage.disk for stage in plan.stages), free_bytes(".")
    if wanted > free:
        out.print(too_little_disk(Path.cwd(), wanted, free), soft_wrap=True)
    if plan.suggested is None:
        out.print(
            f"no mesh of these {devices.count} devices fits every stage: use more or larger devices, or less --batch-tokens"
        )
    else:
        out.print(
            f"smallest that fits: --model-shards {plan.suggested}, a mesh of {devices.count // plan.suggested} × "
            f"{plan.suggested}"
        )


def find_devices(count: int | None, kind: str | None, mesh: Mesh | None = None) -> Devices:
    """Describe `count` devices of a kind; None stands for the number or kind of the mesh's devices, or this machine's.

    Raises:
      ValueError: a kind that is unknown and not this machine's.
    """
    import jax

    from jsfdd.base.hardware import KNOWN_DEVICES

    local_kind = jax.devices()[0].device_kind
    if mesh is not None:
        kind, count = mesh.devices.flat[0].device_kind, mesh.size
    kind, count = kind or local_kind, count or jax.device_count()
    if kind in KNOWN_DEVICES:
        memory, teraflops = KNOWN_DEVICES[kind]
        return Devices(count, kind, memory * GB, teraflops * 1e12, "peak, bfloat16")
    if kind != local_kind:
        raise ValueError(f"--device-kind: {kind!r} is unknown; choose from {', '.join(KNOWN_DEVICES)}")
    return Devices(count, kind, _local_memory(), _matmul_rate(), "measured here")


def estimate_lengths(chats: Iterable[Chat], max_length: int) -> Lengths:
    """Estimate lengths without a tokenizer: four characters per token, and five template tokens per message."""
    import numpy as np

    from jsfdd.commands.costs import Lengths

    tokens, counted = [], []
    for chat in chats:
        sizes = [(m["role"], len(m["content"]) // _CHARACTERS_PER_TOKEN) for m in chat.messages]
        tokens.append(min(sum(size + _TEMPLATE_TOKENS for _, size in sizes), max_length))
        counted.append(min(sum(size for role, size in sizes if role == "assistant"), tokens[-1]))
    return Lengths(np.array(tokens), np.array(counted), "estimated: no tokenizer, four characters a token")


def _divides(config: DecoderConfig, shards: int) -> bool:
    ffn = config.experts.intermediate_size if config.experts else config.intermediate_size
    return not any(size % shards for size in (config.vocab_size, ffn, config.num_heads, config.num_kv_heads * config.head_dim))


def _local_memory() -> float:
    """Bytes of one of this machine's devices. CPU devices share the host's memory equally."""
    import os

    import jax

    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()


def _matmul_rate(size: int = 1024) -> float:
    """Measure FLOP/s on the first device: the best of five float32 products of two [size, size] matrices."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(5):
        begin = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
