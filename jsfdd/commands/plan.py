"""`plan`: does it fit on these devices, and for how long does it run at least? The costs of the stages are in `costs.py`.

No weights are read and nothing is allocated: a 70B config.json will do. Time is arithmetic over all devices' peak or
measured matmul rate: a lower bound, never a promise.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from jsfdd.commands.options import DataOptions, TargetOptions, TrainingOptions
from jsfdd.commands.outcome import Outcome, rendered

if TYPE_CHECKING:
    from rich.console import Console

    from jsfdd.commands.costs import Lengths, Stage
    from jsfdd.data.chat import Chat
    from jsfdd.models.architecture import DecoderConfig

GB = 1e9
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_CHARACTERS_PER_TOKEN = 4  # where there is no tokenizer to ask
_TEMPLATE_TOKENS = 5  # per message, where there is none
_USABLE = 0.9  # of a device's memory: the runtime and fragmentation take the rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(TargetOptions, DataOptions):
    """Estimate memory, arithmetic and disk of every stage from shapes alone; no weights are read."""

    retain_ratio: float = 0.5
    """Share of the samples that are trained on."""
    epochs: int = 10
    """Passes over the kept samples."""
    soft_targets: Literal["means", "top_k"] = "means"
    """As of `train`."""
    soft_top_k: int = TrainingOptions.soft_top_k
    """As of `train`."""
    devices: int | None = None
    """How many devices; those that are here unless given."""
    device_kind: str | None = None
    """Which, as JAX names them: "TPU v5 lite", "NVIDIA H200", …; those that are here unless given."""
    device_memory: float | None = None
    """Memory of one in GB, where the kind is not known or not all of it is free."""
    device_rate: float | None = None
    """TFLOP/s of one in matrix products; unless given, the maker's bfloat16 peak or, for an unknown one here, measured."""


class Devices(NamedTuple):
    """What there is to run on.

    Attributes:
      count, kind: how many of which.
      memory: bytes of one.
      rate: FLOP/s of one in matrix products.
      source: where the rate is from.
    """

    count: int
    kind: str
    memory: float
    rate: float
    source: str


class Plan(NamedTuple):
    """What `prepare` found; `suggested` is the fewest model shards that fit, None if no number does."""

    stages: list[Stage]
    devices: Devices
    model_shards: int
    suggested: int | None
    lengths: Lengths


def prepare(config: PlanConfig) -> Plan:
    """The plan of all stages for what `config` names.
    Raises:
      ValueError: --model-shards does not divide the devices or a parameter, or a device is not known; and what reading
        the config and the chats raises.
    """
    import numpy as np

    from jsfdd.commands.costs import Lengths, plan_stages
    from jsfdd.data.chat import read_chats
    from jsfdd.data.template import tokenize_chats
    from jsfdd.weights.target import load_tokenizer, locate_target, read_architecture

    chats = read_chats(config.data)
    target = read_architecture(config.target)
    devices = find_devices(config)
    if devices.count % config.model_shards:
        raise ValueError(f"--model-shards: {config.model_shards} does not divide the {devices.count} devices")
    path = locate_target(config.target, weights=False)
    if path.is_dir() and not any((path / name).exists() for name in _TOKENIZER_FILES):
        lengths = estimate_lengths(chats, config.max_length)
    else:
        samples, _ = tokenize_chats(chats, load_tokenizer(config.target), config.max_length, config.mask_spans)
        counted = np.array([sample.counted.sum() for sample in samples])
        lengths = Lengths(np.array([len(sample.tokens) for sample in samples]), counted, "tokenized")
    stages = plan_stages(target, lengths, config, devices.count, config.model_shards)
    return Plan(stages, devices, config.model_shards, suggest_model_shards(target, lengths, config, devices), lengths)


def run(config: PlanConfig, plan: Plan) -> Outcome:
    stages = [stage._asdict() | {"flops": None if math.isnan(stage.flops) else stage.flops} for stage in plan.stages]
    values = {"command": "plan", "stages": stages, "devices": plan.devices._asdict()}
    values |= {"model_shards": plan.model_shards, "suggested_model_shards": plan.suggested}
    return Outcome(values, rendered(lambda out: print_plan(plan, out)).rstrip("\n"))


