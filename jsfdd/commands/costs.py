"""What each stage takes, from shapes alone: bytes of one device, FLOPs, bytes written.

The figures:

    memory      of one device: parameters, batch, what a step keeps, and the largest of its temporaries. The compiler
                fuses some of these and pads others; the tests hold the sum against what it allocates.
    arithmetic  multiply-adds of matrix products times two, padding included, masked attention too: it is computed.
    disk        what the stage writes, at most.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np

from jsfdd.base.tuning import scoring_block, vocabulary_block
from jsfdd.commands.score import hidden_bytes
from jsfdd.commands.train import soft_target_bytes
from jsfdd.data.batches import Shape, choose_shapes, make_batches
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.draft import DraftConfig, draft_config, init_draft
from jsfdd.models.flops import forward_flops, step_flops
from jsfdd.models.sharding import shard_shape
from jsfdd.models.target import init_params
from jsfdd.training.recipe import Recipe


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
        head_temporaries(config, scoring_block(jax.default_backend()), model_shards, 3),
    )
    head = 2 * config.hidden_size * config.vocab_size * float(lengths.counted.sum())
    return Stage(
        "score",
        {"target": param_bytes(config, itemsize, model_shards), "hidden": stream, "temporaries": temporaries},
        forward_flops(config, shapes) + head,
        disk=len(lengths.tokens) * 128.0,  # eight numbers, an id and a source
    )


def hidden_stage(
    config: DecoderConfig, lengths: Lengths, batch_tokens: int, retain_ratio: float, itemsize: int, model_shards: int
) -> Stage:
    """The same without the head, over what is kept; the hidden states go to disk as bfloat16."""
    score = score_stage(config, lengths, batch_tokens, itemsize, model_shards)
    kept = retain_ratio * float(lengths.tokens.sum())
    return Stage(
        "hidden states",
        score.memory,
        retain_ratio * forward_flops(config, _batch_shapes(lengths.tokens, batch_tokens)),
        disk=hidden_bytes("bfloat16", config.hidden_size, kept),
    )


def soft_targets_stage(
    config: DecoderConfig,
    lengths: Lengths,
    batch_tokens: int,
    retain_ratio: float,
    recipe: Recipe,
    itemsize: int,
    model_shards: int,
) -> Stage:
    """Soft targets of the kept samples, once: the head over the stored hidden states that count, and for means back."""
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
            "temporaries": head_temporaries(config, vocabulary_block(jax.default_backend()), model_shards, 2),
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
) -> Stage:
    """The draft, its gradient and two moments in float32 on every device; the batch is split over the data shards.

    The target stays where it is, and a head of its own is copied the other way round (`loss.borrow`). With soft targets a token
    meets the head twice, for q's logits and back; without them once more, for the target's.
    """
    draft = draft_config(config)
    shapes = _batch_shapes(lengths.tokens, batch_tokens)
    on_device = [Shape(-(-shape.rows // data_shards), shape.length) for shape in shapes]
    largest = max(on_device, key=lambda shape: layer_temporaries(draft.decoder, shape, 4, 1))
    tokens, width = largest.rows * largest.length, config.hidden_size
    head = 0 if config.tie_embeddings else config.vocab_size * width * itemsize / model_shards
    size = draft_params(draft) * 4
    # What the backward pass needs of the forward pass is kept; with it, each kept array's gradient for a while.
    kept = tokens * 4 * (2 * width + 6 * width + 4 * config.intermediate_size)
    kept += layer_temporaries(draft.decoder, largest, 4, 1)
    counted = float(lengths.counted.sum())
    products = 2 if recipe.stored_soft_targets(hidden_is_stored=True) else 3
    flops = step_flops(draft, shapes, counted, products=products)
    return Stage(
        "train",
        {
            "target": param_bytes(config, itemsize, model_shards),
            "head": head,
            "draft, moments, gradient": 4 * size,
            "batch": 4 * tokens * width * 4,
            "activations": 2 * kept,
            "temporaries": head_temporaries(config, vocabulary_block(jax.default_backend()), model_shards, 2),
        },
        recipe.epochs * retain_ratio * flops,
        disk=2 * 3 * size,  # two checkpoints of the draft and its moments
    )


def evaluate_stage(
    config: DecoderConfig, slots: int, batch_size: int, itemsize: int, model_shards: int, data_shards: int
) -> Stage:
    """Decoding: the target, the draft, and both caches of so many slots. The arithmetic depends on τ, so none is given."""
    rows = -(-batch_size // data_shards)
    cache = 2 * (config.num_layers + 1) * rows * config.num_kv_heads * config.head_dim * slots * itemsize
    draft = draft_params(draft_config(config)) * 4
    return Stage(
        "evaluate",
        {"target": param_bytes(config, itemsize, model_shards), "draft": draft, "caches": cache / model_shards},
        math.nan,
        disk=0.0,
    )


def _batch_shapes(tokens: np.ndarray, batch_tokens: int) -> list[Shape]:
    """The shape of every batch."""
    return [plan.shape for plan in make_batches(tokens, choose_shapes(tokens, batch_tokens))]
