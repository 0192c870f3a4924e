"""Ways to choose samples of a pool: by a metric, within groups, at random, and by what a draft refuses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.pool.pool import Pool
from jsfdd.data.batches import make_batches
from jsfdd.models.draft import DraftConfig
from jsfdd.selection import sfdd
from jsfdd.selection.clusters import cluster_prompts
from jsfdd.selection.sfdd import how_many, random_score
from jsfdd.training.batch import TrainingData, device_batch
from jsfdd.training.loss import borrow
from jsfdd.training.step import make_evaluate_step


def by_metric(pool: Pool, metric: str, ratio: float, seed: int) -> tuple[str, ...]:
    """What `jsfdd select` keeps."""
    return sfdd.select(pool.table, ratio, metric=metric, seed=seed).ids


def best_of_groups(pool: Pool, groups: Sequence, scores: Sequence[float], ratio: float) -> list[str]:
    """The highest scores of each group, `ratio` of it."""
    groups, scores, kept = np.asarray(groups), np.asarray(scores), []
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        best = rows[np.argsort(-scores[rows], kind="stable")][: how_many(ratio, len(rows))]
        kept += [pool.table.ids[i] for i in best]
    return kept


def matched_random(pool: Pool, like: Sequence[str], groups: Sequence, seed: int) -> list[str]:
    """As many of each group as `like` has of it, by chance."""
    wanted, groups, kept = set(like), np.asarray(groups), []
    order = np.argsort([random_score(seed, sample_id) for sample_id in pool.table.ids])
    for group in np.unique(groups):
        rows = order[groups[order] == group]
        number = sum(pool.table.ids[i] in wanted for i in rows)
        kept += [pool.table.ids[i] for i in rows[:number]]
    return kept


def token_matched_random(pool: Pool, like: Sequence[str], seed: int) -> list[str]:
    """By chance as many samples as have together the counted tokens of `like`."""
    tokens = dict(zip(pool.table.ids, pool.table.num_tokens))
    budget, kept = sum(tokens[i] for i in like), []
    for sample_id in sorted(pool.table.ids, key=lambda i: random_score(seed, i)):
        if budget < tokens[sample_id] / 2:
            break
        kept.append(sample_id)
        budget -= tokens[sample_id]
    return kept


def length_bands(pool: Pool, count: int = 5) -> np.ndarray:
    """Of each sample in the table's order: which fifth of the lengths."""
    lengths = np.array([len(sample.tokens) for sample in pool.samples])
    return np.searchsorted(np.quantile(lengths, np.linspace(0, 1, count + 1)[1:-1]), lengths)


def prompt_clusters(pool: Pool, count: int | None = None) -> np.ndarray:
    """The cluster of each prompt, as `jsfdd select --within cluster` finds them with seed 0."""
    order = np.argsort(pool.table.ids)
    clusters = np.empty(len(order), np.int64)
    clusters[order] = cluster_prompts(pool.table.prompt_states[order], seed=0, count=count)
    return clusters


def refused_share(pool: Pool, draft: DraftConfig, params: dict) -> np.ndarray:
    """Mean total variation between the target and a draft over each sample's counted tokens."""
    target, mesh = pool.loaded.target, pool.loaded.mesh
    step = make_evaluate_step(draft, mesh, pool.recipe)
    data = TrainingData(pool.samples, pool.store)
    frozen, refused = borrow(target.config, target.params), np.zeros(len(pool.samples))
    lengths = [len(sample.tokens) for sample in pool.samples]
    for plan in make_batches(lengths, [shape._replace(rows=1) for shape in pool.shapes]):
        sums = step(frozen, params, device_batch(data, plan.indices, plan.shape, mesh)).steps[0]
        refused[plan.indices[0]] = 1 - float(sums["acceptance"]) / max(float(sums["counted"]), 1)
    return refused
