"""Acceptance of 017's drafts, alone and together, by replay of trees: counts by prompt. See README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.pool.pool import AHEAD, MAX_NEW_TOKENS, SMOKE, Pool, open_pool, pool_parser
from experiments.results import read_results, write_results
from jsfdd.base.hardware import describe_hardware
from jsfdd.decoding.settings import TreeShape, decode_setup
from jsfdd.evaluation.replay_trees import make_tree_replay

from .systems import PROMPTS, System, systems
from .tables import summaries, table

HERE = Path(__file__).parent


def replayed(pool: Pool, system: System, temperature: float, programs: dict) -> dict:
    """JSON-ready counts of one system: by prompt emitted tokens and steps, by depth, by benchmark who was verified."""
    recorded, (states, _) = pool.recorded[temperature], pool.judges[temperature]
    target = pool.loaded.target
    tree, team = TreeShape(AHEAD, 10, system.nodes), system.team
    setup = decode_setup(
        target, team.configs, num_draft_tokens=AHEAD, max_new_tokens=MAX_NEW_TOKENS, tree=tree, combine=team.combine
    )
    if (setup, temperature) not in programs:
        programs[setup, temperature] = make_tree_replay(target, states, recorded, setup, pool.loaded.mesh)
    counts, shares = programs[setup, temperature](team.params)
    row = {
        "nodes": system.nodes, "emitted": counts.emitted.tolist(), "steps": counts.steps.tolist(),
        "reached": counts.reached.sum(axis=0).tolist(), "accepted": counts.accepted.sum(axis=0).tolist(),
    }  # fmt: skip
    if team.combine is not None:
        sources = np.array([prompt.source for prompt in pool.prompts])
        total = {s: [x[sources == s].sum(axis=0) for x in shares] for s in PROMPTS}
        row["shares"] = {
            s: {kind: (x / x.sum()).tolist() for kind, x in zip(("verified", "accepted"), parts)} for s, parts in total.items()
        }
    return row


def main() -> None:
    parser = pool_parser(__doc__, epochs=5)
    parser.set_defaults(chats=16 if SMOKE else 860)
    parser.add_argument("--trainings", nargs="*", default=["EAGLE-2", "HASS"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--flattest", action="store_true", help="of drafts that were trained on the flattest half")
    parser.add_argument("--systems", nargs="+", help="of the replayed; all unless given")
    options = parser.parse_args()
    pool = open_pool(options, options.temperatures, per_file=PROMPTS, answers="answers_taps")
    path = (options.work if SMOKE else HERE) / "results.jsonl"
    results = read_results(path)
    results |= {"hardware": describe_hardware(), "prompts": [prompt.source for prompt in pool.prompts]}
    chosen, programs = ", flattest" if options.flattest else "", {}
    for training in options.trainings:
        for temperature in options.temperatures:
            for seed, next_seed in zip(options.seeds, [*options.seeds[1:], options.seeds[0]]):
                key = f"{training}, T={temperature:g}"
                replays = results.setdefault("replayed", {}).setdefault(key, {})
                second_seed = next_seed if next_seed != seed else None
                for name, system in systems(pool, training, seed, chosen, second_seed).items():
                    rows = replays.setdefault(name, {})
                    if str(seed) in rows or (options.systems and name not in options.systems):
                        continue
                    rows[str(seed)] = row = replayed(pool, system, temperature, programs)
                    print(f"{key}, seed {seed}, {name}: τ {sum(row['emitted']) / sum(row['steps']):.3f}", flush=True)
                    write_results(path, results)
    print(table(summaries(results), read_results(path.with_name("clock.jsonl"))))


if __name__ == "__main__":
    main()
