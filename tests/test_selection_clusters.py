"""Clusters of prompts: planted ones are found, and neither order nor block nor odd rows change them."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jsfdd.scoring.metrics import column_names
from jsfdd.scoring.table import ScoreTable, read_scores, write_scores
from jsfdd.selection import clusters as clusters_module
from jsfdd.selection.clusters import cluster_prompts, number_of_clusters
from jsfdd.selection.sfdd import how_many, read_selection, select, shares, write_selection


def planted(number=600, kinds=6, width=16, spread=0.25, seed=0):
    """(states around a common mean, the number of each one's kind)."""
    random = np.random.default_rng(seed)
    kind = random.integers(0, kinds, number)
    centres = 3 * np.linalg.qr(random.normal(size=(width, kinds)))[0].T
    sizes = random.uniform(0.5, 2, (number, 1))  # the direction says what kind it is, not the length
    return (5 + sizes * (centres[kind] + spread * random.normal(size=(number, width)))).astype(np.float32), kind


def partition(numbers):
    """A clustering without the names of the clusters."""
    return {frozenset(np.flatnonzero(numbers == number)) for number in np.unique(numbers)}


def test_planted_clusters_are_found_with_most_seeds():
    states, kind = planted()
    found = [partition(cluster_prompts(states, seed, 6)) == partition(kind) for seed in range(10)]
    assert sum(found) >= 7  # k-means++ may draw two centres of one kind


def plain_k_means(states, centres, rounds=30):
    """Spherical k-means in plain lines."""
    points = states.astype(np.float64) - states.mean(axis=0, dtype=np.float64)
    points = np.stack([point / np.linalg.norm(point) for point in points])
    centres = [points[row] for row in centres]
    for _ in range(rounds):
        nearest = [int(np.argmax([point @ centre for centre in centres])) for point in points]
        for number in range(len(centres)):
            mean = np.mean([point for point, own in zip(points, nearest) if own == number], axis=0)
            centres[number] = mean / np.linalg.norm(mean)
    return np.array(nearest)


def test_it_equals_k_means_in_plain_lines():
    states, _ = planted(number=90, spread=1.5)
    for seed in range(3):
        points = clusters_module._directions(states)
        first = clusters_module._first_centres(points, 5, seed)
        rows = [int(np.flatnonzero((points == centre).all(axis=1))[0]) for centre in first]
        assert partition(cluster_prompts(states, seed, 5)) == partition(plain_k_means(states, rows))


def test_first_centres_are_drawn_by_their_distance():
    """Two rows of three are near each other: the second centre is the far one but for a share of about its weight."""
    angles = np.array([0.0, 0.3, np.pi / 2])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    firsts, pairs = Counter(), Counter()
    for seed in range(3000):
        chosen = clusters_module._first_centres(points, 2, seed)
        first, second = (int(np.argmin(np.abs(points - centre).sum(axis=1))) for centre in chosen)
        firsts[first] += 1
        pairs[first, second] += 1
    assert all(abs(firsts[row] / 3000 - 1 / 3) < 0.04 for row in range(3))
    weight = 1 - np.cos(angles[1])
    assert abs(pairs[0, 1] / firsts[0] - weight / (weight + 1)) < 0.03


def test_clusters_are_named_by_their_first_rows_whatever_the_blocks(monkeypatch):
    states, _ = planted(spread=1.0)
    found = cluster_prompts(states, seed=1, count=8)
    first = [int(np.argmax(found == number)) for number in range(found.max() + 1)]
    assert first == sorted(first) and first[0] == 0 and found.max() == 7
    monkeypatch.setattr(clusters_module, "_BLOCK", 37)
    np.testing.assert_array_equal(cluster_prompts(states, seed=1, count=8), found)


def test_equal_rows_stay_together_and_are_no_more_clusters_than_directions():
    states = np.repeat([[3.0, 0, 1], [0.0, 2, 0], [1.0, 1, 9]], [4, 1, 5], axis=0)
    for count in (2, 3, 9, 50):  # also more than there are rows
        found = cluster_prompts(states, seed=0, count=count)
        assert len(set(found)) == min(count, 3)
        assert all(len(set(found[rows])) == 1 for rows in (slice(0, 4), slice(5, 10)))


def test_rows_without_a_direction_make_no_trouble():
    assert cluster_prompts(np.zeros((5, 4)), seed=0, count=3).tolist() == [0] * 5
    assert cluster_prompts(np.full((3, 4), 7e5), seed=0, count=3).tolist() == [0] * 3
    assert cluster_prompts(np.ones((1, 4)), seed=0).tolist() == [0]
    states = np.array([[2.0, 0], [-2, 0], [0, 0], [2, 0], [-2, 0]])  # the third is the mean
    found = cluster_prompts(states, seed=3, count=2)
    assert found[0] == found[3] and found[1] == found[4] and found[0] != found[1]


@pytest.mark.parametrize("samples, expected", [(1, 1), (39, 1), (40, 2), (399, 19), (430, 20), (10**6, 20)])
def test_the_number_of_clusters(samples, expected):
    assert number_of_clusters(samples) == expected


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(1, 40), min_size=1, max_size=9), st.floats(0.01, 1.0))
def test_shares_are_near_the_ratio_and_sum_to_that_of_all(sizes, ratio):
    kept, total = shares(ratio, sizes), how_many(ratio, sum(sizes.values()))
    assert all(
        1 <= kept[name] <= size and (kept[name] == 1 or abs(kept[name] - ratio * size) < 1) for name, size in sizes.items()
    )
    raised = sum(ratio * size < 1 for size in sizes.values())
    assert total <= sum(kept.values()) <= total + raised


