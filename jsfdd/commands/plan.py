"""`plan`: does it fit on these devices, and for how long does it run at least? The costs of the stages are in `costs.py`.

No weights are read and nothing is allocated: a 70B config.json will do. Time is arithmetic over all devices' peak or
measured matmul rate: a lower bound, never a promise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from jsfdd.base.hardware import KNOWN_DEVICES
from jsfdd.commands.configs import PlanConfig
from jsfdd.commands.costs import Lengths, Stage, plan_stages
from jsfdd.data.chat import Chat, read_chats
from jsfdd.data.template import tokenize_chats
from jsfdd.models.architecture import DecoderConfig
from jsfdd.weights.target import load_tokenizer, locate_target, read_architecture

GB = 1e9
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_CHARACTERS_PER_TOKEN = 4  # where there is no tokenizer to ask
_TEMPLATE_TOKENS = 5  # per message, where there is none
_USABLE = 0.9  # of a device's memory: the runtime and fragmentation take the rest


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
    """What `make_plan` found; `suggested` is the fewest model shards that fit, None if no number does."""

    stages: list[Stage]
    devices: Devices
    model_shards: int
    suggested: int | None
    lengths: Lengths


def make_plan(config: PlanConfig) -> Plan:
    """The plan of all stages for what `config` names.

    Raises:
      ValueError: --model-shards does not divide the devices or a parameter, or a device is not known; and what reading
        the config and the chats raises.
    """
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


def print_plan(plan: Plan) -> None:
    """The plan as a table on stdout."""
    out = Console(highlight=False)
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

    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()


def _matmul_rate(size: int = 1024) -> float:
    """FLOP/s of the best of five float32 products of two [size, size] matrices on the first device."""
    x = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(5):
        begin = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
