"""What a whole run costs, stage by stage, with all chats, with half, and with half of the half's tokens. See README.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments.pool.choices import by_metric
from experiments.pool.pool import (
    BATCH_TOKENS,
    SMOKE,
    Pool,
    judge_draft,
    open_pool,
    pool_parser,
    scoring,
    soft_targets_of,
    token_weights_of,
)
from jsfdd.base.records import samples_digest
from jsfdd.commands import score
from jsfdd.data.batches import choose_shapes
from jsfdd.hidden.capture import store_hidden
from jsfdd.selection.sfdd import select
from jsfdd.training.batch import TrainingData
from jsfdd.training.draft_shape import draft_of
from jsfdd.training.train import train
from jsfdd.weights.draft import load_draft

HERE = Path(__file__).parent

HEADS = {"8k": {}, "full": {"draft_vocab": 0}}


class Stages:
    """CPU and wall-clock seconds of named stages, kept in a file; a stage that is in it is not run again."""

    def __init__(self, path: Path):
        self.path, self.seconds = path, json.loads(path.read_text()) if path.exists() else {}

    def run(self, name: str, work, *args, **options):
        if name in self.seconds:
            return None
        cpu, wall = time.process_time(), time.perf_counter()
        outcome = work(*args, **options)
        self.seconds[name] = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        self.path.write_text(json.dumps(self.seconds, indent=1))
        print(f"{self.path.stem}, {name}: {self.seconds[name]['cpu']:.1f} CPU s", flush=True)
        return outcome


def target_passes(pool: Pool, data: Path, work: Path, number: int) -> None:
    """The target's pass over the first chats: to keep all hidden states, and to score and keep what half may select."""
    work.mkdir(parents=True, exist_ok=True)
    samples = pool.samples[:number]
    shapes = choose_shapes([len(sample.tokens) for sample in samples], BATCH_TOKENS)
    identity = pool.loaded.identity | {"samples": samples_digest(samples)}
    loaded = pool.loaded._replace(samples=samples, shapes=shapes, identity=identity)
    stages = Stages(work / "passes.json")
    if stages.seconds:
        return
    stages.run(
        "features of all", store_hidden, loaded.target, loaded.samples, loaded.mesh,
        batch_tokens=BATCH_TOKENS, directory=work / "all", identity=identity, dtype="bfloat16",
    )  # fmt: skip
    config = scoring(data, work / "half", keep_hidden=("flatness",), retain_ratio=0.5)
    stages.run("scores, features of half", score.score, config, loaded)
    stages.run("selection", select, pool.table, 0.5)
    facts = {"samples": len(samples), "tokens": sum(len(sample.tokens) for sample in samples)}
    for name in ("all", "half/hidden"):
        facts[name] = sum(path.stat().st_size for path in (work / name).rglob("*") if path.is_file())
        shutil.rmtree(work / name)
    (work / "facts.json").write_text(json.dumps(facts))


def train_and_judge(pool: Pool, work: Path, ids: Sequence[str], weights, options: dict, seed: int) -> None:
    """Stages "soft targets" and "training" and, by replay, the counts at T = 0; to `work`."""
    work.mkdir(parents=True, exist_ok=True)
    stages = Stages(work / "stages.json")
    recipe = dataclasses.replace(pool.recipe, **options)
    draft = draft_of(pool.loaded.target.config, recipe, pool.loaded.samples)
    chosen = set(ids)
    data = TrainingData([sample for sample in pool.samples if sample.id in chosen], pool.store, None, weights)
    storing = recipe, pool.loaded, data, draft, work / "soft_targets"
    stored = stages.run("soft targets", soft_targets_of, *storing)
    if "training" not in stages.seconds:
        data = data._replace(soft_targets=stored or soft_targets_of(*storing))
        stages.run(
            "training", train, pool.loaded.target, data, TrainingData([], pool.store), recipe, pool.loaded.mesh,
            out=work, seed=seed, identity=pool.loaded.identity, draft=draft, shapes=pool.shapes,
        )  # fmt: skip
        shutil.rmtree(work / "soft_targets")
    if not (work / "counts.json").exists():
        draft, params, _ = load_draft(work)
        (work / "counts.json").write_text(json.dumps(judge_draft(pool, draft, jax.device_get(params), 0.0)))


def main() -> None:
    parser: argparse.ArgumentParser = pool_parser(__doc__, epochs=4)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["8k"])
    parser.add_argument("--passes", type=int, default=8 if SMOKE else 150, help="chats that the target's passes are timed on")
    parser.add_argument("--only", nargs="+", help="parts of names; all unless given")
    options = parser.parse_args()
    pool = open_pool(options)
    work = options.work / "whole"
    target_passes(pool, options.data, work, options.passes)
    everything = [sample.id for sample in pool.samples]
    half = by_metric(pool, "flatness", 0.5, 0)
    kept = [sample for sample in pool.samples if sample.id in set(half)]
    for seed in options.seeds:
        arms = {"all": (everything, None), "half": (half, None)}
        for metric in ("flatness", "random"):
            choice = dict(metric=metric, weighting="hard", retain_ratio=0.5, seed=seed)
            arms[f"half, {metric} half of its tokens"] = (half, token_weights_of(pool, kept, **choice))
        for head in options.heads:
            for name, (ids, weights) in arms.items():
                if not options.only or any(part in name for part in options.only):
                    directory = work / f"{name}, {head} head, seed {seed}"
                    train_and_judge(pool, directory, ids, weights, HEADS[head], seed)


if __name__ == "__main__":
    main()
