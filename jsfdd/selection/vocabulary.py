"""A draft's own vocabulary: the tokens worth proposing, so that its head is small (EAGLE-3's draft vocabulary, FR-Spec)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jsfdd.base.records import Sample


def frequent_tokens(samples: Sequence[Sample], size: int, vocab_size: int) -> tuple[int, ...]:
    """The `size` tokens that the answers have most often, ascending; of equals the lowest ids.

    What counts is what a draft could have proposed: every counted position's next token. Tokens that no answer has are
    taken, lowest first, only where there are not enough others.

    Raises:
      ValueError: `size` exceeds `vocab_size`.
    """
    if size > vocab_size:
        raise ValueError(f"--draft-vocab: {size} exceeds the target's vocabulary of {vocab_size} tokens")
    counts = np.zeros(vocab_size, np.int64)
    for sample in samples:
        np.add.at(counts, sample.tokens[1:][sample.counted[:-1]], 1)
    order = np.argsort(-counts, kind="stable")
    return tuple(np.sort(order[:size]).tolist())
