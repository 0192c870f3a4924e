"""tokens/s of 017's drafts, alone and together, by decoding. See README.md."""

from __future__ import annotations

from pathlib import Path

from experiments.pool.pool import MAX_NEW_TOKENS, SMOKE, Pool, open_pool, pool_parser
from experiments.results import read_results, write_results
from jsfdd.base.hardware import describe_hardware
from jsfdd.decoding.settings import TreeShape
from jsfdd.evaluation.evaluate import evaluate

from .systems import NODES, PROMPTS, System, systems

HERE = Path(__file__).parent

FIGURES = (
    "n_prompts", "tau", "tau_low", "tau_high", "tokens_per_second", "baseline_tokens_per_second", "speedup", "speedup_low",
    "speedup_high", "same_text_share",
)  # fmt: skip


def decoded(pool: Pool, chosen: dict[str, System], temperature: float, per_source: int, tree: TreeShape) -> dict[str, dict]:
    """One turn of `each` prompts of every benchmark, one prompt at a time, all systems of one budget in turn on it."""
    prompts = []
    for source in PROMPTS:
        of_source = [prompt for prompt in pool.prompts if prompt.source == source][:per_source]
        prompts += [prompt.__class__(prompt.id, source, prompt.turns[:1]) for prompt in of_source]
    timings = {}
    for times in sorted({system.nodes // NODES for system in chosen.values()}):
        teams = {name: system.team for name, system in chosen.items() if system.nodes == times * NODES}
        reports = evaluate(
            pool.loaded.target, teams, prompts, pool.loaded.mesh, temperature=temperature, num_draft_tokens=tree.depth,
            max_new_tokens=MAX_NEW_TOKENS, batch_size=1, seed=0, tree=TreeShape(tree.depth, tree.top_k, times * tree.nodes),
        )  # fmt: skip
        for name, report in reports.items():
            name = name.replace(f"at {times * NODES}", f"at {times * tree.nodes}")
            timings[name] = {"nodes": times * tree.nodes} | {figure: report[figure] for figure in FIGURES}
            print(f"{name}: τ {report['tau']:.3f}, speedup {report['speedup']:.3f}", flush=True)
    return timings


def main() -> None:
    parser = pool_parser(__doc__, epochs=5)
    parser.set_defaults(chats=16 if SMOKE else 860)
    parser.add_argument("--trainings", nargs="+", default=["EAGLE-2", "HASS"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--each", type=int, default=1 if SMOKE else 4, help="prompts of each benchmark")
    parser.add_argument("--tree", nargs=3, type=int, default=[5, 10, NODES], help="depth, top-k and nodes (doubled at 120)")
    parser.add_argument("--systems", nargs="+", help="of those in the tables; all unless given")
    options = parser.parse_args()
    pool = open_pool(options, [0.0], per_file=PROMPTS, answers="answers_taps")
    path = (options.work if SMOKE else HERE) / "clock.jsonl"
    tree = TreeShape(*options.tree)
    budget = "" if tree == TreeShape(5, 10, NODES) else f", trees of depth {tree.depth}, top-k {tree.top_k}, {tree.nodes} nodes"
    for training in options.trainings:
        chosen = systems(pool, training, options.seed)
        chosen = {name: system for name, system in chosen.items() if not options.systems or name in options.systems}
        for temperature in options.temperatures:
            timings = decoded(pool, chosen, temperature, options.each, tree)
            results = read_results(path)
            results[f"{training}, T={temperature:g}{budget}"] = timings
            results["hardware"] = describe_hardware()
            write_results(path, results)


if __name__ == "__main__":
    main()
