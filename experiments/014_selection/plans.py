"""Which samples each arm trains on: the paper's metrics and ratios, what might be better, and controls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.pool.choices import (
    best_of_groups,
    by_metric,
    length_bands,
    matched_random,
    prompt_clusters,
    refused_share,
    token_matched_random,
)
from experiments.pool.pool import Arm, Pool, token_weights_of, trained_draft
from jsfdd.selection.sfdd import how_many, random_score

from .progressive import Progressive

METRICS = ("flatness", "random", "entropy", "top1", "margin", "energy", "ppl")
RATIOS = (0.7, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05)
PASSES = (1.0, 0.5, 0.25, 0.25, 1.0)  # of progressive dropout: the share of the samples in each


def arms(pool: Pool, plan: str, seeds: Sequence[int]) -> dict[str, Arm | Progressive]:
    """The arms of a plan by name; " seed N" ends every name, and what comes before it is what is compared."""
    everything = [sample.id for sample in pool.samples]
    sources = [sample.source for sample in pool.samples]
    scores = dict(zip(pool.table.ids, pool.table["flatness"]))
    flat = [scores[sample.id] for sample in pool.samples]
    epochs = pool.recipe.epochs
    plans_by_name: dict[str, Arm | Progressive] = {}
    for seed in seeds:

        def add(name: str, ids: Sequence[str], seed=seed, weights=None, **options):
            plans_by_name[f"{name} seed {seed}"] = Arm(ids, options | {"seed": seed}, weights)

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
            lowest_first = [scores[i] for i in everything]
            add(
                "least flat 50%",
                [everything[i] for i in np.argsort(lowest_first, kind="stable")[: how_many(0.5, len(lowest_first))]],
            )
            add("random 50% of flatness's sources", matched_random(pool, half, sources, seed))
            add("random 50% of flatness's lengths", matched_random(pool, half, length_bands(pool), seed))
            add("random with flatness's tokens", token_matched_random(pool, half, seed))
        elif plan == "better":
            add("flatness 50% within sources", best_of_groups(pool, sources, flat, 0.5))
            add("flatness 50% within lengths", best_of_groups(pool, length_bands(pool), flat, 0.5))
            add("flatness 50% within clusters", best_of_groups(pool, prompt_clusters(pool), flat, 0.5))
            chance = [random_score(seed, sample_id) for sample_id in everything]
            add("random 50% within sources", best_of_groups(pool, sources, chance, 0.5))
            add("random 50% within clusters", best_of_groups(pool, prompt_clusters(pool), chance, 0.5))
            add("flatness_median 50%", by_metric(pool, "flatness_median", 0.5, seed))
            choice = dict(retain_ratio=0.5, seed=seed)
            for metric in ("flatness", "random"):
                weights = token_weights_of(pool, pool.samples, metric=metric, weighting="hard", **choice)
                add(f"full, {metric} 50% of the tokens", everything, weights=weights)
            soft = token_weights_of(pool, pool.samples, metric="flatness", weighting="soft", retain_ratio=1.0, seed=seed)
            add("full, tokens weighted by flatness", everything, weights=soft)
        elif plan == "draft-aware":  # asks a draft that was trained on a random fifth
            refused = refused_share(pool, *trained_draft(pool, "random 20% seed 0")[:2])
            add("most refused 50%", best_of_groups(pool, np.zeros(len(everything)), refused, 0.5))
        elif plan == "dropout":  # three epochs' worth in four passes and one
            add("full, three quarters of the epochs", everything, epochs=3 * epochs // 4)
            for how, rank in (("hardest", refused_share), ("random", None)):
                plans_by_name[f"progressive dropout, {how} seed {seed}"] = Progressive(PASSES, rank, seed)
        elif plan == "proxies":  # one epoch: does its order of the arms foretell the order after all epochs?
            chosen = {
                "full": everything,
                "least flat 50%": best_of_groups(pool, np.zeros(len(everything)), [-f for f in flat], 0.5),
            }
            chosen |= {f"{metric} 50%": by_metric(pool, metric, 0.5, seed) for metric in METRICS}
            chosen |= {f"{metric} 20%": by_metric(pool, metric, 0.2, seed) for metric in ("flatness", "random")}
            for rate in (1e-3, 1e-4):
                for name, ids in chosen.items():
                    add(f"proxy at {rate:g}, {name}", ids, epochs=1, learning_rate=rate)
        else:
            raise ValueError(f"no plan {plan!r}")
    return plans_by_name
