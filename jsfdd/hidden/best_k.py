"""Which samples can still be selected while scoring goes on: what a pass must keep of what it has seen.

A metric that keeps k samples (of all, or of each source) can at any time only take its k best of those scored so far: whoever
is behind k others stays behind them. So one pass that keeps just these ends with exactly what `sfdd.select` chooses, and never
holds more than k.

    stays = StillPossible(samples, ["flatness", "random"], retain_ratio=0.5, seed=0, always=held_out_ids)
    stays.score(table)                                                        # of each batch, as it is scored
    "sample id" in stays
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from jsfdd.base.records import Sample
from jsfdd.scoring.metrics import Metric
from jsfdd.scoring.table import ScoreTable
from jsfdd.selection.sfdd import Within, how_many, place_in_order, random_score


class BestK:
    """The k samples that a metric keeps first of those offered so far, by the order and the ties of `sfdd.select`."""

    def __init__(self, metric: Metric, k: int):
        self._metric, self._k = metric, k
        self._order: list[tuple[float, str]] = []
        self._ids: set[str] = set()

    def offer(self, sample_id: str, score: float) -> str | None:
        """Take in a sample that was not offered before; returns the one that goes, of more than k: it cannot come back."""
        bisect.insort(self._order, place_in_order(self._metric, score, sample_id))
        self._ids.add(sample_id)
        if len(self._order) <= self._k:
            return None
        gone = self._order.pop()[1]
        self._ids.remove(gone)
        return gone

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._ids


class StillPossible:
    """The samples that one of several selections of the same data may keep, given the scores so far.

    Args:
      samples: all of them. Those without a counted token are never selected, as their masks tell beforehand.
      metrics: of the selections, each of single samples. What `random` keeps is known at once.
      retain_ratio, seed, within: of the selections.
      always: samples that are kept whatever they score.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        metrics: Sequence[Metric],
        retain_ratio: float,
        seed: int,
        always: Collection[str] = (),
        within: Within = "all",
    ):
        ranked = [sample for sample in samples if sample.counted.any()]
        self._stratum_of = {sample.id: sample.source if within == "source" else "all" for sample in ranked}
        sizes = Counter(self._stratum_of.values())
        self._best = {
            (metric, name): BestK(metric, how_many(retain_ratio, size)) for metric in metrics for name, size in sizes.items()
        }
        self._metrics = tuple(metrics)
        self._always = frozenset(always)
        for sample in ranked if "random" in metrics else ():
            self._best["random", self._stratum_of[sample.id]].offer(sample.id, random_score(seed, sample.id))
        ranked_tokens = sum(len(sample.tokens) for sample in ranked)
        always_tokens = sum(len(sample.tokens) for sample in samples if sample.id in self._always)
        all_tokens = sum(len(sample.tokens) for sample in samples)
        self.expected_tokens: float = min(len(metrics) * retain_ratio * ranked_tokens + always_tokens, all_tokens)
        """About how many tokens the selections hold, each sample being as likely as any other; rather too many."""

    def score(self, table: ScoreTable) -> list[str]:
        """Take the scores of samples that were not scored before into account; returns those that cannot stay any more."""
        gone = set()
        for metric in self._metrics:
            if metric != "random":
                for row in np.flatnonzero(table.num_tokens > 0):
                    best = self._best[metric, self._stratum_of[table.ids[row]]]
                    gone.add(best.offer(table.ids[row], float(getattr(table, metric)[row])))
        return sorted(name for name in gone - {None} if name not in self)

    def __contains__(self, sample_id: str) -> bool:
        """Whether a sample may still be selected; of one that is not scored yet, whether it is kept in any case."""
        return sample_id in self._always or any(sample_id in best for best in self._best.values())
