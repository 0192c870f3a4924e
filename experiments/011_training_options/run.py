"""What each training option costs and what it does to τ, on one set of chats. See README.md."""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from pathlib import Path

import numpy as np

from experiments.results import write_results
from jsfdd.base.hardware import describe_hardware
from jsfdd.commands import score, select, train
from jsfdd.commands.inputs import load
from jsfdd.commands.score import ScoreConfig
from jsfdd.commands.select import SelectConfig
from jsfdd.commands.train import TrainConfig, stores_means
from jsfdd.data.batches import epoch_batches, padding_share
from jsfdd.data.chat import read_prompts
from jsfdd.evaluation import evaluate as evaluation
from jsfdd.training.batch import TrainingData
from jsfdd.training.journal import read_lines
from jsfdd.training.train import METRICS, TIMINGS
from jsfdd.weights.draft import load_draft

HERE = Path(__file__).parent
_WEIGHING = {"token_retain_ratio", "token_weighting"}  # options that need token scores
HALF, TOKENS = dict(share=0.5), dict(token_retain_ratio=0.5)
ARMS = {
    "full": {},
    "full, seed 1": dict(seed=1),
    "half": HALF,
    "half, seed 1": HALF | dict(seed=1),
    "half + half the tokens": HALF | TOKENS,
    "half + half the tokens, seed 1": HALF | TOKENS | dict(seed=1),
    "half + random half of the tokens": HALF | TOKENS | dict(token_metric="random"),
    "half, int8 features": HALF | dict(feature_dtype="int8"),
    "half, reverse KL": HALF | dict(token_loss="reverse_kl"),
    "half, total variation": HALF | dict(token_loss="total_variation"),
    "half, hybrid": HALF | dict(token_loss="hybrid"),
    "half, HASS 3": HALF | dict(hass_steps=3),
    "half, draft vocabulary 4k": HALF | dict(draft_vocab=4096),
    "half, draft vocabulary 8k": HALF | dict(draft_vocab=8192),
}


def main() -> None:
    smoke = os.environ.get("SMOKE") == "1"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True, help="directory for stores, drafts and their logs; continued")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="all unless given")
    parser.add_argument("--epochs", type=int, default=1 if smoke else 3)
    parser.add_argument("--max-new-tokens", type=int, default=8 if smoke else 48)
    options = parser.parse_args()
    arms = {name: ARMS[name] for name in (list(ARMS)[2:5] if smoke else options.arms)}
    shared = dict(target="smollm2", data=tuple(options.data), max_length=384, batch_tokens=1024)
    clock, seconds = time.perf_counter, {}

    begin = clock()
    config = ScoreConfig(**shared, out=options.work, per_token=True, keep_features=("full",))
    loaded = load(config)
    seconds["load"], begin = clock() - begin, clock()
    score.score(config, loaded)
    seconds["score, features kept"] = clock() - begin
    select.select(SelectConfig(scores=options.work / "scores.parquet", retain_ratio=0.5, out=options.work))
    base = TrainConfig(
        **shared, out=options.work, epochs=options.epochs, learning_rate=1e-3, log_every=10, save_every=10_000,
        held_out_share=0.1,
    )  # fmt: skip
    kept, held_out = train.training_sides(loaded.samples, None, base)
    store = train.hidden_for_training(
        dataclasses.replace(base, features=str(options.work / "hidden")), loaded, [*kept, *held_out], None
    )
    begin = clock()
    means = train.known_for_training(base, loaded, TrainingData(kept, store))
    seconds["means of all, whole head"] = clock() - begin

    rows = {}
    for name, changes in arms.items():
        changes = dict(changes)
        share = changes.pop("share", 1.0)
        directory = options.work / "arms" / name.replace(" ", "_").replace(",", "").replace("+", "and")
        arm = dataclasses.replace(
            base,
            out=directory,
            selection=options.work / "selection.json" if share < 1 else None,
            token_scores=options.work / "token_scores.parquet" if _WEIGHING & set(changes) else None,
            **changes,
        )
        own_store = "feature_dtype" in changes
        shares_means = stores_means(arm) and not arm.draft_vocab and not own_store
        begin = clock()
        result = train.train(arm, loaded, None if own_store else store, means if shares_means else None)
        lines = read_lines(directory / TIMINGS)
        steps = np.diff([0, *(line["step"] for line in lines)])
        per_step = [line["seconds"] / count for line, count in zip(lines, steps, strict=True)]
        epoch_ends = {line["step"] for line in read_lines(directory / METRICS) if "held_out" in line}
        usual = [value for value, line in zip(per_step, lines, strict=True) if line["step"] not in epoch_ends]
        rows[name] = {
            "samples": result.samples,
            "steps": result.steps,
            "tokens_in_loss": result.tokens,
            "seconds": result.seconds,
            "seconds_with_own_stores": clock() - begin,
            "median_seconds_per_step": statistics.median(usual or per_step),
            "held_out": result.held_out,
            "directory": directory.name,
        }
        print(f"{name}: {result.seconds:.0f} s, {result.held_out}", flush=True)

    lengths = [len(sample.tokens) for sample in kept]
    prompts = read_prompts(options.prompts)
    drafts = {name: load_draft(options.work / "arms" / row["directory"]) for name, row in rows.items()}
    begin = clock()
    reports = evaluation.evaluate(
        loaded.target, drafts, prompts, loaded.mesh,
        temperature=0.0, num_draft_tokens=4, max_new_tokens=options.max_new_tokens, batch_size=8, seed=0,
    )  # fmt: skip
    seconds["evaluate"] = clock() - begin
    for name, report in reports.items():
        rows[name] |= {key: report[key] for key in ("tau", "tau_low", "tau_high", "alpha")}
        print(f"{name}: τ {report['tau']:.3f} [{report['tau_low']:.3f}, {report['tau_high']:.3f}]")
    results = {
        "hardware": describe_hardware(),
        "samples": len(loaded.samples),
        "tokens": sum(len(sample.tokens) for sample in loaded.samples),
        "counted_tokens": sum(int(sample.counted.sum()) for sample in loaded.samples),
        "padding_share": padding_share(epoch_batches(lengths, loaded.shapes, 0, 0), lengths),
        "prompts": len(prompts),
        "bytes": {name: sum(f.stat().st_size for f in (options.work / name).glob("*.bin")) for name in ("hidden", "means")},
        "seconds": seconds,
        "arms": rows,
        "differences": evaluation.compare(reports, 0),
    }
    write_results((options.work if smoke else HERE) / "results.jsonl", results)


if __name__ == "__main__":
    main()
