"""The tables of 030 from results.jsonl. See README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.pool.counts import RESAMPLES
from experiments.results import read_results

STARTS = ("from nothing", "from a draft")
CHANCE, CHOICE = "random half", "flattest half of every cluster"


def print_tables(results: dict) -> None:
    """τ of every arm by domain, and what the flattest half gains over the random one, by start."""
    domains = [name for name in results if name != "hardware"]
    arms = list(dict.fromkeys(arm for name in domains for arm in results[name]))
    print(f"| arm | {' | '.join(domains)} | all |\n|---|{'---|' * (len(domains) + 1)}")
    for arm in arms:
        cells = [f"{tau(*counts(results, [name], arm)):.3f}" for name in domains]
        print(f"| {arm} | {' | '.join(cells)} | {tau(*counts(results, domains, arm)):.3f} |")
    print("\n| difference | τ, all domains |\n|---|---|")
    for start in STARTS:
        show(results, domains, f"{start}, {CHOICE}", f"{start}, {CHANCE}")
        show(results, domains, f"{start}, {CHANCE}", f"{start}, all")


def show(results: dict, domains: list[str], a: str, b: str) -> None:
    """One row: τ of `a` less that of `b`, with 95% over prompts and seeds, drawn together for both."""
    if not all(arm in results[name] for name in domains for arm in (a, b)):
        return
    x, y = counts(results, domains, a), counts(results, domains, b)
    seeds, prompts = x[0].shape
    random = np.random.default_rng(0)
    values = []
    for _ in range(RESAMPLES):
        drawn = np.ix_(random.integers(0, seeds, seeds), random.integers(0, prompts, prompts))
        values.append(tau(x[0][drawn], x[1][drawn]) - tau(y[0][drawn], y[1][drawn]))
    low, high = np.percentile(values, [2.5, 97.5])
    print(f"| {a} − {b} | {tau(*x) - tau(*y):+.3f} [{low:+.3f}, {high:+.3f}] |")


def counts(results: dict, domains: list[str], arm: str) -> tuple[np.ndarray, np.ndarray]:
    """(emitted tokens, steps) [seed, prompt] of one arm; the prompts of all these domains side by side."""
    seeds = sorted(set.intersection(*(set(results[name][arm]) for name in domains)))
    return tuple(
        np.array([np.concatenate([results[name][arm][seed][key] for name in domains]) for seed in seeds])
        for key in ("emitted", "steps")
    )


def tau(emitted: np.ndarray, steps: np.ndarray) -> float:
    """Total over total."""
    return float(emitted.sum() / steps.sum())


if __name__ == "__main__":
    print_tables(read_results(Path(__file__).with_name("results.jsonl")))
