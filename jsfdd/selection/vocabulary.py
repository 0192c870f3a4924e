"""A draft's reduced vocabulary: the most frequent tokens, so that its head is small (EAGLE-3's draft vocabulary, FR-Spec)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jsfdd.base.records import Sample


def frequent_tokens(samples: Sequence[Sample], size: int, vocab_size: int) -> tuple[int, ...]:
    """The `size` most frequent tokens of the answers, ascending; lower ids win ties.

    Only tokens that a draft could have proposed are counted: the next token of every counted position. If the answers have
    too few different tokens, the lowest other ids fill the vocabulary.

    Raises:
      ValueError: `size` exceeds `vocab_size`.
    """
    if size > vocab_size:
        raise ValueError(f"--draft-vocab: {size} exceeds the target's vocabulary of {vocab_size} tokens")
    order = np.argsort(-_counts(samples, vocab_size), kind="stable")
    return tuple(np.sort(order[:size]).tolist())


def covering_tokens(samples: Sequence[Sample], share: float, vocab_size: int) -> tuple[int, ...]:
    """The fewest of the most frequent tokens, ascending, that make at least `share` of what a draft could have proposed."""
    counts = _counts(samples, vocab_size)
    covered = np.cumsum(np.sort(counts)[::-1])
    return frequent_tokens(samples, int(np.searchsorted(covered, share * covered[-1])) + 1, vocab_size)


def _counts(samples: Sequence[Sample], vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, np.int64)
    for sample in samples:
        np.add.at(counts, sample.tokens[1:][sample.counted[:-1]], 1)
    return counts
