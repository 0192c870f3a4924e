"""How the outcomes of one token's distribution lie in a row of a store, as words of 16 bits:

    m float16     logarithms of the outcomes' probabilities: of k tokens, and of the tail behind them (`soft_top_k.py`)
    k ids         low words, and then, where there are more than 65,536 tokens, high words

A logarithm is rounded to one part in 2,048, so the probabilities no longer sum to 1: readers take them as logits. −∞ becomes
float16's lowest number, of which exp is 0 as well.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt16

_LOWEST = -65504.0  # of float16


def num_outcomes(k: int, limited: bool) -> int:
    """The k tokens and the tail; one more where a draft vocabulary limits the draft: all that it cannot propose."""
    return k + 1 + limited


def row_words(k: int, vocab_size: int, draft_vocab: int) -> int:
    """Words of a row of `k` tokens. `draft_vocab` is the size of the draft vocabulary that numbers them, 0 without one."""
    return num_outcomes(k, draft_vocab > 0) + k * _words_per_id(draft_vocab or vocab_size)


def pack(log_probs: Float[Array, "R M"], ids: Int[Array, "R K"], vocab_size: int) -> UInt16[Array, "R W"]:
    """The rows; `ids` are below `vocab_size`."""
    floats = jnp.maximum(log_probs, _LOWEST).astype(jnp.float16)
    words = [jax.lax.bitcast_convert_type(floats, jnp.uint16), ids.astype(jnp.uint16)]
    if _words_per_id(vocab_size) == 2:
        words.append((ids >> 16).astype(jnp.uint16))
    return jnp.concatenate(words, axis=1)


def unpack(rows: UInt16[Array, "R W"], k: int, outcomes: int) -> tuple[Float[Array, "R M"], Int[Array, "R K"]]:
    """(log_probs float32, ids int32), as they were packed but for rounding."""
    floats = jax.lax.bitcast_convert_type(rows[:, :outcomes], jnp.float16)
    low, *high = jnp.split(rows[:, outcomes:].astype(jnp.int32), (rows.shape[1] - outcomes) // k, axis=1)
    return floats.astype(jnp.float32), low + sum(part << 16 for part in high)


def _words_per_id(vocab_size: int) -> int:
    return 1 if vocab_size <= 1 << 16 else 2
