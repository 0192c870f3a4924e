"""The metrics of a sample: how token scores become a sample's score, and which end of the scores a selection keeps.

Adding a metric to `METRICS` is enough: scores.parquet gets a column for it, `jsfdd select --metric` and `jsfdd run --arms`
take its name, and the report labels it. (A metric of a token score that `TokenScores` lacks needs that score first: one
line there, in `flatness.token_scores` and in its fast twin.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a sample is scored, and how a selection uses the score.

    Attributes:
      label: the name in tables and plots.
      token_score: the field of `TokenScores` that the metric aggregates; None if it does not depend on the target.
      keep: the end of the scores that a selection keeps.
      reason: why that end.
      aggregate: takes the scores of a sample's counted tokens, float64, and returns the sample's.
    """

    label: str
    token_score: str | None
    keep: Literal["large", "small"]
    reason: str
    aggregate: Callable[[np.ndarray], float] = np.mean


def perplexity(nll: np.ndarray) -> float:
    """exp of the mean negative log-likelihood."""
    return np.exp(np.mean(nll))


METRICS = {
    "flatness": Metric("flatness", "flatness", "large", "where the target is flat the draft has most to learn"),
    "flatness_median": Metric("median flatness", "flatness", "large", "as flatness; outliers weigh less", np.median),
    "entropy": Metric("entropy", "entropy", "large", "a large entropy is an uncertain target"),
    "top1": Metric("largest probability", "top1", "small", "a small top probability is an uncertain target"),
    "margin": Metric("margin", "margin", "small", "a small margin is an uncertain target"),
    "energy": Metric("energy", "energy", "large", "no token has much evidence"),
    "ppl": Metric("perplexity", "nll", "large", "the answer surprises the target", perplexity),
    "random": Metric("chance", None, "large", "the control: the numbers mean nothing"),
}

MetricName = Literal[*METRICS]


def column_names() -> tuple[str, ...]:
    """The metrics that scoring computes, in the order of the table."""
    return tuple(name for name, metric in METRICS.items() if metric.token_score is not None)
