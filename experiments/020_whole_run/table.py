"""What run.py measured, as totals of whole runs of 4 and of 30 epochs. See README.md."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np

from experiments.pool.counts import Runs, difference, draws, resampled, tau
from jsfdd.base.hardware import describe_hardware

HERE = Path(__file__).parent

EPOCHS = (4, 30)  # what was trained, and the paper's
SAME = {"all": "full", "half": "flatness_50%", "random half, not scored": "random_50%"}  # 014's, of the same chats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the pool's directory")
    options = parser.parse_args()
    work = options.work / "whole"
    facts, passes = (json.loads((work / name).read_text()) for name in ("facts.json", "passes.json"))
    tokens = json.loads((options.work / "arms/full_seed_0/row.json").read_text())["tokens"]
    scale = tokens / facts["tokens"]
    of_target_by_arm = {
        "all": scale * passes["features of all"]["cpu"],
        "half": scale * (passes["scores, features of half"]["cpu"] + passes["selection"]["cpu"]),
    }
    arms: dict[str, dict[int, dict]] = {}
    for path in sorted(work.glob("*/counts.json")):
        name, seed = re.fullmatch(r"(.*), seed (\d+)", path.parent.name).groups()
        stages = json.loads((path.parent / "stages.json").read_text())
        arms.setdefault(name, {})[int(seed)] = {"stages": stages, "counts": json.loads(path.read_text())}
    # Chance needs no scores: the target reads the half that was drawn, and the rest is as of the flattest half.
    unscored = {number: row | {"counts": None} for number, row in arms["half, 8k head"].items()}
    arms["random half, not scored, 8k head"] = unscored
    of_target_by_arm["random half, not scored"] = of_target_by_arm["all"] / 2
    runs = {name: _runs(name, by_seed, options.work) for name, by_seed in arms.items()}
    results = {"hardware": describe_hardware(), "passes": passes, "passes_on": facts, "tokens": tokens, "arms": {}}
    for name, by_seed in arms.items():
        of_target = of_target_by_arm.get(name.rsplit(", ", 1)[0], of_target_by_arm["half"])
        stored, training = (
            np.mean([row["stages"][stage]["cpu"] for row in by_seed.values()]) for stage in ("soft targets", "training")
        )
        drawn = draws(runs[name].steps[""].shape[1], len(runs[name].seeds))
        low, high = np.percentile(resampled(runs[name], "", *drawn), [2.5, 97.5])
        head = name.rsplit(", ", 1)[1]
        results["arms"][name] = {
            "target_pass": of_target, "soft_targets": float(stored), "training": float(training),
            "timed_seeds": sorted(by_seed), "seeds": runs[name].seeds,
            "tau": tau(runs[name], ""), "low": float(low), "high": float(high),
            "total": {e: float(of_target + stored + training * e / EPOCHS[0]) for e in EPOCHS},
        }  # fmt: skip
        if not name.startswith("all") and f"all, {head}" in runs:
            results["arms"][name]["minus_all"] = difference(runs[name], runs[f"all, {head}"], "")
    (HERE / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    whole = results["arms"]["all, 8k head"]
    for name, row in results["arms"].items():
        ratios = ", ".join(f"{whole['total'][e] / row['total'][e]:.2f}" for e in EPOCHS)
        minus = row.get("minus_all")
        cells = [
            name, *(f"{row[s]:.0f}" for s in ("target_pass", "soft_targets", "training")), f"{row['total'][EPOCHS[0]]:.0f}",
            ratios,
            f"{row['tau']:.3f} [{row['low']:.3f}, {row['high']:.3f}] ({len(row['seeds'])})",
            f"{minus['difference']:+.3f} [{minus['low']:+.3f}, {minus['high']:+.3f}]" if minus else "",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def _runs(name: str, by_seed: dict[int, dict], pool: Path) -> Runs:
    """Counts by prompt of the arm's seeds; where experiment 014 trained the same draft with others, of those too."""
    counts = {seed: np.array(row["counts"]["accept_counts"]) for seed, row in by_seed.items() if row["counts"]}
    arm, head = name.rsplit(", ", 1)
    if arm in SAME and head == "8k head":
        for path in pool.glob(f"arms/{SAME[arm]}_seed_*/row.json"):
            counts_of_014 = np.array(json.loads(path.read_text())["T=0"]["accept_counts"])
            seed = int(path.parent.name.rsplit("_", 1)[1])
            if seed in counts and not np.array_equal(counts[seed], counts_of_014):
                tau_here, tau_of_014 = map(_tau, (counts[seed], counts_of_014))
                print(f"{name}, seed {seed}: not the counts of 014's draft; τ {tau_here:.3f} here and {tau_of_014:.3f} there")
            counts.setdefault(seed, counts_of_014)
    seeds = sorted(counts)
    emitted = np.stack([counts[seed] @ np.arange(1, counts[seed].shape[1] + 1) for seed in seeds])
    return Runs(seeds, [{}] * len(seeds), {"": emitted}, {"": np.stack([counts[seed].sum(axis=1) for seed in seeds])})


def _tau(counts: np.ndarray) -> float:
    return float((counts @ np.arange(1, counts.shape[1] + 1)).sum() / counts.sum())


if __name__ == "__main__":
    main()
