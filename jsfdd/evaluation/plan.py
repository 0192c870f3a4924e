"""`plan`: does it fit, and what does it cost? Memory, arithmetic and disk of every stage, from shapes alone.

No weights are read and nothing is allocated: a 70B config.json will do. What is counted, and what is not:

    memory      of one device: parameters, batch, what a step keeps, and the largest of its temporaries. The compiler
                fuses some of these and pads others; the tests hold the sum against what it allocates.
    arithmetic  multiply-adds of matrix products times two, padding included, masked attention too: it is computed.
    time        arithmetic over all devices' peak or measured matmul rate: a lower bound, never a promise.
    disk        what the stage writes, at most.
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

from jsfdd.config import PlanConfig
from jsfdd.data.batches import Shape, choose_shapes, make_batches
from jsfdd.data.chat import Chat, read_chats
from jsfdd.data.template import tokenize_chats
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.draft import DraftConfig, draft_config, init_draft
from jsfdd.models.sharding import shard_shape
from jsfdd.models.target import init_params
from jsfdd.selection.score import block_size
from jsfdd.weights.load import load_tokenizer, locate_target, read_architecture

# Device kind as JAX names it -> (memory in GB, dense bfloat16 TFLOP/s), as their makers state them: a page per version
# under docs.cloud.google.com/tpu/docs for TPUs, the data sheets for NVIDIA's SXM modules (half of their figures with sparsity).
KNOWN_DEVICES = {
    "TPU v4": (32, 275),
    "TPU v5 lite": (16, 197),
    "TPU v5": (95, 459),
    "TPU v6 lite": (32, 918),
    "NVIDIA A100-SXM4-80GB": (80, 312),
    "NVIDIA H100 80GB HBM3": (80, 989),
    "NVIDIA H200": (141, 989),
}
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


class Lengths(NamedTuple):
    """Per conversation: tokens, and those of them that count. `source` says how they were found."""

    tokens: np.ndarray
    counted: np.ndarray
    source: str


class Stage(NamedTuple):
    """Cost of one stage: `memory` of one device in bytes by part, FLOPs of the whole stage, bytes written."""

    name: str
    memory: dict[str, float]
    flops: float
    disk: float

    @property
    def peak(self) -> float:
        """Bytes of one device."""
        return sum(self.memory.values())


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


def param_bytes(config: DecoderConfig, itemsize: int, model_shards: int) -> int:
    """Bytes of a target's parameters on one device; norm scales are float32."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: init_params(config, jax.random.key(0)))):
        name = "/".join(key.key for key in path)
        size = 4 if name.endswith("/scale") else itemsize
        total += math.prod(shard_shape(name, leaf.shape, model_shards)) * size
    return total


def draft_params(draft: DraftConfig) -> int:
    """How many parameters a draft trains."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(lambda: init_draft(draft, jax.random.key(0)))))


def layer_matrices(config: DecoderConfig) -> int:
    """Entries of one layer's matrices: multiply-adds of one token."""
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return config.hidden_size * (width + config.num_heads * config.head_dim + 3 * config.intermediate_size)


def forward_flops(config: DecoderConfig, shapes: Sequence[Shape]) -> float:
    """FLOPs of the layers over batches of these shapes; attention over all pairs of a row, masked or not."""
    tokens = sum(shape.rows * shape.length for shape in shapes)
    pairs = sum(shape.rows * shape.length**2 for shape in shapes)
    return 2 * config.num_layers * (layer_matrices(config) * tokens + 2 * config.num_heads * config.head_dim * pairs)


def layer_temporaries(config: DecoderConfig, shape: Shape, itemsize: int, model_shards: int) -> float:
    """Bytes of the larger of attention's and the MLP's temporaries, of one layer and batch on one device."""
    tokens = shape.rows * shape.length
    heads = config.num_heads / model_shards
    projections = tokens * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim / model_shards * itemsize
    scores = shape.rows * heads * shape.length**2
    attention = 2 * projections + scores * (2 * 4 + itemsize)  # logits and weights in float32, weights again in dtype
    mlp = 3 * tokens * config.intermediate_size / model_shards * itemsize
    return max(attention, mlp)


def head_temporaries(config: DecoderConfig, block: int, model_shards: int, arrays: int) -> float:
    """Bytes of `arrays` float32 arrays of a block of tokens by the vocabulary."""
    return arrays * 4 * block * config.vocab_size / model_shards


