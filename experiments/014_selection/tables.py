"""Tables, paired intervals and plots from the arms that were run. See README.md."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from scipy.stats import spearmanr

from experiments.pool.counts import (
    TEMPERATURES,
    Runs,
    by_benchmark,
    difference,
    read_runs,
    sources_of,
    summary,
    tau,
    with_seeds,
)
from experiments.results import read_results, write_results
from jsfdd.base.hardware import describe_hardware
from jsfdd.scoring.metrics import METRICS
from jsfdd.scoring.table import join, read_scores
from jsfdd.selection import sfdd

matplotlib.use("Agg")
HERE = Path(__file__).parent
COMPARED = (  # in pairs, by benchmark
    ("flatness 50%", "random 50%"),
    ("flatness 50% within sources", "random 50%"),
    ("flatness 50% within sources", "flatness 50%"),
    ("flatness 50% within clusters", "random 50%"),
    ("flatness 50% within clusters", "flatness 50%"),
    ("flatness 50% within clusters", "random 50% within clusters"),
    ("full, flatness 50% of the tokens", "full, random 50% of the tokens"),
    ("flatness 20%", "random 20%"),
    ("flatness 5%", "random 5%"),
)
HALVES = {  # the README's picture
    "full": "all conversations",
    "flatness 50% equal steps": "flattest half, as many steps as all",
    "flatness 50% within clusters": "flattest half of each cluster of prompts",
    "random 50% within clusters": "random half of each cluster",
    "flatness 50% within sources": "flattest half of each source",
    "random 50%": "random half",
    "flatness 50%": "flattest half",
    "least flat 50%": "least flat half",
}
OTHERS = ("half", "EAGLE-2", "HASS")  # arms of other experiments in the same directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="the pool's directory; without it results.jsonl is read and printed")
    parser.add_argument("--chats", type=int, default=430, help="as the arms were made from")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    if options.work is None:
        results = read_results(options.out / "results.jsonl")
        _print(results)
        _plot_halves(results, options.out / "halves.png")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    runs = {name: arm_runs for name, arm_runs in read_runs(options.work).items() if not name.startswith(OTHERS)}
    proxies = {name: runs.pop(name) for name in list(runs) if name.startswith("proxy at ")}
    sources = sources_of(options.work)
    results = {
        "hardware": describe_hardware(),
        "seconds": json.loads((options.work / "seconds.json").read_text()),
        "prompts": {name: int((sources == name).sum()) for name in dict.fromkeys(sources)},
        "arms": {name: summary(arm_runs, sources) for name, arm_runs in runs.items()},
        "minus_full": {}, "minus_random": {}, "compared": {}, "proxies": foretold(proxies, runs),
        "kept": composition(options.work, options.chats),
    }  # fmt: skip
    for name, arm_runs in runs.items():
        if name != "full" and "full" in runs and set(arm_runs.seeds) & set(runs["full"].seeds):
            shared = arm_runs.emitted.keys() & runs["full"].emitted.keys()
            results["minus_full"][name] = {t: difference(arm_runs, runs["full"], t) for t in sorted(shared)}
        share = re.search(r"(\d+)%", name)
        control = f"random {share.group(1)}%" if share else None
        if name == "progressive dropout, hardest":
            control = "progressive dropout, random"
        if "equal steps" in name:
            control += " equal steps"
        if "of the tokens" in name:
            control = "full, random 50% of the tokens"
        if control in runs and control != name:
            shared = arm_runs.emitted.keys() & runs[control].emitted.keys()
            results["minus_random"][name] = {t: difference(arm_runs, runs[control], t) for t in sorted(shared)}
    for a, b in COMPARED:
        if a in runs and b in runs:
            shared = sorted(runs[a].emitted.keys() & runs[b].emitted.keys())
            results["compared"][f"{a} − {b}"] = {t: by_benchmark(runs[a], runs[b], t, sources) for t in shared}
    write_results(options.out / "results.jsonl", results)
    _print(results)
    _plot_halves(results, options.out / "halves.png")
    _plot_arms(results, options.out / "tau.png")
    _plot_ratios(results, options.out / "ratios.png")


def composition(work: Path, chats: int) -> dict:
    """Of all chats, and of the half that each metric keeps: chats of every source; and the share of it that flatness keeps."""
    table = read_scores(work / "scores.parquet")
    table = join([table], table.ids[:chats])
    sources, kept = dict(zip(table.ids, table.sources)), {"all": set(table.ids)}
    kept |= {metric: set(sfdd.select(table, 0.5, metric=metric).ids) for metric in METRICS}
    counts = {metric: Counter(sources[i] for i in ids) for metric, ids in kept.items()}
    return {
        metric: {
            "sources": {source: counts[metric][source] for source, _ in counts["all"].most_common()},
            "of_flatness": len(ids & kept["flatness"]) / len(kept["flatness"]),
        }
        for metric, ids in kept.items()
    }


def foretold(proxies: dict[str, Runs], runs: dict[str, Runs]) -> dict:
    """Of proxy runs at each learning rate: τ of every arm beside its τ after all epochs, seed 0, and the rank correlation."""
    by_rate = {}
    for name, proxy in proxies.items():
        rate, arm = re.fullmatch(r"proxy at ([\d.e-]+), (.*)", name).groups()
        if arm in runs:
            pair = [tau(with_seeds(one, [0]), "T=0") for one in (proxy, runs[arm])]
            by_rate.setdefault(rate, {"arms": {}})["arms"][arm] = pair
    for row in by_rate.values():
        row["spearman"] = float(spearmanr(*zip(*row["arms"].values())).statistic)
    return by_rate


def _print(results: dict) -> None:
    """A table for each temperature, and what the proxies foretold."""
    benchmarks = list(results["prompts"])
    for t in TEMPERATURES:
        arms = {name: arm for name, arm in results["arms"].items() if t in arm}
        head = ["arm (seeds)", "samples", "steps", f"τ [95%], {t}", *benchmarks, "− full", "− random"]
        print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
        for name, arm in sorted(arms.items(), key=lambda item: -item[1][t]["tau"]):
            figures = arm[t]
            cells = [f"{name} ({len(arm['seeds'])})", str(arm["samples"]), str(arm["steps"])]
            cells += [_interval(figures["tau"], figures), *(f"{figures['by_benchmark'][b]:.3f}" for b in benchmarks)]
            for kind in ("minus_full", "minus_random"):
                d = results[kind].get(name, {}).get(t)
                cells.append(_interval(d["difference"], d, "+") if d else "")
            print("| " + " | ".join(cells) + " |")
    print()
    for pair, by_temperature in results["compared"].items():
        for t, row in by_temperature.items():
            cells = [f"{pair}, {t} ({row['all']['seeds']})", *(_interval(d["difference"], d, "+") for d in row.values())]
            print("| " + " | ".join(cells) + " |")
    for metric, row in results["kept"].items():
        print(f"| {metric} | {' | '.join(map(str, row['sources'].values()))} | {row['of_flatness']:.0%} |")
    for rate, row in results["proxies"].items():
        pairs = ", ".join(f"{arm} {proxy:.3f} → {final:.3f}" for arm, (proxy, final) in row["arms"].items())
        print(f"proxies at rate {rate}: Spearman {row['spearman']:+.2f} ({pairs})")


def _interval(value: float, row: dict, sign: str = "") -> str:
    low, high = (f"{row[name]:{sign}.3f}" for name in ("low", "high"))
    return f"{value:{sign}.3f} [{low}, {high}]".replace("-", "−")


def _plot_arms(results: dict, path: Path) -> None:
    """τ of every arm at both temperatures, with intervals and the single seeds."""
    names = sorted(results["arms"], key=lambda name: results["arms"][name]["T=0"]["tau"])
    names = [name for name in names if not re.search(r"\d+%$", name) or name.endswith(" 50%")]  # the others are ratios
    judged = [t for t in TEMPERATURES if any(t in results["arms"][name] for name in names)]
    size = (2.5 + 4.25 * len(judged), 0.27 * len(names) + 1)
    figure, axes = plt.subplots(1, len(judged), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, t in zip(axes[0], judged):
        for row, name in enumerate(names):
            arm = results["arms"][name].get(t)
            if arm is None:
                continue
            colour = {"flatness": "C3", "random": "C7", "full": "k"}.get(name.split()[0], "C0")
            axis.plot([arm["low"], arm["high"]], [row, row], color=colour, lw=1.5)
            axis.plot(arm["by_seed"], [row] * len(arm["by_seed"]), "|", color=colour, ms=6)
            axis.plot(arm["tau"], row, "o", color=colour, ms=4)
        axis.set(title=f"acceptance length τ at {t}", yticks=range(len(names)), yticklabels=names)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _plot_halves(results: dict, path: Path) -> None:
    """τ at T = 0 of the arms that the README speaks of, with intervals."""
    figure, axis = plt.subplots(figsize=(7, 2.9), layout="constrained")
    arms = {words: results["arms"][name]["T=0"] for name, words in HALVES.items() if name in results["arms"]}
    for row, (words, arm) in enumerate(reversed(arms.items())):
        colour = "C3" if "flattest" in words else "k" if "all" in words else "C7"
        axis.plot([arm["low"], arm["high"]], [row, row], color=colour, lw=1.5)
        axis.plot(arm["tau"], row, "o", color=colour, ms=5)
    axis.set(yticks=range(len(arms)), yticklabels=list(reversed(arms)), xlabel="acceptance length τ, greedy, 95% intervals")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_ratios(results: dict, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for metric, colour in (("flatness", "C3"), ("random", "C7"), ("energy", "C0")):
        named = {name: re.fullmatch(rf"{metric} (\d+)%", name) for name in results["arms"]}
        arms = {int(match.group(1)): results["arms"][name]["T=0"] for name, match in named.items() if match}
        arms[100] = results["arms"]["full"]["T=0"]
        x = sorted(arms)
        if len(x) < 3:
            continue
        axis.plot(x, [arms[i]["tau"] for i in x], "o-", ms=3, color=colour, label=metric)
        axis.fill_between(x, [arms[i]["low"] for i in x], [arms[i]["high"] for i in x], color=colour, alpha=0.15, lw=0)
    axis.set(title="acceptance length τ at T=0", xlabel="samples kept (%)", xscale="log")
    axis.set_xticks([5, 10, 20, 30, 50, 70, 100], [5, 10, 20, 30, 50, 70, 100])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
