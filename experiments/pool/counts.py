"""What an arm's runs count, with intervals over prompts and seeds, and paired differences between arms."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

RESAMPLES = 4000
TEMPERATURES = ("T=0", "T=1")


class Runs(NamedTuple):
    """The runs of one arm: emitted tokens and steps of every prompt, [seed, prompt] at each temperature."""

    seeds: list[int]
    rows: list[dict]
    emitted: dict[str, np.ndarray]
    steps: dict[str, np.ndarray]


def read_runs(work: Path) -> dict[str, Runs]:
    """Every arm that was run, by its name without the seed."""
    rows_by_arm: dict[str, dict[int, dict]] = {}
    for path in sorted(work.glob("arms/*/row.json")):
        name, seed = re.fullmatch(r"(.*)_seed_(\d+)", path.parent.name).groups()
        rows_by_arm.setdefault(name.replace("_", " "), {})[int(seed)] = json.loads(path.read_text())
    return {name: runs_of(rows) for name, rows in rows_by_arm.items()}


def runs_of(rows: dict[int, dict]) -> Runs:
    """One arm's rows by seed; a step emits a token more than it accepts."""
    rows = dict(sorted(rows.items()))
    temperatures = [t for t in TEMPERATURES if all(t in row for row in rows.values())]
    counts = {t: [np.array(row[t]["accept_counts"]) for row in rows.values()] for t in temperatures}
    return Runs(
        list(rows), list(rows.values()),
        {t: np.stack([c @ np.arange(1, c.shape[1] + 1) for c in parts]) for t, parts in counts.items()},
        {t: np.stack([c.sum(axis=1) for c in parts]) for t, parts in counts.items()},
    )  # fmt: skip


def tau(runs: Runs, temperature: str, rows: np.ndarray | None = None) -> float:
    """Total over total, over all seeds."""
    picked = slice(None) if rows is None else rows
    return float(runs.emitted[temperature][:, picked].sum() / runs.steps[temperature][:, picked].sum())


def resampled(runs: Runs, temperature: str, times: np.ndarray, seeds: Sequence[np.ndarray]) -> np.ndarray:
    """τ on resamples: `times` [R, N], how often each prompt is drawn; `seeds[r]`, rows of seeds that are drawn."""
    emitted, steps = times @ runs.emitted[temperature].T, times @ runs.steps[temperature].T  # [R, S]
    rows = np.arange(len(times))[:, None]
    return emitted[rows, seeds].sum(axis=1) / steps[rows, seeds].sum(axis=1)


def draws(num_prompts: int, num_seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Resamples of prompts and of seeds, the same whenever asked: arms are compared in pairs."""
    random = np.random.default_rng(0)
    picked = random.integers(0, num_prompts, (RESAMPLES, num_prompts))
    times = np.zeros((RESAMPLES, num_prompts))
    np.add.at(times, (np.arange(RESAMPLES)[:, None], picked), 1)
    return times, random.integers(0, num_seeds, (RESAMPLES, num_seeds))


def difference(a: Runs, b: Runs, temperature: str) -> dict:
    """τ_a − τ_b over the seeds that both were run with, paired over prompts and seeds; 95% over both."""
    common = [seed for seed in a.seeds if seed in b.seeds]
    a, b = (with_seeds(runs, common) for runs in (a, b))
    times, seeds = draws(a.emitted[temperature].shape[1], len(common))
    values = resampled(a, temperature, times, seeds) - resampled(b, temperature, times, seeds)
    low, high = np.percentile(values, [2.5, 97.5])
    middle = tau(a, temperature) - tau(b, temperature)
    return {"difference": middle, "low": float(low), "high": float(high), "seeds": len(common)}


def by_benchmark(a: Runs, b: Runs, temperature: str, sources: np.ndarray) -> dict:
    """`difference` over all prompts and over each benchmark's."""
    differences = {"all": difference(a, b, temperature)}
    for name in dict.fromkeys(sources.tolist()):
        rows = np.flatnonzero(sources == name)
        of_name = (
            x._replace(emitted={t: e[:, rows] for t, e in x.emitted.items()}, steps={t: s[:, rows] for t, s in x.steps.items()})
            for x in (a, b)
        )
        differences[name] = difference(*of_name, temperature)
    return differences


def with_seeds(runs: Runs, seeds: Sequence[int]) -> Runs:
    rows = [runs.seeds.index(seed) for seed in seeds]
    return Runs(
        list(seeds), [runs.rows[i] for i in rows],
        {t: x[rows] for t, x in runs.emitted.items()}, {t: x[rows] for t, x in runs.steps.items()},
    )  # fmt: skip


def summary(runs: Runs, sources: np.ndarray) -> dict:
    """What the tables say of one arm."""
    figures = {
        "seeds": runs.seeds, "samples": runs.rows[0]["samples"], "steps": runs.rows[0]["steps"],
        "tokens_in_loss": runs.rows[0]["tokens_in_loss"], "cpu_seconds": [row["cpu_seconds"] for row in runs.rows],
    }  # fmt: skip
    for t in runs.emitted:
        times, seeds = draws(len(sources), len(runs.seeds))
        low, high = np.percentile(resampled(runs, t, times, seeds), [2.5, 97.5])
        figures[t] = {
            "tau": tau(runs, t), "low": float(low), "high": float(high),
            "by_seed": [float(e.sum() / s.sum()) for e, s in zip(runs.emitted[t], runs.steps[t])],
            "by_benchmark": {name: tau(runs, t, np.flatnonzero(sources == name)) for name in dict.fromkeys(sources)},
        }  # fmt: skip
    return figures


def sources_of(work: Path) -> np.ndarray:
    """The benchmark of every prompt."""
    kept = json.loads((work / "answers_0.0.json").read_text())
    of_prompt = dict(zip(kept["prompts"], (sample["source"] for sample in kept["samples"])))
    return np.array([of_prompt[i] for i in sorted(of_prompt)])
