"""Train drafts of each kind on one pool, at equal steps and at equal CPU seconds, and judge them by replay. See README.md.

An arm that is in results.jsonl is not run again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from experiments.pool import choices
from experiments.pool.judge import Judge
from experiments.pool.pool import SMOKE, Arm, Pool, open_pool, pool_parser
from experiments.results import read_results, write_results
from jsfdd.base.hardware import describe_hardware

from .table import print_tables

HERE = Path(__file__).parent

KINDS = {
    "EAGLE-2": {},
    "HASS, 3 steps": dict(draft_steps=3),
    "EAGLE-3, 3 steps": dict(draft_kind="eagle3", draft_steps=3),
    "EAGLE-3, 7 steps": dict(draft_kind="eagle3", draft_steps=7),
    "EAGLE-3, 1 step": dict(draft_kind="eagle3", draft_steps=1),
    "EAGLE-3, 3 steps, frozen head": dict(draft_kind="eagle3", draft_steps=3, draft_head="frozen"),
    "EAGLE-3, 3 steps, decay 1": dict(draft_kind="eagle3", draft_steps=3, step_decay=1.0),
}
REFERENCE = "EAGLE-3, 3 steps"  # whose CPU seconds the others are given


def main() -> None:
    parser = pool_parser(__doc__, epochs=4)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--only", nargs="+", help="of the kinds; all unless given")
    parser.add_argument("--halves", action="store_true", help="of the reference, on two halves of the chats")
    parser.add_argument("--results", type=Path, help="results.jsonl; beside this file unless given")
    options = parser.parse_args()
    pool = open_pool(options, draft_kind="eagle3")
    path = options.results or (options.work if SMOKE else HERE) / "results.jsonl"
    results = read_results(path)
    results |= {
        "hardware": describe_hardware(), "chats": len(pool.samples), "epochs": options.epochs,
        "prompts": [prompt.source for prompt in pool.prompts],
    }  # fmt: skip
    judge = Judge(pool.loaded.target, pool.loaded.mesh, pool.recorded[0.0], pool.judges[0.0][0])

    def run(name: str, seed: int, ids, recipe: dict) -> dict:
        rows = results.setdefault("arms", {}).setdefault(name, {})
        if str(seed) not in rows:
            folder = pool.work / "arms" / f"{name}_seed_{seed}".replace(" ", "_").replace(",", "")
            shutil.rmtree(folder, ignore_errors=True)  # a training that goes on would count the rest of its cost alone
            row, draft, params = Arm(ids, recipe | {"seed": seed}).train(pool, folder)
            rows[str(seed)] = row | judge(draft, params)
            write_results(path, results)
            print(f"{name}, seed {seed}: {summary(rows[str(seed)])}", flush=True)
        return rows[str(seed)]

    if options.halves:
        run_halves(pool, options, run)
    else:
        run_kinds(pool, options, run)
    print_tables(results)


def run_kinds(pool: Pool, options: argparse.Namespace, run) -> None:
    """Every kind for as many epochs, and then for as many as cost what the reference did."""
    everything = [sample.id for sample in pool.samples]
    kinds = {name: recipe for name, recipe in KINDS.items() if not options.only or name in (REFERENCE, *options.only)}
    for seed in options.seeds:
        rows = {name: run(name, seed, everything, recipe) for name, recipe in kinds.items()}
        for name, recipe in kinds.items():
            epochs = round(options.epochs * seconds(rows[REFERENCE]) / seconds(rows[name]))
            if epochs not in (0, options.epochs):
                run(f"{name}, equal cost", seed, everything, recipe | {"epochs": epochs})


def run_halves(pool: Pool, options: argparse.Namespace, run) -> None:
    """The reference on a random half, and on the flattest half of every cluster of prompts."""
    flatness = [score for score in pool.table["flatness"]]
    clusters = choices.prompt_clusters(pool)
    for seed in options.seeds:
        halves = {
            "random half": choices.by_metric(pool, "random", 0.5, seed),
            "flattest half of every cluster": choices.best_of_groups(pool, clusters, flatness, 0.5),
        }
        for name, ids in halves.items():
            run(f"{REFERENCE}, {name}", seed, ids, KINDS[REFERENCE])


def seconds(row: dict) -> float:
    """CPU seconds of training, and of what was stored for this arm alone."""
    return row["cpu_seconds"] + row["cpu_seconds_of_own_store"]


def summary(row: dict) -> str:
    """One line of a run."""
    taus = [f"τ {sum(row[name]['emitted']) / sum(row[name]['steps']):.3f} of {name}s" for name in ("chain", "tree")]
    return f"{row['steps']} steps, {seconds(row):.0f} CPU seconds, {', '.join(taus)}"


if __name__ == "__main__":
    main()