def score_stage(config: DecoderConfig, lengths: Lengths, batch_tokens: int, itemsize: int, model_shards: int) -> Stage:
    """The target over all conversations, each device with batches of its own, and its head over what counts."""
    shapes = _batch_shapes(lengths.tokens, batch_tokens)
    largest = max(shapes, key=lambda shape: layer_temporaries(config, shape, itemsize, model_shards))
    stream = 3 * largest.rows * largest.length * config.hidden_size * itemsize  # before, after, and the other branch
    temporaries = max(
        layer_temporaries(config, largest, itemsize, model_shards),
        head_temporaries(config, block_size(), model_shards, 3),
    )
    head = 2 * config.hidden_size * config.vocab_size * float(lengths.counted.sum())
    return Stage(
        "score",
        {"target": param_bytes(config, itemsize, model_shards), "hidden": stream, "temporaries": temporaries},
        forward_flops(config, shapes) + head,
        disk=len(lengths.tokens) * 128.0,  # eight numbers, an id and a source
    )


def hidden_stage(config: DecoderConfig, lengths: Lengths, options: PlanConfig, itemsize: int, model_shards: int) -> Stage:
    """The same without the head, over what is kept; the hidden states go to disk as bfloat16."""
    score = score_stage(config, lengths, options.batch_tokens, itemsize, model_shards)
    shapes = _batch_shapes(lengths.tokens, options.batch_tokens)
    kept = options.retain_ratio * float(lengths.tokens.sum())
    return Stage(
        "hidden states",
        score.memory,
        options.retain_ratio * forward_flops(config, shapes),
        disk=kept * config.hidden_size * 2,
    )


def train_stage(
    config: DecoderConfig, lengths: Lengths, options: PlanConfig, itemsize: int, model_shards: int, data_shards: int
) -> Stage:
    """The draft, its gradient and two moments in float32 on every device; the batch is split over the data shards."""
    draft = draft_config(config)
    shapes = _batch_shapes(lengths.tokens, options.batch_tokens)
    own = [Shape(-(-shape.rows // data_shards), shape.length) for shape in shapes]
    largest = max(own, key=lambda shape: layer_temporaries(draft.decoder, shape, 4, 1))
    tokens, width = largest.rows * largest.length, config.hidden_size
    matrices = 1 if config.tie_embeddings else 2
    frozen = matrices * config.vocab_size * width * itemsize / model_shards
    size = draft_params(draft) * 4
    # What the backward pass needs of the forward pass is kept; with it, each kept array's gradient for a while.
    kept = tokens * 4 * (2 * width + 6 * width + 4 * config.intermediate_size)
    kept += layer_temporaries(draft.decoder, largest, 4, 1)
    steps = options.epochs * options.retain_ratio
    counted = float(lengths.counted.sum())
    fc = 2 * 2 * width * width * sum(shape.rows * shape.length for shape in shapes)
    flops = 3 * (forward_flops(draft.decoder, shapes) + fc) + 3 * 2 * width * config.vocab_size * counted
    return Stage(
        "train",
        {
            "frozen embedding, head": frozen,
            "draft, moments, gradient": 4 * size,
            "batch": 3 * tokens * width * 4,
            "activations": 2 * kept,
            "temporaries": head_temporaries(config, 128 if jax.default_backend() == "cpu" else 1024, model_shards, 4),
        },
        steps * flops,
        disk=2 * 3 * size,  # two checkpoints of the draft and its moments
    )


def evaluate_stage(config: DecoderConfig, options: PlanConfig, itemsize: int, model_shards: int, data_shards: int) -> Stage:
    """Decoding: the target, the draft, and both caches at the longest prompt. Its arithmetic depends on τ, so none is given."""
    slots = options.max_length + 128
    rows = -(-8 // data_shards)
    cache = 2 * (config.num_layers + 1) * rows * config.num_kv_heads * config.head_dim * slots * itemsize
    draft = draft_params(draft_config(config)) * 4
    return Stage(
        "evaluate",
        {"target": param_bytes(config, itemsize, model_shards), "draft": draft, "caches": cache / model_shards},
        math.nan,
        disk=0.0,
    )


def plan_stages(config: DecoderConfig, lengths: Lengths, options: PlanConfig, devices: int, model_shards: int) -> list[Stage]:
    """All stages on a mesh of `devices` of which `model_shards` share a copy of the target."""
    itemsize, data_shards = jnp.dtype(options.dtype).itemsize, devices // model_shards
    return [
        score_stage(config, lengths, options.batch_tokens, itemsize, model_shards),
        hidden_stage(config, lengths, options, itemsize, model_shards),
        train_stage(config, lengths, options, itemsize, model_shards, data_shards),
        evaluate_stage(config, options, itemsize, model_shards, data_shards),
    ]


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


def _batch_shapes(tokens: np.ndarray, batch_tokens: int) -> list[Shape]:
    """The shape of every batch."""
    return [plan.shape for plan in make_batches(tokens, choose_shapes(tokens, batch_tokens))]


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
