"""Does a draft's confidence predict its acceptance, and τ on a workload that nobody labelled? See README.md."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from experiments.pool.pool import GAMMA, SMOKE, open_pool, pool_parser, trained_draft
from experiments.results import write_results
from jsfdd.base.hardware import describe_hardware
from jsfdd.evaluation import replay
from jsfdd.evaluation.acceptance import acceptance_figures

from . import confidence

HERE = Path(__file__).parent

matplotlib.use("Agg")


def main() -> None:
    parser = pool_parser(__doc__, epochs=4)
    parser.add_argument("--draft", default="full seed 0", help="an arm that was run there")
    options = parser.parse_args()
    pool = open_pool(options)
    recorded, (states, _) = pool.recorded[0.0], pool.judges[0.0]
    draft, params, _ = trained_draft(pool, options.draft)
    judge = replay.make_judge(pool.loaded.target, states, recorded, draft, pool.loaded.mesh, num_draft_tokens=GAMMA)
    judged = judge(params)
    counts = replay.walk(recorded, judged)
    drafted = confidence.proposed(recorded, judged)
    sources = np.array([prompt.source for prompt in pool.prompts])
    by_source = {source: confidence.rows_of(drafted, sources[drafted.prompt] == source) for source in dict.fromkeys(sources)}
    depths = {depth: confidence.rows_of(drafted, drafted.depth == depth) for depth in range(1, GAMMA + 1)}
    results = {
        "hardware": describe_hardware(),
        "draft": options.draft,
        "all": confidence.figures(drafted, 0),
        "by_depth": {depth: confidence.figures(part, 0) for depth, part in depths.items() if part.reached.any()},
        "by_source": {source: confidence.figures(part, 0) for source, part in by_source.items()},
        "decoders_tau": {source: acceptance_figures(counts, sources == source, 0)["tau"] for source in by_source},
        "tau": {
            source: {
                "measured": confidence.measured_tau(part, 0),
                "as_confident": confidence.expected_tau(part, 0),
                "predicted_from": {
                    other_source: confidence.predicted_tau(part, confidence.thresholds(labelled), 0)
                    for other_source, labelled in by_source.items()
                },
            }
            for source, part in by_source.items()
        },
    }
    errors = {"as_confident": [], "atc": [], "tau_of_the_other": []}
    for source, row in results["tau"].items():
        truth = row["measured"]["tau"]
        for other_source, predicted in row["predicted_from"].items():
            if other_source != source:
                errors["as_confident"].append(abs(row["as_confident"]["tau"] - truth))
                errors["atc"].append(abs(predicted["tau"] - truth))
                errors["tau_of_the_other"].append(abs(results["tau"][other_source]["measured"]["tau"] - truth))
    results["mean_absolute_error"] = {name: float(np.mean(part)) for name, part in errors.items()}
    out = options.work if SMOKE else HERE
    write_results(out / "results.jsonl", results)
    _plot(results, out / "reliability.png")


def _plot(results: dict, path: Path) -> None:
    """Accepted share against the draft's probability, by source and by depth; a larger mark stands for more tokens."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True, layout="constrained")
    for axis, by in zip(axes, ("source", "depth")):
        axis.plot([0, 1], [0, 1], color="0.6", lw=1, ls=":")
        for number, (name, figures) in enumerate(results[f"by_{by}"].items()):
            x, y, low, high, count = np.array([list(part.values()) for part in figures["reliability"]]).T
            axis.vlines(x, low, high, color=f"C{number}", lw=1.5, alpha=0.4)
            axis.plot(x, y, color=f"C{number}", label=f"depth {name}" if by == "depth" else name)
            axis.scatter(x, y, s=4 + 120 * count / count.sum(), color=f"C{number}", lw=0, zorder=3)
        axis.set(xlim=(0, 1), ylim=(-0.02, 1.03), xlabel="the draft's probability of its token", title=f"by {by}")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("share accepted")
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
