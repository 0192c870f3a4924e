"""Token selection: within the kept samples, train only on the tokens with the flattest targets, or weight tokens by flatness.

    weights = token_weights(samples, read_token_scores(path), metric="flatness", retain_ratio=0.5, weighting="hard", seed=0)

The head, which takes most of a training step, runs only on tokens whose weight is above 0. The rest of the draft still reads
whole samples: a token without weight is context for the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:  # the command line imports this module, and must start fast
    from jsfdd.base.records import Sample
    from jsfdd.scoring.table import TokenRow

TokenMetric = Literal["flatness", "entropy", "random"]


def token_weights(
    samples: Sequence[Sample],
    scores: Mapping[str, TokenRow],
    *,
    metric: TokenMetric,
    retain_ratio: float,
    weighting: Literal["hard", "soft"],
    seed: int,
) -> dict[str, Float[np.ndarray, " T"]]:
    """Give every token a training weight: sample id -> float32[T], 0 for tokens that are not trained on.

    The counted tokens of all samples are ranked together. The round(retain_ratio · N) with the highest metric are kept, at
    least one; earlier samples and tokens win ties.

    Args:
      samples: the training samples; only their tokens are ranked.
      scores: per-token scores, of these samples at least.
      metric: flatness or entropy (nats) of the target's distribution; `random` ranks by chance.
      retain_ratio: the share of the tokens to keep.
      weighting: "hard" gives kept tokens the weight 1. "soft" gives them weights in proportion to the metric, with mean 1.
      seed: for the metric random.

    Raises:
      ValueError: a sample has no scores, or scores of other tokens.
    """
    values = [_values(sample, scores, metric, seed) for sample in samples]
    counted = np.concatenate([sample.counted for sample in samples])
    flat = np.concatenate(values)
    places = np.flatnonzero(counted)
    keep = max(round(retain_ratio * len(places)), 1)
    kept = places[np.argsort(-flat[places], kind="stable")[:keep]]
    weights = np.zeros(len(flat), np.float32)
    if weighting == "hard" or not flat[kept].sum():
        weights[kept] = 1.0
    else:
        weights[kept] = flat[kept] / flat[kept].mean()
    ends = np.cumsum([len(value) for value in values])[:-1]
    return dict(zip([sample.id for sample in samples], np.split(weights, ends), strict=True))


def _values(sample: Sample, scores: Mapping[str, TokenRow], metric: TokenMetric, seed: int) -> Float[np.ndarray, " T"]:
    if metric == "random":
        # Seeded by the sample's id, so that a token's rank does not depend on the other samples.
        digest = hashlib.sha256(f"{seed}:{sample.id}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big")).random(len(sample.tokens))
    if sample.id not in scores:
        raise ValueError(f"sample {sample.id} has no token scores; score the same data again with --per-token")
    row = scores[sample.id]
    if not np.array_equal(row.counted, sample.counted):
        raise ValueError(
            f"sample {sample.id}: its token scores are of other tokens; score again with --per-token, the same template, "
            "--max-length and --mask-spans"
        )
    return np.asarray(getattr(row, metric), np.float64)
