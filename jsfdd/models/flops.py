"""FLOPs of the models from shapes alone: multiply-adds of matrix products times two, with padding and what is computed for
masked keys: all of them in one block of positions, half and a little more in many."""

from __future__ import annotations

from collections.abc import Sequence

from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.blocked_attention import num_pairs
from jsfdd.models.draft import DraftConfig

Shapes = Sequence[tuple[int, int]]  # rows and length of each batch


def layer_matrices(config: DecoderConfig) -> int:
    """The number of entries in those of one layer's matrices that read a token: the token's multiply-adds."""
    experts, attention = config.experts, 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    if experts is None:
        return config.hidden_size * (attention + 3 * config.intermediate_size)
    return config.hidden_size * (attention + experts.count + 3 * experts.chosen * experts.intermediate_size)


def idle_entries(config: DecoderConfig) -> int:
    """The number of entries in all layers' matrices that a token does not meet: those of the experts that are not chosen."""
    if (experts := config.experts) is None:
        return 0
    return 3 * config.num_layers * (experts.count - experts.chosen) * config.hidden_size * experts.intermediate_size


def forward_flops(config: DecoderConfig, shapes: Shapes) -> float:
    """FLOPs of the layers for batches of these shapes."""
    tokens = sum(rows * length for rows, length in shapes)
    window = config.sliding_window if config.sliding_layers and all(config.sliding_layers) else None
    pairs = sum(rows * num_pairs(length, window) for rows, length in shapes)
    return 2 * config.num_layers * (layer_matrices(config) * tokens + 2 * config.num_heads * config.head_dim * pairs)


def step_flops(draft: DraftConfig, shapes: Shapes, visited: float, products: int, draft_steps: int = 1) -> float:
    """FLOPs of training a draft on batches of these shapes: a forward pass and twice as much backward, of each draft step.

    Args:
      visited: tokens that meet the vocabulary; of further draft steps at most as many do.
      products: with the head, of each such token: two and one more where the head learns, and one where the target's is asked.
      draft_steps: as in `draft_steps` of `models/draft.py`.
    """
    config, tokens = draft.decoder, sum(rows * length for rows, length in shapes)
    once, each_step = input_matrices(draft)
    layer = forward_flops(config, shapes) + 2 * each_step * tokens
    head = products * 2 * head_entries(draft) * visited
    return 3 * 2 * once * tokens + draft_steps * (3 * layer + head)


def input_matrices(draft: DraftConfig) -> tuple[int, int]:
    """The entries of the matrices with which a draft reads states and embeddings beside its layer's own: (those that meet the
    target's states once, those of each draft step)."""
    config, width = draft.decoder, draft.decoder.hidden_size
    if draft.kind == "eagle":
        return 0, 2 * width * width
    # fc only once; queries, keys and values read the embedding too.
    once = len(draft.target_layers) * width * width
    return once, width * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


def head_entries(draft: DraftConfig) -> int:
    """The number of entries in the head that a draft's outputs meet."""
    return draft.decoder.hidden_size * (len(draft.vocabulary) or draft.decoder.vocab_size)
