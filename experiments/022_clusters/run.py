"""Flatness within clusters of prompts against chance, on other chats and other prompts than found it. See README.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.pool.choices import best_of_groups, by_metric, prompt_clusters
from experiments.pool.counts import Runs, by_benchmark, runs_of, summary
from experiments.pool.pool import PROMPTS, SMOKE, Arm, Pool, judge_draft, open_pool, pool_parser, taus, trained_draft
from experiments.results import write_results
from jsfdd.base.hardware import describe_hardware
from jsfdd.selection.sfdd import random_score

from .tables import show

HERE = Path(__file__).parent

OTHERS = PROMPTS if SMOKE else {"mt_bench": 40, "gsm8k": 40, "alpaca": 40, "sum": 16, "qa": 40}
CLUSTERS = 4 if SMOKE else 20
COMPARED = (
    ("flatness 50% within clusters", "random 50% within clusters"),
    ("flatness 50% within clusters", "random 50%"),
    ("flatness 50% within clusters", "flatness 50%"),
    ("flatness 50% within sources", "random 50%"),
    ("flatness 50%", "random 50%"),
    ("random 50% within clusters", "random 50%"),
)


def chosen(pool: Pool, seed: int) -> dict[str, Sequence[str]]:
    """The samples of each arm, by 014's names."""
    flat = pool.table["flatness"]
    chance = [random_score(seed, sample_id) for sample_id in pool.table.ids]
    clusters, sources = prompt_clusters(pool, CLUSTERS), [sample.source for sample in pool.samples]
    return {
        "random 50%": by_metric(pool, "random", 0.5, seed),
        "flatness 50%": by_metric(pool, "flatness", 0.5, seed),
        "flatness 50% within clusters": best_of_groups(pool, clusters, flat, 0.5),
        "random 50% within clusters": best_of_groups(pool, clusters, chance, 0.5),
        "flatness 50% within sources": best_of_groups(pool, sources, flat, 0.5),
    }


def row_of(pool: Pool, name: str, ids: Sequence[str], seed: int) -> dict:
    """The arm's cost and counts on the other prompts. A draft that 014 trained is taken as it is; what is there is read."""
    path = pool.work / "clusters" / f"{name.replace(' ', '_')}.json"
    if path.exists():
        return json.loads(path.read_text())
    trained = pool.work / "arms" / name.replace(" ", "_")
    if (trained / "row.json").exists():
        trained_row = json.loads((trained / "row.json").read_text())
        row = {key: trained_row[key] for key in ("samples", "steps", "tokens_in_loss", "cpu_seconds")}
        draft, params, _ = trained_draft(pool, name)
    else:
        row, draft, params = Arm(ids, {"seed": seed}).train(pool, trained)
    for temperature in pool.judges:
        row[f"T={temperature:g}"] = judge_draft(pool, draft, params, temperature)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(row))
    print(f"{name}: {row['samples']} samples, {row['steps']} steps; {taus(row)}", flush=True)
    return row


def tables(runs: dict[str, Runs], sources: np.ndarray) -> dict:
    """{"arms": summaries, "differences": at either temperature, by benchmark}."""
    return {
        "arms": {name: summary(arm_runs, sources) for name, arm_runs in runs.items()},
        "differences": {
            f"{a} − {b}, {t}": by_benchmark(runs[a], runs[b], t, sources) for a, b in COMPARED for t in ("T=0", "T=1")
        },
    }


def main() -> None:
    parser = pool_parser(__doc__, epochs=4)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--first", action="store_true", help="the chats of 014 too, with the drafts that it trained")
    options = parser.parse_args()
    shared = dict(temperatures=(0.0, 1.0), per_file=OTHERS, answers="answers_others", excluded={} if SMOKE else PROMPTS)
    pools = {"other chats": open_pool(options, **shared, skip=options.chats)}
    if options.first:
        pools["the chats of 014"] = open_pool(options, **shared)
    outcomes = {}
    for chats, pool in pools.items():
        rows: dict[str, dict[int, dict]] = {}
        for seed in options.seeds:
            for name, ids in chosen(pool, seed).items():
                prefix = "other chats, " if chats == "other chats" else ""
                rows.setdefault(name, {})[seed] = row_of(pool, f"{prefix}{name} seed {seed}", ids, seed)
        sources = np.array([prompt.source for prompt in pool.prompts])
        outcomes[chats] = tables({name: runs_of(by_seed) for name, by_seed in rows.items()}, sources)
    path = (options.work if SMOKE else HERE) / "results.jsonl"
    write_results(path, outcomes | {"hardware": describe_hardware()})
    show(outcomes)


if __name__ == "__main__":
    main()
