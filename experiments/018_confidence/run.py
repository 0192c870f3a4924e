"""Does a draft's confidence predict its acceptance, and τ on a workload that nobody labelled? See README.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "014_selection"))
from pool import GAMMA, SMOKE, open_pool, pool_parser, trained_draft  # noqa: E402

from jsfdd.evaluation import confidence, plots, replay  # noqa: E402
from jsfdd.evaluation.acceptance import acceptance_figures  # noqa: E402
from jsfdd.mesh import describe_hardware  # noqa: E402

matplotlib.use("Agg")


def main() -> None:
    parser = pool_parser(__doc__, epochs=4)
    parser.add_argument("--draft", default="full seed 0", help="an arm that was run there")
    options = parser.parse_args()
    pool = open_pool(options)
    recorded, (states, _) = pool.recorded[0.0], pool.judges[0.0]
    draft, params = trained_draft(pool, options.draft)
    judge = replay.make_judge(pool.loaded.target, states, recorded, draft, pool.loaded.mesh, num_draft_tokens=GAMMA)
    judged = judge(params)
    counts = replay.walk(recorded, judged)
    of = confidence.proposed(recorded, judged)
    sources = np.array([prompt.source for prompt in pool.prompts])
    own = {source: confidence.only(of, sources[of.prompt] == source) for source in dict.fromkeys(sources)}
    depths = {depth: confidence.only(of, of.depth == depth) for depth in range(1, GAMMA + 1)}
    results = {
        "hardware": describe_hardware(),
        "draft": options.draft,
        "all": confidence.figures(of, 0),
        "by_depth": {depth: confidence.figures(each, 0) for depth, each in depths.items() if each.reached.any()},
        "by_source": {source: confidence.figures(each, 0) for source, each in own.items()},
        "decoders_tau": {source: acceptance_figures(counts, sources == source, 0)["tau"] for source in own},
        "tau": {
            source: {
                "measured": confidence.measured_tau(each, 0),
                "as_confident": confidence.expected_tau(each, 0),
                "predicted_from": {
                    other: confidence.predicted_tau(each, confidence.thresholds(labelled), 0) for other, labelled in own.items()
                },
            }
            for source, each in own.items()
        },
    }
    errors = {"as_confident": [], "atc": [], "tau_of_the_other": []}
    for source, row in results["tau"].items():
        truth = row["measured"]["tau"]
        for other, predicted in row["predicted_from"].items():
            if other != source:
                errors["as_confident"].append(abs(row["as_confident"]["tau"] - truth))
                errors["atc"].append(abs(predicted["tau"] - truth))
                errors["tau_of_the_other"].append(abs(results["tau"][other]["measured"]["tau"] - truth))
    results["mean_absolute_error"] = {name: float(np.mean(each)) for name, each in errors.items()}
    out = options.work if SMOKE else HERE
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    bins = {source: confidence.reliability(each, each.probability, 0) for source, each in own.items()}
    colours = {source: f"C{i}" for i, source in enumerate(own)}
    picture = plots.reliability("accepted share against the draft's probability", bins, colours)
    (out / "reliability.svg").write_text(picture)


if __name__ == "__main__":
    main()
