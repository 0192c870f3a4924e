"""The cost of each stage, computed from shapes: memory of one device, FLOPs, bytes written.

memory      bytes on one device: parameters, batch, the arrays that a step keeps, and its largest temporaries. The
            compiler fuses some of these and pads others; tests compare the sum with its allocation, on a CPU and for TPUs.
arithmetic  two FLOPs per multiply-add of the matrix products, including padding and those masked keys that are computed.
disk        the most that the stage writes.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from jsfdd.base.tuning import fast_memory, scoring_block, vocabulary_block
from jsfdd.commands.score import hidden_bytes
from jsfdd.commands.stores import soft_target_bytes
from jsfdd.data.batches import Shape, choose_shapes, make_batches
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.blocked_attention import BLOCK
from jsfdd.models.draft import DraftConfig, init_draft
from jsfdd.models.flops import forward_flops, idle_entries, step_flops
from jsfdd.models.sharding import shard_shape
from jsfdd.models.target import init_params
from jsfdd.training.draft_shape import draft_of
from jsfdd.training.recipe import Recipe

IDLE = "idle target"  # the part of a stage's memory that its program neither reads nor makes


class Lengths(NamedTuple):
    """Tokens and counted tokens of each conversation. `source` says how they were determined."""

    tokens: np.ndarray
    counted: np.ndarray
    source: str


class Stage(NamedTuple):
    """The cost of one stage: `memory` of one device in bytes, by part; FLOPs of the whole stage; bytes written."""

    name: str
    memory: dict[str, float]
    flops: float
    disk: float

    @property
    def peak(self) -> float:
        """Bytes of one device."""
        return sum(self.memory.values())

    @property
    def program(self) -> float:
        """Bytes of one device that the stage's program takes: all but what lies idle beside it."""
        return self.peak - self.memory.get(IDLE, 0.0)


def num_params(config: DecoderConfig) -> tuple[int, int]:
    """The number of a target's parameters, and of those that a token meets: not all, of a mixture of experts."""
    total = sum(math.prod(shape) for _, shape in _param_shapes(config))
    return total, total - idle_entries(config)


def param_bytes(config: DecoderConfig, itemsize: int, model_shards: int) -> int:
    """Bytes of a target's parameters on one device; norm scales are float32."""
    return sum(
        math.prod(shard_shape(name, shape, model_shards)) * (4 if name.endswith("/scale") else itemsize)
        for name, shape in _param_shapes(config)
    )


@functools.lru_cache(maxsize=8)  # a plan asks for every mesh, and tracing takes long
def _param_shapes(config: DecoderConfig) -> list[tuple[str, tuple[int, ...]]]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    return [("/".join(key.key for key in path), leaf.shape) for path, leaf in leaves]


@functools.lru_cache(maxsize=8)
def draft_params(draft: DraftConfig) -> int:
    """The number of parameters of a draft."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(lambda: init_draft(draft, jax.random.key(0)))))


def layer_temporaries(config: DecoderConfig, shape: Shape, itemsize: int, model_shards: int, platform: str) -> float:
    """Bytes of one layer's temporaries for one batch on one device: attention's or the MLP's, whichever is larger.

    An accelerator's compiler fuses more: it rotates queries and keys where they lie, and gate, up and their product are one.
    """
    tokens = shape.rows * shape.length
    heads = config.num_heads / model_shards
    projections = tokens * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim / model_shards * itemsize
    fuses = platform != "cpu"
    attention = (1 if fuses else 2) * projections + block_temporaries(config, shape, itemsize, model_shards)
    if shape.length > BLOCK:
        attention += tokens * heads * config.head_dim * 4  # what queries have read so far, in float32
    if (experts := config.experts) is None:
        return max(attention, (1 if fuses else 3) * tokens * config.intermediate_size / model_shards * itemsize)
    # Every token as often as experts read it: sorted, twice as wide as an expert, its sum, and again in its own order.
    routed = tokens * experts.chosen * (3 * config.hidden_size + 2 * experts.intermediate_size / model_shards) * itemsize
    return max(attention, routed)


def block_temporaries(config: DecoderConfig, shape: Shape, itemsize: int, model_shards: int) -> float:
    """Bytes of what attention makes of one pair of blocks: logits and weights in float32, weights again in the dtype."""
    block = min(shape.length, BLOCK)
    return shape.rows * config.num_heads / model_shards * block**2 * (2 * 4 + itemsize)


def head_temporaries(config: DecoderConfig, block: int, model_shards: int, arrays: int, platform: str) -> float:
    """Bytes of `arrays` float32 arrays [block, vocabulary]; an accelerator's compiler fuses all but the logits."""
    return (arrays if platform == "cpu" else 1) * 4 * block * config.vocab_size / model_shards


