"""scale.svg: seconds over rows, both logarithmic, with a line of what is linear."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from experiments.results import read_results

HERE = Path(__file__).parent


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "scale"  # the same figures, the same file
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for name, values in read_results(HERE / "results.jsonl")["scale"].items():
        rows = sorted(map(int, values))
        axis.loglog(rows, [values[str(row)]["seconds"] for row in rows], marker="o", label=name)
    axis.loglog([1e4, 1e7], [1e-2, 1e1], color="grey", linestyle=":", label="linear")
    axis.set_xlabel("rows")
    axis.set_ylabel("seconds")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "scale.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