def print_plan(plan: Plan, out: Console) -> None:
    """The plan as a table."""
    from rich import box
    from rich.table import Table

    devices, lengths = plan.devices, plan.lengths
    out.print(
        f"{devices.count} × {devices.kind}, {devices.memory / GB:.0f} GB and {devices.rate / 1e12:.3g} TFLOP/s each "
        f"({devices.source}), as {devices.count // plan.model_shards} × {plan.model_shards} (data × model)"
    )
    out.print(
        f"{len(lengths.tokens)} conversations, {lengths.tokens.sum():,} tokens, {lengths.counted.sum():,} counted "
        f"({lengths.source})"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("stage", "GB a device", "of which", "PFLOP", "at least", "disk GB"):
        table.add_column(name, justify="left" if name in ("stage", "of which") else "right")
    for stage in plan.stages:
        parts = ", ".join(f"{name} {size / GB:.3g}" for name, size in stage.memory.items())
        seconds = stage.flops / (devices.count * devices.rate)
        known = not math.isnan(stage.flops)
        table.add_row(
            stage.name, f"{stage.peak / GB:.3g}", parts, f"{stage.flops / 1e15:.3g}" if known else "",
            f"{seconds:,.0f} s" if known else "", f"{stage.disk / GB:.3g}",
        )  # fmt: skip
    out.print(table)
    if plan.suggested is None:
        out.print(f"no mesh of these {devices.count} devices holds every stage: take more, larger ones, or --batch-tokens less")
    else:
        out.print(
            f"smallest that fits: --model-shards {plan.suggested}, a mesh of {devices.count // plan.suggested} × "
            f"{plan.suggested}"
        )


def suggest_model_shards(config: DecoderConfig, lengths: Lengths, options: PlanConfig, devices: Devices) -> int | None:
    """The fewest model shards with which every stage fits in 90% of a device's memory; None if no number does."""
    from jsfdd.commands.costs import plan_stages

    for shards in range(1, devices.count + 1):
        if devices.count % shards or not _divides(config, shards):
            continue
        stages = plan_stages(config, lengths, options, devices.count, shards)
        if max(stage.peak for stage in stages) <= _USABLE * devices.memory:
            return shards
    return None


def find_devices(options: PlanConfig) -> Devices:
    """The devices that the options name; what they leave open is taken from those that are here.

    Raises:
      ValueError: a kind that is neither here nor known, without its memory and rate.
    """
    import jax

    from jsfdd.base.hardware import KNOWN_DEVICES

    here = jax.devices()[0]
    kind = options.device_kind or here.device_kind
    count = options.devices or jax.device_count()
    memory, rate = options.device_memory, options.device_rate
    known = KNOWN_DEVICES.get(kind)
    if known is None and kind != here.device_kind and (memory is None or rate is None):
        raise ValueError(
            f"--device-kind: {kind!r} is not known, so give --device-memory and --device-rate; known are "
            f"{', '.join(KNOWN_DEVICES)}"
        )
    source = "given"
    if rate is None:
        rate, source = (known[1], "peak, bfloat16") if known else (_matmul_rate() / 1e12, "measured here")
    if memory is None:
        memory = known[0] if known else _memory_here() / GB
    return Devices(count, kind, memory * GB, rate * 1e12, source)


def estimate_lengths(chats: Sequence[Chat], max_length: int) -> Lengths:
    """Where there is no tokenizer: four characters a token, and five tokens of template a message."""
    import numpy as np

    from jsfdd.commands.costs import Lengths

    tokens, counted = [], []
    for chat in chats:
        sizes = [(m["role"], len(m["content"]) // _CHARACTERS_PER_TOKEN) for m in chat.messages]
        tokens.append(min(sum(size + _TEMPLATE_TOKENS for _, size in sizes), max_length))
        counted.append(min(sum(size for role, size in sizes if role == "assistant"), tokens[-1]))
    return Lengths(np.array(tokens), np.array(counted), "estimated: no tokenizer, four characters a token")


def _divides(config: DecoderConfig, shards: int) -> bool:
    return not any(
        size % shards
        for size in (config.vocab_size, config.intermediate_size, config.num_heads, config.num_kv_heads * config.head_dim)
    )


def _memory_here() -> float:
    """Bytes of one device: the host's, shared by all, where the device is its CPU."""
    import os

    import jax

    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()


def _matmul_rate(size: int = 1024) -> float:
    """FLOP/s of the best of five float32 products of two [size, size] matrices on the first device."""
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
