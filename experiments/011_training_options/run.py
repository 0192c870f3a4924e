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
from jsfdd.commands import score
from jsfdd.commands.inputs import load
from jsfdd.commands.options import ChatOptions, ModelOptions
from jsfdd.commands.score import ScoreConfig
from jsfdd.data.batches import epoch_batches, padding_share
from jsfdd.data.chat import read_prompts
from jsfdd.data.held_out import split_held_out
from jsfdd.evaluation import evaluate as evaluation
from jsfdd.hidden.capture import store_hidden
from jsfdd.hidden.store import HiddenStore
from jsfdd.models.draft import draft_config
from jsfdd.scoring.table import read_token_scores
from jsfdd.selection.sfdd import select
from jsfdd.selection.tokens import token_weights
from jsfdd.training.batch import TrainingData
from jsfdd.training.draft_shape import draft_of
from jsfdd.training.journal import METRICS, TIMINGS, read_lines
from jsfdd.training.loss import borrow
from jsfdd.training.recipe import Recipe
from jsfdd.training.soft_store import store_soft_targets
from jsfdd.training.train import train
from jsfdd.weights.draft import load_draft

HERE = Path(__file__).parent
BATCH_TOKENS = 1024
HALF, TOKENS = dict(share=0.5), dict(token_retain_ratio=0.5)
ARMS = {  # beside fields of a recipe: the share of the chats, the seed, and how hidden states are stored
    "full": {},
    "full, seed 1": dict(seed=1),
    "half": HALF,
    "half, seed 1": HALF | dict(seed=1),
    "half + half the tokens": HALF | TOKENS,
    "half + half the tokens, seed 1": HALF | TOKENS | dict(seed=1),
    "half + random half of the tokens": HALF | TOKENS | dict(token_metric="random"),
    "half, int8 features": HALF | dict(hidden_dtype="int8"),
    "half, reverse KL": HALF | dict(token_loss="reverse_kl"),
    "half, total variation": HALF | dict(token_loss="total_variation"),
    "half, hybrid": HALF | dict(token_loss="hybrid"),
    "half, HASS 3": HALF | dict(draft_steps=3),
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
    clock, seconds = time.perf_counter, {}

    begin = clock()
    chats = ChatOptions(data=tuple(options.data), max_length=384, batch_tokens=BATCH_TOKENS)
    config = ScoreConfig(
        model=ModelOptions(target="smollm2"), chats=chats, out=options.work, per_token=True, keep_hidden=("full",)
    )
    loaded = load(config)
    seconds["load"], begin = clock() - begin, clock()
    table = score.score(config, loaded)
    seconds["score, features kept"] = clock() - begin
    half = set(select(table, 0.5).ids)
    base = Recipe(epochs=options.epochs, learning_rate=1e-3, log_every=10, save_every=10_000, held_out_share=0.1)
    kept, held_out = split_held_out(loaded.samples, base.held_out_share)
    target, mesh = loaded.target, loaded.mesh
    frozen, store = borrow(target.config, target.params), HiddenStore.open(options.work / "hidden", loaded.identity)
    shared = dict(batch_tokens=BATCH_TOKENS, identity=loaded.identity)
    begin = clock()
    means = store_soft_targets(
        "means", TrainingData(kept, store), frozen, draft_config(target.config), base, mesh,
        directory=options.work / "soft_targets", **shared,
    )  # fmt: skip
    seconds["means of all, whole head"] = clock() - begin

    rows = {}
    for name, changes in arms.items():
        changes = dict(changes)
        share, seed, hidden_dtype = changes.pop("share", 1.0), changes.pop("seed", 0), changes.pop("hidden_dtype", None)
        directory = options.work / "arms" / name.replace(" ", "_").replace(",", "").replace("+", "and")
        recipe = dataclasses.replace(base, **changes)
        chosen = [sample for sample in kept if share == 1 or sample.id in half]
        begin, hidden, weights = clock(), store, None
        if hidden_dtype:
            hidden = store_hidden(
                target, [*chosen, *held_out], mesh, directory=directory / "hidden", dtype=hidden_dtype, **shared
            )
        if recipe.weighs_tokens:
            weights = token_weights(
                chosen, read_token_scores(options.work / "token_scores.parquet"), metric=recipe.token_metric,
                retain_ratio=recipe.token_retain_ratio, weighting=recipe.token_weighting, seed=seed,
            )  # fmt: skip
        data, draft = TrainingData(chosen, hidden, None, weights), draft_of(target.config, recipe, chosen)
        if kind := recipe.stored_soft_targets(hidden_is_stored=True):
            stored = (
                means
                if not draft.vocabulary and not hidden_dtype
                else store_soft_targets(kind, data, frozen, draft, recipe, mesh, directory=directory / "soft_targets", **shared)
            )
            data = data._replace(soft_targets=stored)
        result = train(
            target, data, TrainingData(held_out, hidden), recipe, mesh, out=directory, seed=seed, draft=draft,
            identity=loaded.identity, shapes=loaded.shapes,
        )  # fmt: skip
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
        "bytes": {
            name: sum(f.stat().st_size for f in (options.work / name).glob("*.bin")) for name in ("hidden", "soft_targets")
        },
        "seconds": seconds,
        "arms": rows,
        "differences": evaluation.compare(reports, 0),
    }
    write_results((options.work if smoke else HERE) / "results.jsonl", results)


if __name__ == "__main__":
    main()
