"""Which samples can still be selected during a scoring pass, so that the pass keeps hidden states only of these.

A metric keeps k samples, of all or of each source. A sample that is behind k others during the pass will also be behind them in
the end. So a pass that keeps the k best so far ends with exactly the samples that `sfdd.select` chooses, and never holds more
than k. Clusters of prompts are known only when all prompts are, so within clusters every sample may be selected until then.

    possible = StillPossible(samples, ["flatness", "random"], retain_ratio=0.5, seed=0, always=held_out_ids)
    possible.score(table)                                                     # after each batch
    "sample id" in possible
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from jsfdd.base.records import Sample
from jsfdd.scoring.metrics import MetricName
from jsfdd.scoring.table import ScoreTable, join
from jsfdd.selection.sfdd import Within, place_in_order, random_score, select, shares


class _Place(NamedTuple):
    """A sample's place in the order of `sfdd.select`. The heap has its smallest on top, so here the worst is the smallest."""

    score: float
    id: str

    def __lt__(self, other: _Place) -> bool:
        return tuple.__gt__(self, other)


class BestK:
    """The k best of the samples offered so far, with the order and the ties of `sfdd.select`."""

    def __init__(self, metric: MetricName, k: int):
        self._metric, self._k = metric, k
        self._heap: list[_Place] = []
        self._ids: set[str] = set()

    def offer(self, sample_id: str, score: float) -> str | None:
        """Add a new sample. Returns the sample that falls out if there are more than k; it cannot come back."""
        place = _Place(*place_in_order(self._metric, score, sample_id))
        self._ids.add(sample_id)
        if len(self._heap) < self._k:
            heapq.heappush(self._heap, place)
            return None
        worst = heapq.heappushpop(self._heap, place).id
        self._ids.remove(worst)
        return worst

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._ids


class UntilClustered:
    """The samples scored so far, and once all are, those that the selections choose.

    Args:
      wanted: the samples to be scored.
      choose: the selections, given the table of all of these.
    """

    def __init__(self, wanted: Collection[str], choose: Callable[[ScoreTable], set[str]]):
        self._waiting, self._choose = set(wanted), choose
        self._tables: list[ScoreTable] = []
        self._ids: set[str] = set()

    def offer(self, table: ScoreTable) -> set[str]:
        """Take in scores of samples not scored before. Returns those that fall out: none before the last."""
        names = [name for name in table.ids if name in self._waiting]
        self._tables.append(join([dataclasses.replace(table, tokens=None)], names))
        self._waiting.difference_update(names)
        self._ids.update(names)
        if self._waiting or not names:
            return set()
        everything, self._ids = self._ids, self._choose(join(self._tables, sorted(self._ids)))
        return everything - self._ids

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._ids


class StillPossible:
    """The samples that at least one of several selections may keep, given the scores so far.

    Args:
      samples: all of them. Those without a counted token are never selected.
      metrics: of the selections. What `random` keeps is known before anything is scored.
      retain_ratio, seed, within: of the selections.
      always: samples that are kept whatever their scores.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        metrics: Sequence[MetricName],
        retain_ratio: float,
        seed: int,
        always: Collection[str] = (),
        within: Within = "all",
    ):
        ranked = [sample for sample in samples if sample.counted.any()]
        self._stratum = {sample.id: sample.source if within == "source" else "all" for sample in ranked}
        quotas = shares(retain_ratio, Counter(self._stratum.values()))

        def choose(table: ScoreTable) -> set[str]:
            rule = {"within": within, "seed": seed}
            return {name for metric in metrics for name in select(table, retain_ratio, metric=metric, **rule).ids}

        self._clustered = UntilClustered(self._stratum, choose) if within == "cluster" else None
        self._metrics = () if within == "cluster" else tuple(metrics)  # whose best are known on the way
        self._best = {(metric, name): BestK(metric, k) for metric in self._metrics for name, k in quotas.items()}
        self._scored_metrics = [metric for metric in self._metrics if metric != "random"]
        self._always = frozenset(always)
        for sample in ranked if "random" in self._metrics else ():
            self._best["random", self._stratum[sample.id]].offer(sample.id, random_score(seed, sample.id))

        def tokens(chosen: Sequence[Sample]) -> int:
            return sum(len(sample.tokens) for sample in chosen)

        selected = len(metrics) * retain_ratio * tokens(ranked)
        always_kept = tokens([sample for sample in samples if sample.id in self._always])
        self.expected_tokens: float = min(selected + always_kept, tokens(samples))
        """About how many tokens the selections hold in the end if every sample is as likely as any other; an upper estimate."""

    def score(self, table: ScoreTable) -> list[str]:
        """Add the scores of samples not scored before. Returns the samples that can no longer be selected."""
        fallen = set() if self._clustered is None else self._clustered.offer(table)
        for metric in self._scored_metrics:
            for row in np.flatnonzero(table.num_tokens > 0):
                best = self._best[metric, self._stratum[table.ids[row]]]
                fallen.add(best.offer(table.ids[row], float(table[metric][row])))
        return sorted(name for name in fallen - {None} if name not in self)

    def __contains__(self, sample_id: str) -> bool:
        """Whether a sample may still be selected; for one not scored yet, whether it is kept whatever its score."""
        if sample_id in self._always or (self._clustered is not None and sample_id in self._clustered):
            return True
        stratum = self._stratum.get(sample_id)
        return any(sample_id in self._best[metric, stratum] for metric in self._metrics if stratum is not None)
