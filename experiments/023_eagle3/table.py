"""The tables of experiment 023: each arm's cost, and τ of chains of 5 and trees of 60 with intervals over prompts and seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.results import read_results

RESAMPLES = 4000


def print_tables(results: dict) -> None:
    """Markdown: a row each arm, differences to the reference at equal steps and at equal cost."""
    arms = results["arms"]
    print(f"{results['chats']} chats, {results['epochs']} epochs, {len(results['prompts'])} prompts; {results['hardware']}\n")
    columns = ("arm", "seeds", "steps", "CPU s", "ms a step", "of the store, CPU s", "τ, chains of 5", "τ, trees of 60")
    columns += ("chains − EAGLE-2", "chains − EAGLE-2 at equal cost")
    print(f"| {' | '.join(columns)} |")
    print(f"|{'---|' * len(columns)}")
    for name, rows in arms.items():
        cpu, store_seconds = (
            np.mean([row[key] for row in rows.values()]) for key in ("cpu_seconds", "cpu_seconds_of_own_store")
        )
        steps = next(iter(rows.values()))["steps"]
        bases = (arms.get(base, {}) for base in ("EAGLE-2", "EAGLE-2, equal cost"))
        taus = " | ".join(interval(*resampled(rows, kind)) for kind in ("chain", "tree"))
        print(
            f"| {name} | {' '.join(rows)} | {steps} | {cpu:.0f} | {1000 * cpu / steps:.0f} | {store_seconds:.0f} | {taus} | "
            f"{' | '.join(against(rows, base) for base in bases)} |"
        )


def resampled(rows: dict, kind: str) -> tuple[float, np.ndarray]:
    """τ, and τ on resamples of prompts and seeds."""
    emitted, steps = (np.array([row[kind][key] for row in rows.values()]) for key in ("emitted", "steps"))
    times, seeds = draws(*emitted.shape)
    pick = np.arange(RESAMPLES)[:, None]
    drawn = [(times @ counts.T)[pick, seeds].sum(axis=1) for counts in (emitted, steps)]
    return emitted.sum() / steps.sum(), drawn[0] / drawn[1]


def draws(num_seeds: int, num_prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each prompt is drawn, and which seeds: the same whenever asked, so that arms are compared in pairs."""
    random = np.random.default_rng(0)
    times = random.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), RESAMPLES)
    return times, random.integers(0, num_seeds, (RESAMPLES, num_seeds))


def interval(value: float, values: np.ndarray, signed: bool = False) -> str:
    low, high = np.percentile(values, [2.5, 97.5])
    form = "+.3f" if signed else ".3f"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def against(rows: dict, base: dict) -> str:
    """The paired difference of chains over the seeds that both have."""
    common = [seed for seed in rows if seed in base]
    if rows is base or not common:
        return ""
    (a, drawn_a), (b, drawn_b) = (resampled({seed: arm[seed] for seed in common}, "chain") for arm in (rows, base))
    return interval(a - b, drawn_a - drawn_b, signed=True)


if __name__ == "__main__":
    print_tables(read_results(Path(__file__).parent / "results.jsonl"))
