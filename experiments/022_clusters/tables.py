"""The tables of 022 from results.jsonl. See README.md."""

from __future__ import annotations

from pathlib import Path

from experiments.results import read_results


def show(results: dict) -> None:
    for chats, outcome in results.items():
        if chats == "hardware":
            continue
        print(f"\n{chats}\n")
        for name, row in outcome["arms"].items():
            cells_of_tau = [f"{row[t]['tau']:.3f} [{row[t]['low']:.3f}, {row[t]['high']:.3f}]" for t in ("T=0", "T=1")]
            print(f"| {name} | {row['samples']} | {row['steps']} | {' | '.join(cells_of_tau)} |")
        for name, by in outcome["differences"].items():
            cells = [f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for d in by.values()]
            print(f"| {name} ({by['all']['seeds']}) | {' | '.join(cells)} |")


if __name__ == "__main__":
    show(read_results(Path(__file__).with_name("results.jsonl")))
