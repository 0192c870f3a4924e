"""The table of the recipes that were run. See README.md."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.pool.counts import difference, read_runs, sources_of, summary
from experiments.results import write_results
from jsfdd.base.hardware import describe_hardware

HERE = Path(__file__).parent

BASE = "flatness 50%"  # the same chats, steps and seed, with cross entropy on stored means: what the recipes change
ALSO = ("full", "full, flatness 50% of the tokens", "full, random 50% of the tokens", "full, half the epochs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    runs, sources = read_runs(options.work), sources_of(options.work)
    names = [BASE, *(name for name in runs if name.startswith("half") or name in ALSO)]
    results = {
        "hardware": describe_hardware(),
        "arms": {name: summary(runs[name], sources) for name in names},
        "minus_half": {name: difference(runs[name], runs[BASE], "T=0") for name in names[1:]},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_results(options.out / "results.jsonl", results)
    print("| arm | steps | tokens in the loss | CPU seconds | of a store of its own | τ, T=0 | − half |")
    print("|---|---|---|---|---|---|---|")
    for name in sorted(names, key=lambda name: -results["arms"][name]["T=0"]["tau"]):
        arm, d = results["arms"][name], results["minus_half"].get(name)
        t = arm["T=0"]
        store_seconds = (
            runs[name].rows[0]["cpu_seconds_of_own_store"] if "cpu_seconds_of_own_store" in runs[name].rows[0] else 0
        )
        cells = [
            name, str(arm["steps"]), f"{arm['tokens_in_loss']:,}", f"{arm['cpu_seconds'][0]:.0f}", f"{store_seconds:.0f}",
            f"{t['tau']:.3f} [{t['low']:.3f}, {t['high']:.3f}]",
            f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" if d else "",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