def table_of(states, flatness=None, ids=None):
    number = len(states)
    flat = np.random.default_rng(3).random(number) if flatness is None else flatness
    names = tuple(f"s{i:03d}" for i in range(number)) if ids is None else tuple(ids)
    counts = np.full(number, 4, np.int32)
    return ScoreTable(names, ("x",) * number, counts, dict.fromkeys(column_names(), flat), {"target": "t"}, None, states)


def rows_of(table, rows):
    return ScoreTable(
        tuple(table.ids[row] for row in rows), ("x",) * len(rows), table.num_tokens[rows],
        {name: values[rows] for name, values in table.metrics.items()}, table.identity, None, table.prompt_states[rows],
    )  # fmt: skip


def test_every_cluster_keeps_its_flattest_whatever_the_order_of_the_rows(tmp_path):
    states, _ = planted(number=200)
    table = table_of(states)
    selection = select(table, 0.3, within="cluster", seed=2)
    numbers = cluster_prompts(states, 2)
    assert selection.sizes == {f"cluster {n}": int((numbers == n).sum()) for n in range(10)}
    assert len(selection.ids) == 60
    for name, kept in shares(0.3, selection.sizes).items():
        rows = np.flatnonzero(numbers == int(name.split()[1]))
        best = rows[np.argsort(-table["flatness"][rows])][:kept]
        assert {table.ids[row] for row in best} == {table.ids[row] for row in rows} & set(selection.ids)
        assert selection.thresholds[name] == table["flatness"][best[-1]]
    order = np.random.default_rng(0).permutation(200)
    shuffled = select(rows_of(table, order), 0.3, within="cluster", seed=2)
    assert set(shuffled.ids) == set(selection.ids) and shuffled.thresholds == selection.thresholds
    assert select(table, 0.3, within="cluster", seed=3).sizes != selection.sizes
    write_selection(tmp_path / "selection.json", selection)
    assert read_selection(tmp_path / "selection.json") == selection


def test_scores_without_prompts_states_say_what_to_run(tmp_path):
    table = table_of(planted(number=50)[0])
    write_scores(tmp_path / "scores.parquet", table)
    whole = read_scores(tmp_path / "scores.parquet", prompt_states=True)
    assert select(whole, within="cluster").ids == select(table, within="cluster").ids
    write_scores(tmp_path / "old.parquet", dataclasses.replace(table, prompt_states=None))
    for old in (read_scores(tmp_path / "old.parquet", prompt_states=True), read_scores(tmp_path / "scores.parquet")):
        assert old.prompt_states is None and select(old).ids == select(table).ids
        with pytest.raises(ValueError, match="no prompts' states.*run the same `jsfdd score` again"):
            select(old, within="cluster")
