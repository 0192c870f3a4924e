"""Acceptance of 017's drafts, alone and together, by replay of trees; their speed by decoding. See README.md."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "014_selection"))
from pool import AHEAD, MAX_NEW_TOKENS, SMOKE, Pool, open_pool, pool_parser, trained_draft  # noqa: E402

from jsfdd.decoding.ensemble import Combine, Ensemble, average_drafts  # noqa: E402
from jsfdd.decoding.state import DecodeSetup  # noqa: E402
from jsfdd.decoding.tree import TreeShape  # noqa: E402
from jsfdd.evaluation.acceptance import acceptance_figures  # noqa: E402
from jsfdd.evaluation.evaluate import evaluate  # noqa: E402
from jsfdd.evaluation.intervals import tau_difference  # noqa: E402
from jsfdd.evaluation.replay import Recorded  # noqa: E402
from jsfdd.evaluation.replay_trees import make_tree_replay  # noqa: E402
from jsfdd.mesh import describe_hardware  # noqa: E402

NODES = 60
BENCHMARKS = {"gsm8k": 2} if SMOKE else {"mt_bench": 15, "gsm8k": 20}  # of the pool's prompts, the first so many
SINGLE = ("maths", "chat", "mixed small", "mixed large")


def systems(pool: Pool, training: str, seed: int) -> dict[str, tuple]:
    """name -> (draft shapes, parameters, Combine or None, nodes verified)."""
    drafts = {name: trained_draft(pool, f"{training} {name} seed {seed}") for name in SINGLE}
    found = {name: (*draft, None, NODES) for name, draft in drafts.items()}
    both = {name: drafts[name] for name in ("maths", "chat")}
    found["averaged"] = (*average_drafts(both, (0.5, 0.5)), None, NODES)
    shapes, params = (tuple(part) for part in zip(*both.values()))
    found["routed"] = (shapes, params, Combine("route"), NODES)
    found["routed by entropy"] = (shapes, params, Combine("route", "entropy"), NODES)
    found["routed per prompt"] = (shapes, params, Combine("route", "confidence", 5), NODES)
    found["merged at 60"] = (shapes, params, Combine("merge"), NODES)
    found["merged at 120"] = (shapes, params, Combine("merge"), 2 * NODES)
    return found


def some_of(pool: Pool, recorded: Recorded, per_benchmark: dict[str, int]) -> Recorded:
    """The recorded answers to the first prompts of some benchmarks, their prompts numbered anew."""
    sources = [prompt.source for prompt in pool.prompts]
    kept = [i for name, count in per_benchmark.items() for i in [j for j, s in enumerate(sources) if s == name][:count]]
    number = {old: new for new, old in enumerate(kept)}
    rows = [row for row, prompt in enumerate(recorded.prompts) if prompt in number]
    return recorded._replace(
        samples=[recorded.samples[row] for row in rows], prompts=np.array([number[recorded.prompts[row]] for row in rows])
    )


def replayed(pool: Pool, training: str, seed: int, temperature: float, benchmarks: dict[str, int], only) -> dict:
    """τ of every system, over all prompts and by benchmark; who was verified and accepted; differences that matter."""
    recorded = some_of(pool, pool.recorded[temperature], benchmarks)
    states, _ = pool.judges[temperature]
    target = pool.loaded.target
    sources = np.empty(recorded.prompts.max() + 1, object)
    sources[recorded.prompts] = [sample.source for sample in recorded.samples]
    programs, counts, rows = {}, {}, {}
    for name, (shapes, params, combine, nodes) in systems(pool, training, seed).items():
        if only and name not in only:
            continue
        tree = TreeShape(AHEAD, 10, nodes)
        setup = DecodeSetup(target.config, shapes, AHEAD, MAX_NEW_TOKENS, target.stop_tokens, tree, combine=combine)
        if setup not in programs:
            programs[setup] = make_tree_replay(target, states, recorded, setup, pool.loaded.mesh)
        begin = time.perf_counter()
        counts[name], shares = programs[setup](params)
        rows[name] = {
            "nodes": nodes, "replay_seconds": time.perf_counter() - begin,
            **acceptance_figures(counts[name], np.ones(len(sources), bool), 0),
            "by_benchmark": {s: acceptance_figures(counts[name], sources == s, 0) for s in benchmarks},
        }  # fmt: skip
        if combine is not None:
            total = {s: [x[sources == s].sum(axis=0) for x in shares] for s in benchmarks}
            rows[name]["shares"] = {
                s: {kind: (x / x.sum()).tolist() for kind, x in zip(("verified", "accepted"), each)}
                for s, each in total.items()
            }
        print(f"{training} seed {seed} T={temperature:g} {name}: τ {rows[name]['tau']:.3f}", flush=True)
    differences = {
        f"{a} − {b}": tau_difference(counts[a].emitted, counts[a].steps, counts[b].emitted, counts[b].steps, 0)
        for a, b in (
            ("merged at 60", "mixed large"), ("merged at 60", "routed"), ("merged at 120", "merged at 60"),
            ("routed", "mixed large"), ("routed", "mixed small"), ("averaged", "mixed small"), ("merged at 60", "mixed small"),
        )
        if a in counts and b in counts
    }  # fmt: skip
    return {"prompts": benchmarks, "systems": rows, "differences": differences}


def timed(pool: Pool, training: str, seed: int, prompts: int) -> dict:
    """tokens/s and τ by real decoding, greedy, one turn of few prompts, all systems in turn on every batch."""
    target = pool.loaded.target
    chosen = []
    for source in BENCHMARKS:
        own = [prompt for prompt in pool.prompts if prompt.source == source]
        chosen += [prompt.__class__(prompt.id, source, prompt.turns[:1]) for prompt in own[:prompts]]
    found = {}
    drafts = systems(pool, training, seed)
    for nodes in (NODES, 2 * NODES):
        both = {name: trained_draft(pool, f"{training} {name} seed {seed}") for name in ("maths", "chat")}
        of_size = {"merged": Ensemble(both, Combine("merge"))}
        if nodes == NODES:
            of_size |= {name: drafts[name][:2] for name in ("maths", "mixed large")}
            routes = {"routed": Combine("route"), "routed per prompt": Combine("route", "confidence", 5)}
            of_size |= {name: Ensemble(both, combine) for name, combine in routes.items()}
        reports = evaluate(
            target, of_size, chosen, pool.loaded.mesh, temperature=0.0, num_draft_tokens=AHEAD, max_new_tokens=MAX_NEW_TOKENS,
            batch_size=1, seed=0, tree=TreeShape(AHEAD, 10, nodes),
        )  # fmt: skip
        names = ("tau", "tau_low", "tau_high", "tokens_per_second", "speedup", "speedup_low", "speedup_high", "same_text_share")
        found |= {f"{name}, {nodes} nodes": {key: report[key] for key in names} for name, report in reports.items()}
    return found


def main() -> None:
    parser = pool_parser(__doc__, epochs=5)
    parser.add_argument("--trainings", nargs="+", default=["EAGLE-2", "HASS"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--systems", nargs="+", help="of the replayed; all unless given")
    parser.add_argument("--number", nargs=2, type=int, metavar=("MT_BENCH", "GSM8K"), help="prompts, fewer than the default")
    parser.add_argument("--timed", type=int, default=0, help="prompts of each benchmark to decode for speed")
    options = parser.parse_args()
    pool = open_pool(options, options.temperatures)
    benchmarks = dict(zip(BENCHMARKS, options.number)) if options.number else BENCHMARKS
    path = (options.work if SMOKE else HERE) / "results.json"
    empty = {"hardware": describe_hardware(), "replayed": {}, "decoded": {}}
    results = json.loads(path.read_text()) if path.exists() else empty
    for training in options.trainings:
        for seed in options.seeds:
            for temperature in options.temperatures:
                key = f"{training}, seed {seed}, T={temperature:g}"
                if key not in results["replayed"]:
                    results["replayed"][key] = replayed(pool, training, seed, temperature, benchmarks, options.systems)
                    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        if options.timed:
            results["decoded"][training] = timed(pool, training, options.seeds[0], options.timed)
            path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