def tiled(size: int, tile: int, platform: str) -> int:
    """The size of an array's axis in memory: a TPU pads its last two to whole tiles."""
    return -(-size // tile) * tile if platform == "tpu" else size


def laid_out_anew(config: DecoderConfig, itemsize: int, platform: str, layers: bool) -> float:
    """Bytes of the weights that a program for TPUs copies at its start, once: the embedding and, for decoding, of the layers.

    A matrix lies so that padding is least. To be read row by row, the states' axis must come last, and if that is no whole
    number of tiles, the embedding and what writes to the states lie otherwise.
    """
    width = tiled(config.hidden_size, 128, platform)
    if width == config.hidden_size:
        return 0.0
    if not layers:
        return config.vocab_size * width * itemsize
    experts = config.experts
    ffn = experts.count * experts.intermediate_size if experts else config.intermediate_size
    written = ffn + config.num_heads * config.head_dim
    return (config.vocab_size + config.num_layers * written) * width * itemsize


def spilled(size: float, platform: str) -> float:
    """The bytes of small temporaries that take a device's main memory: on a TPU only what exceeds its fast memory."""
    return size if size > fast_memory(platform) else 0.0


def largest_shape(config: DecoderConfig, lengths: Lengths, batch_tokens: int, platform: str) -> Shape:
    """The batch of which one layer's temporaries are the largest."""
    return max(_batch_shapes(lengths.tokens, batch_tokens), key=lambda shape: layer_temporaries(config, shape, 2, 1, platform))


def score_stage(
    config: DecoderConfig, lengths: Lengths, batch_tokens: int, itemsize: int, model_shards: int, platform: str
) -> Stage:
    """Scoring: the target reads all conversations, one batch per device, and its head the counted tokens."""
    shapes = _batch_shapes(lengths.tokens, batch_tokens)
    largest = largest_shape(config, lengths, batch_tokens, platform)
    state = largest.rows * largest.length * config.hidden_size * itemsize
    layer = 2 * state + layer_temporaries(config, largest, itemsize, model_shards, platform)  # its output and residual branch
    logits = head_temporaries(config, scoring_block(platform), model_shards, 3, platform)
    head = 2 * config.hidden_size * config.vocab_size * float(lengths.counted.sum())
    return Stage(
        "score",
        {
            "target": param_bytes(config, itemsize, model_shards),
            "hidden": spilled(state, platform),
            "temporaries": max(spilled(layer, platform), logits),
        },
        forward_flops(config, shapes) + head,
        disk=len(lengths.tokens) * 128.0,  # eight numbers, an id and a source
    )


def hidden_stage(
    config: DecoderConfig,
    lengths: Lengths,
    batch_tokens: int,
    retain_ratio: float,
    recipe: Recipe,
    itemsize: int,
    model_shards: int,
    platform: str,
) -> Stage:
    """Computing hidden states: scoring without the head, on the kept samples; the states are stored as bfloat16."""
    kept, read = retain_ratio * float(lengths.tokens.sum()), len(draft_of(config, recipe, ()).target_layers)
    largest = largest_shape(config, lengths, batch_tokens, platform)
    state = largest.rows * largest.length * config.hidden_size * itemsize
    layer = (2 + read) * state + layer_temporaries(config, largest, itemsize, model_shards, platform)
    return Stage(
        "hidden states",
        {
            "target": param_bytes(config, itemsize, model_shards),
            "hidden": (1 + read) * state,
            "temporaries": spilled(layer, platform),
        },
        retain_ratio * forward_flops(config, _batch_shapes(lengths.tokens, batch_tokens)),
        disk=hidden_bytes("bfloat16", config.hidden_size, kept, read),
    )


def soft_targets_stage(
    config: DecoderConfig,
    lengths: Lengths,
    batch_tokens: int,
    retain_ratio: float,
    recipe: Recipe,
    itemsize: int,
    model_shards: int,
    platform: str,
) -> Stage:
    """Computing soft targets of the kept samples: one product with the head per counted token, for means two."""
    kept = retain_ratio * float(lengths.tokens.sum())
    largest = max(_batch_shapes(lengths.tokens, batch_tokens), key=lambda shape: shape.rows * shape.length)
    head = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size * itemsize / model_shards
    products = {"means": 2, "top_k": 1, None: 0}[recipe.stored_soft_targets(hidden_is_stored=True)]
    return Stage(
        "soft targets",
        {
            "target": param_bytes(config, itemsize, model_shards),
            "head": head,
            "batch": 3 * largest.rows * largest.length * config.hidden_size * 4,
            "temporaries": head_temporaries(config, vocabulary_block(platform), model_shards, 2, platform),
        },
        products * 2 * config.hidden_size * config.vocab_size * retain_ratio * float(lengths.counted.sum()),
        disk=soft_target_bytes(recipe, True, config, kept),
    )


def train_stage(
    config: DecoderConfig,
    lengths: Lengths,
    batch_tokens: int,
    retain_ratio: float,
    recipe: Recipe,
    itemsize: int,
    model_shards: int,
    data_shards: int,
    platform: str,
) -> Stage:
    """Training. Every device holds the draft, its gradient and two moments in float32; the data shards share the batch.

    A step reads the target's embedding and of an untied head a copy, transposed (`loss.borrow`); the rest lies idle.
    With soft targets a token needs two products with the head, for the draft's logits and their gradient; without them a third,
    for the target's logits.
    """
    draft = draft_of(config, recipe, ())
    shapes = _batch_shapes(lengths.tokens, batch_tokens)
    on_device = [Shape(-(-shape.rows // data_shards), shape.length) for shape in shapes]
    largest = max(on_device, key=lambda shape: layer_temporaries(draft.decoder, shape, 4, 1, platform))
    tokens, width = largest.rows * largest.length, config.hidden_size
    embedding = config.vocab_size * width * itemsize / model_shards
    size = draft_params(draft) * 4
    # The arrays that the forward pass keeps for the backward pass, and on a CPU their gradients, for which accelerators reuse
    # them. Logits are made anew.
    projections = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    size_of_one = 2 if recipe.compute_dtype == "bfloat16" else 4
    kept = recipe.unrolled * tokens * size_of_one * (8 * width + 4 * config.intermediate_size + 2 * projections)
    kept = 2 * kept if platform == "cpu" else kept
    parts = len(draft.target_layers) + 1
    counted = float(lengths.counted.sum())
    products = recipe.head_products + (recipe.stored_soft_targets(hidden_is_stored=True) is None)
    flops = step_flops(draft, shapes, counted, products=products, draft_steps=recipe.unrolled)
    return Stage(
        "train",
        {
            IDLE: param_bytes(config, itemsize, model_shards) - embedding,
            "embedding and head": embedding if config.tie_embeddings else 2 * embedding,
            "laid out anew": laid_out_anew(config, itemsize, platform, layers=False) / model_shards,
            "draft, moments, gradient": 4 * size,
            "batch": (1 + parts) * tokens * width * itemsize,
            "activations": spilled(kept + block_temporaries(draft.decoder, largest, 4, 1), platform),
            "temporaries": head_temporaries(config, vocabulary_block(platform), model_shards, 2, platform),
        },
        recipe.epochs * retain_ratio * flops,
        disk=2 * 3 * size,  # two checkpoints of the draft and its moments
    )


def evaluate_stage(
    config: DecoderConfig,
    recipe: Recipe,
    slots: int,
    batch_size: int,
    itemsize: int,
    model_shards: int,
    data_shards: int,
    platform: str,
) -> Stage:
    """Decoding: the target, the draft in its dtype, and both caches of `slots` slots. FLOPs depend on τ, so they are NaN."""
    rows = -(-batch_size // data_shards)
    few = min(8, 1 << (config.num_kv_heads - 1).bit_length())  # the smallest tile that holds the heads, of up to eight
    heads, head_dim = tiled(config.num_kv_heads, few, platform), tiled(config.head_dim, 128, platform)
    cache = 2 * (config.num_layers + 1) * rows * heads * head_dim * slots * itemsize
    draft = draft_params(draft_of(config, recipe, ())) * itemsize
    prompts = Shape(rows, slots)
    return Stage(
        "evaluate",
        {
            "target": param_bytes(config, itemsize, model_shards),
            "draft": draft,
            "caches": cache / model_shards,
            "laid out anew": laid_out_anew(config, itemsize, platform, layers=True) / model_shards,
            "temporaries": spilled(layer_temporaries(config, prompts, itemsize, model_shards, platform), platform),
        },
        math.nan,
        disk=0.0,
    )


def _batch_shapes(tokens: np.ndarray, batch_tokens: int) -> list[Shape]:
    """The shape of every batch."""
    return [plan.shape for plan in make_batches(tokens, choose_shapes(tokens, batch_tokens))]
