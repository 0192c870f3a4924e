"""What can still be selected: at any time the best of those scored so far, in the end exactly what `select` chooses."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsfdd.base.records import Sample
from jsfdd.hidden.best_k import StillPossible
from jsfdd.scoring.metrics import METRICS, column_names
from jsfdd.scoring.table import ScoreTable, join
from jsfdd.selection.sfdd import select, shares


def sample(name, length=4, counted=True, source="x"):
    mask = np.zeros(length, bool)
    mask[-3 if counted else -1 :] = True
    return Sample(name, source, np.arange(length, dtype=np.int32), mask)


def table_of(samples, scores):
    """One score for all metrics; NaN where no token counts."""
    counts = np.array([s.counted.sum() for s in samples], np.int32)
    values = np.where(counts > 0, np.asarray(scores, float), np.nan)
    ids = tuple(s.id for s in samples)
    metrics, prompts = dict.fromkeys(column_names(), values), np.random.default_rng(0).normal(size=(len(ids), 3))
    return ScoreTable(ids, tuple(s.source for s in samples), counts, metrics, identity={}, prompt_states=prompts)


@settings(deadline=None)
@given(
    scores=st.lists(st.integers(-2, 2), min_size=1, max_size=25),  # many ties
    uncounted=st.sets(st.integers(1, 24)),
    retain_ratio=st.sampled_from([0.01, 0.3, 0.5, 1.0]),
    metric=st.sampled_from(list(METRICS)),
    seed=st.integers(0, 3),
    within=st.sampled_from(["all", "source"]),
    order=st.randoms(use_true_random=False),
)
def test_it_ends_with_what_select_chooses_and_never_drops_it(scores, uncounted, retain_ratio, metric, seed, within, order):
    samples = [sample(f"s{i}", counted=i not in uncounted, source="xyz"[i * i % 3]) for i in range(len(scores))]
    whole = table_of(samples, scores)
    chosen = set(select(whole, retain_ratio, metric=metric, seed=seed, within=within).ids)
    sources = Counter(samples[i].source if within == "source" else "" for i in range(len(scores)) if i not in uncounted)
    most = sum(shares(retain_ratio, sources).values())
    assert len(chosen) == most
    stays = StillPossible(samples, [metric], retain_ratio, seed, within=within)
    rows, seen = list(range(len(scores))), []
    order.shuffle(rows)
    for row in rows:
        before = {name for name in whole.ids if name in stays}
        gone = stays.score(join([whole], [whole.ids[row]]))
        seen.append(whole.ids[row])
        now = {name for name in whole.ids if name in stays}
        assert before - now <= set(gone) <= {*before, whole.ids[row]} - now
        assert now <= (set(whole.ids) if metric == "random" else set(seen)) and len(now) <= most
        assert chosen & set(seen) <= now
    assert {name for name in whole.ids if name in stays} == chosen


def test_within_clusters_all_stay_until_the_last_has_its_score():
    samples = [sample(f"s{i:02d}", counted=i != 7) for i in range(70)]
    whole = table_of(samples, np.random.default_rng(1).random(70))
    chosen = {i for metric in ("flatness", "random") for i in select(whole, 0.3, metric=metric, within="cluster", seed=1).ids}
    stays = StillPossible(samples, ["flatness", "random"], 0.3, 1, always={"s03"}, within="cluster")
    assert "s03" in stays and "s04" not in stays
    ids = [f"s{i:02d}" for i in np.random.default_rng(2).permutation(70)]
    for part in (ids[:30], ids[30:69]):
        assert stays.score(join([whole], part)) == []
    assert all(name in stays for name in ids[:69] if name != "s07")
    assert set(stays.score(join([whole], ids[69:]))) == set(ids) - chosen - {"s03", "s07"}
    assert {name for name in ids if name in stays} == chosen | {"s03"}


def test_several_selections_keep_what_one_of_them_may_need():
    samples = [sample(f"s{i}") for i in range(8)]
    table = table_of(samples, range(8))  # flatness keeps the last, top1 the first
    stays = StillPossible(samples, ["flatness", "top1", "random"], 0.25, seed=1, always={"s3"})
    random = set(select(table, 0.25, metric="random", seed=1).ids)
    assert {name for name in table.ids if name in stays} == random | {"s3"}  # known before anything is scored
    gone = [name for row in table.ids for name in stays.score(join([table], [row]))]
    assert {name for name in table.ids if name in stays} == random | {"s3", "s0", "s1", "s6", "s7"}
    assert not set(gone) & random and "s3" not in gone


def test_the_expected_size_counts_what_masks_tell():
    samples = [sample("a", 100), sample("b", 300), sample("c", 50, counted=False), sample("d", 10, counted=False)]
    expected = StillPossible(samples, ["flatness"], 0.5, 0, always={"c"}).expected_tokens
    assert expected == pytest.approx(0.5 * 400 + 50)
    assert StillPossible(samples, ["flatness", "entropy", "ppl"], 0.5, 0).expected_tokens == 460
    assert StillPossible(samples, [], 1.0, 0, always={"a", "b", "c"}).expected_tokens == 450
