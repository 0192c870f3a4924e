"""Does selection help a draft that is adapted to a domain more than one that starts from nothing? See README.md.

An arm that was run is read again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.pool import choices
from experiments.pool.answered import judges_of, open_answered
from experiments.pool.pool import SMOKE, Arm, Pool, run_arm, trained_draft
from experiments.results import read_results, write_results
from jsfdd.base.hardware import describe_hardware
from jsfdd.selection.sfdd import how_many, random_score
from jsfdd.training.recipe import Recipe

from .table import print_tables

HERE = Path(__file__).parent

DOMAINS = ("code_instruct", "math_gsm8k", "instruct_roleplay")
ELSEWHERE, IN_DOMAIN = (40, 16) if SMOKE else (400, 240)  # chats that the first draft and the others learn from
EPOCHS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=Path, required=True, help="folder of a.jsonl, as experiments/pool/answered.py has it")
    parser.add_argument("--work", type=Path, required=True, help="directory for all that is computed; continued")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    options = parser.parse_args()
    recipe = Recipe(epochs=EPOCHS, learning_rate=1e-3, draft_vocab=8192, log_every=20, save_every=100_000, held_out_share=0.0)
    pool = open_answered(options.answers, options.work, recipe)
    path = (options.work if SMOKE else HERE) / "results.jsonl"
    results = read_results(path) | {"hardware": describe_hardware()}
    for seed in options.seeds:
        for domain in DOMAINS:
            rows = results.setdefault(domain, {})
            for name, row in run_domain(pool, domain, seed):
                rows.setdefault(name, {})[str(seed)] = counts_of(row)
                write_results(path, results)
    print_tables(results)


def run_domain(pool: Pool, domain: str, seed: int) -> Iterator[tuple[str, dict]]:
    """(arm, its row): a draft of all other sources as it is, then fresh drafts and that one, trained on parts of the domain."""
    narrow = judged_by(pool, domain)
    before = f"{domain}, other sources, seed {seed}"
    others = [sample.id for sample in pool.samples if sample.source != domain]
    others = sorted(others, key=lambda name: random_score(seed, name))[:ELSEWHERE]
    yield "other sources", run_arm(narrow, before, Arm(others, {"seed": seed}))
    starts = {"from nothing": None, "from a draft": trained_draft(pool, before)}
    for choice, ids in parts(pool, domain, seed).items():
        for start, draft in starts.items():
            arm = Arm(ids, {"seed": seed}, init=draft)
            yield f"{start}, {choice}", run_arm(narrow, f"{domain}, {start}, {choice}, seed {seed}", arm)


def parts(pool: Pool, domain: str, seed: int) -> dict[str, list[str]]:
    """Samples of the domain, a half of them at random, and the flattest half of each of their clusters."""
    chosen = [sample.id for sample in pool.samples if sample.source == domain][:IN_DOMAIN]
    by_chance = sorted(chosen, key=lambda name: random_score(seed, name))
    # All other samples are one more cluster, of which nothing is taken.
    clusters = np.where(np.isin(pool.table.ids, chosen), choices.prompt_clusters(pool), -1)
    flattest = set(choices.best_of_groups(pool, clusters, pool.table["flatness"], 0.5)) & set(chosen)
    return {
        "all": chosen,
        "random half": by_chance[: how_many(0.5, len(chosen))],
        "flattest half of every cluster": [name for name in chosen if name in flattest],
    }


def judged_by(pool: Pool, source: str) -> Pool:
    """The same pool, whose judge replays the answers of one source alone."""
    recorded, (states, _) = pool.recorded[0.0], pool.judges[0.0]
    rows = np.flatnonzero(judges_of(pool, source))
    recorded = recorded._replace(samples=[recorded.samples[i] for i in rows], prompts=np.arange(len(rows)))
    return pool._replace(recorded={0.0: recorded}, judges={0.0: (states, {})})


def counts_of(row: dict) -> dict:
    """What a table needs: cost, and emitted tokens and steps of every prompt."""
    counts = np.array(row["T=0"]["accept_counts"])
    return {
        "samples": row["samples"], "steps_of_training": row["steps"], "cpu_seconds": row["cpu_seconds"],
        "emitted": (counts @ np.arange(1, counts.shape[1] + 1)).tolist(), "steps": counts.sum(axis=1).tolist(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
