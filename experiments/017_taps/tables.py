"""The tables of 017 from the counts in results.jsonl: τ of every system, intervals, and the differences that matter."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from experiments.pool.counts import Runs, difference, draws, resampled, tau
from experiments.results import read_results

COMPARED = (
    ("merged at 60", "mixed large"),
    ("merged at 60", "mixed small"),
    ("merged at 60", "routed"),
    ("merged at 120", "merged at 60"),
    ("merged at 120", "mixed large at 120"),
    ("mixed large at 120", "mixed large"),
    ("routed", "mixed small"),
    ("routed by entropy", "routed"),
    ("routed per prompt", "routed"),
    ("averaged", "mixed small"),
    ("averaged, of two starts", "averaged"),
    ("maths, flattest", "maths"),
    ("chat, flattest", "chat"),
    ("mixed small, flattest", "mixed small"),
    ("mixed large, flattest", "mixed large"),
    ("merged at 60, flattest", "merged at 60"),
)


def summaries(results: dict) -> dict:
    """{"EAGLE-2, T=0": {"systems": {name: figures}, "differences": {"a − b": figures}}}."""
    sources = np.array(results["prompts"])
    summaries_by_key = {}
    for key, by_name in results["replayed"].items():
        runs = {name: _runs(by_seed) for name, by_seed in by_name.items() if by_seed}
        summaries_by_key[key] = {
            "systems": {name: _figures(runs[name], by_name[name], sources) for name in runs},
            "differences": {f"{a} − {b}": difference(runs[a], runs[b], "") for a, b in COMPARED if a in runs and b in runs},
        }
    for temperature in ("T=0", "T=1"):
        hass, eagle = (results["replayed"].get(f"{training}, {temperature}", {}) for training in ("HASS", "EAGLE-2"))
        common = [name for name in hass if hass[name] and eagle.get(name)]
        if common:
            between = {f"{name}, HASS − EAGLE-2": difference(_runs(hass[name]), _runs(eagle[name]), "") for name in common}
            summaries_by_key[f"HASS, {temperature}"]["differences"] |= between
    return summaries_by_key


def _runs(by_seed: dict) -> Runs:
    emitted, steps = (np.array([row[name] for row in by_seed.values()], float) for name in ("emitted", "steps"))
    return Runs([int(seed) for seed in by_seed], list(by_seed.values()), {"": emitted}, {"": steps})


def _figures(runs: Runs, by_seed: dict, sources: np.ndarray) -> dict:
    def figures_of(picked: np.ndarray) -> dict:
        part = runs._replace(emitted={"": runs.emitted[""][:, picked]}, steps={"": runs.steps[""][:, picked]})
        low, high = np.percentile(resampled(part, "", *draws(len(picked), len(runs.seeds))), [2.5, 97.5])
        return {"tau": tau(part, ""), "low": float(low), "high": float(high)}

    rows = list(by_seed.values())
    reached, accepted = (np.sum([row[name] for row in rows], axis=0) for name in ("reached", "accepted"))
    figures = {
        "nodes": rows[0]["nodes"], "seeds": runs.seeds, **figures_of(np.arange(len(sources))),
        "by_benchmark": {name: figures_of(np.flatnonzero(sources == name)) for name in dict.fromkeys(sources.tolist())},
        "alpha": [float(a / r) if r else None for a, r in zip(accepted, reached)],
    }  # fmt: skip
    if "shares" in rows[0]:
        figures["first_verified"] = {
            source: float(np.mean([row["shares"][source]["verified"][0] for row in rows])) for source in rows[0]["shares"]
        }
    return figures


def table(summary: dict, clock: dict) -> str:
    """Markdown, a table for each training and temperature, with the speeds that `clock.py` found."""
    lines = []
    for key, group in summary.items():
        benchmarks = list(next(iter(group["systems"].values()))["by_benchmark"])
        head = ["system (seeds)", "nodes", "τ, all", *benchmarks, "α by depth", "nodes of maths", "tokens/s", "speedup"]
        lines += [f"\n{key}\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for name, row in group["systems"].items():
            shares = ", ".join(f"{share:.0%}" for share in row.get("first_verified", {}).values())
            alphas = " ".join("–" if alpha is None else f"{alpha:.2f}" for alpha in row["alpha"])
            taus = [_interval(row), *map(_interval, row["by_benchmark"].values())]
            cells = [f"{name} ({len(row['seeds'])})", str(row["nodes"]), *taus, alphas, shares, *_speed(clock, key, name)]
            lines.append("| " + " | ".join(cells) + " |")
        for name, row in group["differences"].items():
            lines.append(f"- {name}: {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] ({row['seeds']})")
    return "\n".join(lines)


def _speed(clock: dict, key: str, name: str) -> list[str]:
    row = clock.get(key, {}).get(name)
    if row is None:
        return ["", ""]
    return [f"{row['tokens_per_second']:.1f}", f"{row['speedup']:.2f} [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"]


def _interval(row: dict) -> str:
    return f"{row['tau']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent, help="folder of results.jsonl and clock.jsonl")
    folder = parser.parse_args().results
    print(table(summaries(read_results(folder / "results.jsonl")), read_results(folder / "clock.jsonl")))


if __name__ == "__main__":
    main()
