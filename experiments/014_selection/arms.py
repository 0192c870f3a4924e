"""Which samples each arm trains on: the paper's metrics and ratios, what might be better, and controls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pool import Arm, Pool, token_weights_of, trained_draft
from progressive import Progressive

from jsfdd.data.batches import make_batches
from jsfdd.models.draft import DraftConfig
from jsfdd.selection import sfdd
from jsfdd.selection.sfdd import how_many, random_score
from jsfdd.training.batch import TrainingData, device_batch
from jsfdd.training.loss import borrow
from jsfdd.training.step import make_evaluate_step

METRICS = ("flatness", "random", "entropy", "top1", "margin", "energy", "ppl")
RATIOS = (0.7, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05)
PASSES = (1.0, 0.5, 0.25, 0.25, 1.0)  # of progressive dropout: the share of the samples in each


def by_metric(pool: Pool, metric: str, ratio: float, seed: int) -> tuple[str, ...]:
    """What `jsfdd select` keeps."""
    return sfdd.select(pool.table, metric, ratio, seed).ids


def within(pool: Pool, groups: Sequence, scores: Sequence[float], ratio: float) -> list[str]:
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


def prompt_clusters(pool: Pool, count: int = 20, rounds: int = 30) -> np.ndarray:
    """k-means of the prompts' mean hidden states, scaled to unit length."""
    points = []
    for sample in pool.samples:
        prompt = np.asarray(pool.store[sample.id], np.float32)[~np.asarray(sample.assistant_mask)]
        points.append(prompt.mean(axis=0))
    points = np.stack(points)
    points = points - points.mean(axis=0)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    count = min(count, len(points))
    centres = points[np.random.default_rng(0).choice(len(points), count, replace=False)]
    for _ in range(rounds):
        nearest = np.argmax(points @ centres.T, axis=1)
        for i in range(count):
            if (nearest == i).any():
                centre = points[nearest == i].mean(axis=0)
                centres[i] = centre / np.linalg.norm(centre)
    return nearest


def refused_share(pool: Pool, draft: DraftConfig, params: dict) -> np.ndarray:
    """Mean total variation between the target and a draft over each sample's counted tokens."""
    target, mesh = pool.loaded.target, pool.loaded.mesh
    step = make_evaluate_step(target.config, draft, mesh, pool.base)
    data = TrainingData(pool.samples, pool.store)
    frozen, found = borrow(target.config, target.params), np.zeros(len(pool.samples))
    lengths = [len(sample.tokens) for sample in pool.samples]
    for plan in make_batches(lengths, [shape._replace(rows=1) for shape in pool.shapes]):
        tokens = step(frozen, params, device_batch(data, plan.indices, plan.shape, mesh)).steps[0].tokens
        found[plan.indices[0]] = 1 - float(tokens.acceptance) / max(float(tokens.counted), 1)
    return found


def arms(pool: Pool, plan: str, seeds: Sequence[int]) -> dict[str, Arm | Progressive]:
    """The arms of a plan by name; " seed N" ends every name, and what comes before it is what is compared."""
    everything = [sample.id for sample in pool.samples]
    sources = [sample.source for sample in pool.samples]
    scores = dict(zip(pool.table.ids, pool.table.flatness))
    flat = [scores[sample.id] for sample in pool.samples]
    epochs = pool.base.epochs
    found: dict[str, Arm | Progressive] = {}
    for seed in seeds:

        def add(name: str, ids: Sequence[str], seed=seed, weights=None, **options):
            found[f"{name} seed {seed}"] = Arm(ids, options | {"seed": seed}, weights)

        half = by_metric(pool, "flatness", 0.5, seed)
        if plan == "table":
            add("full", everything)
            for metric in METRICS:
                add(f"{metric} 50%", by_metric(pool, metric, 0.5, seed))
        elif plan == "steps":  # as many steps as on full data
            for metric in ("flatness", "random", "entropy"):
                add(f"{metric} 50% equal steps", by_metric(pool, metric, 0.5, seed), epochs=2 * epochs)
        elif plan == "ratios":
            for ratio in RATIOS:
                for metric in ("flatness", "random", "energy"):  # of the rivals at 50% energy was ahead
                    add(f"{metric} {ratio:.0%}", by_metric(pool, metric, ratio, seed))
        elif plan == "controls":
            least = [scores[i] for i in everything]
            add("least flat 50%", [everything[i] for i in np.argsort(least, kind="stable")[: how_many(0.5, len(least))]])
            add("random 50% of flatness's sources", matched_random(pool, half, sources, seed))
            add("random 50% of flatness's lengths", matched_random(pool, half, length_bands(pool), seed))
            add("random with flatness's tokens", token_matched_random(pool, half, seed))
        elif plan == "better":
            add("flatness 50% within sources", within(pool, sources, flat, 0.5))
            add("flatness 50% within lengths", within(pool, length_bands(pool), flat, 0.5))
            add("flatness 50% within clusters", within(pool, prompt_clusters(pool), flat, 0.5))
            chance = [random_score(seed, sample_id) for sample_id in everything]
            add("random 50% within sources", within(pool, sources, chance, 0.5))
            add("random 50% within clusters", within(pool, prompt_clusters(pool), chance, 0.5))
            add("flatness_median 50%", by_metric(pool, "flatness_median", 0.5, seed))
            choice = dict(retain_ratio=0.5, seed=seed)
            for metric in ("flatness", "random"):
                weights = token_weights_of(pool, pool.samples, metric=metric, weighting="hard", **choice)
                add(f"full, {metric} 50% of the tokens", everything, weights=weights)
            soft = token_weights_of(pool, pool.samples, metric="flatness", weighting="soft", retain_ratio=1.0, seed=seed)
            add("full, tokens weighted by flatness", everything, weights=soft)
        elif plan == "draft-aware":  # asks a draft that was trained on a random fifth
            refused = refused_share(pool, *trained_draft(pool, "random 20% seed 0")[:2])
            add("most refused 50%", within(pool, np.zeros(len(everything)), refused, 0.5))
        elif plan == "dropout":  # three epochs' worth in four passes and one
            add("full, three quarters of the epochs", everything, epochs=3 * epochs // 4)
            for how, rank in (("hardest", refused_share), ("random", None)):
                found[f"progressive dropout, {how} seed {seed}"] = Progressive(PASSES, rank, seed)
        elif plan == "proxies":  # one epoch: does its order of the arms foretell the order after all epochs?
            chosen = {"full": everything, "least flat 50%": within(pool, np.zeros(len(everything)), [-f for f in flat], 0.5)}
            chosen |= {f"{metric} 50%": by_metric(pool, metric, 0.5, seed) for metric in METRICS}
            chosen |= {f"{metric} 20%": by_metric(pool, metric, 0.2, seed) for metric in ("flatness", "random")}
            for rate in (1e-3, 1e-4):
                for name, ids in chosen.items():
                    add(f"proxy at {rate:g}, {name}", ids, epochs=1, learning_rate=rate)
        else:
            raise ValueError(f"no plan {plan!r}")
    return found
