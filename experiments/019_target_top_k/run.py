"""What the target's likeliest tokens keep of its distributions, on which disk, at which cost a step. See README.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from jsfdd.base.hardware import describe_hardware
from jsfdd.base.tuning import vocabulary_block
from jsfdd.commands.inputs import load
from jsfdd.commands.options import ChatOptions, ModelOptions
from jsfdd.commands.score import ScoreConfig
from jsfdd.data.batches import Shape
from jsfdd.hidden.capture import make_recompute
from jsfdd.hidden.rows import row_bytes
from jsfdd.training.batch import TrainingData, device_batch
from jsfdd.training.draft_shape import draft_of
from jsfdd.training.loss import borrow
from jsfdd.training.recipe import Recipe
from jsfdd.training.soft_means import make_means_step
from jsfdd.training.soft_rows import row_words, unpack
from jsfdd.training.soft_top_k import make_top_k_step
from jsfdd.training.step import init_state, make_optimizer, make_train_step
from jsfdd.training.token_loss import Distance

HERE = Path(__file__).parent
KS = (8, 32, 128, 256)
LENGTH = 256


def main() -> None:
    smoke = os.environ.get("SMOKE") == "1"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="chats, best the target's own")
    parser.add_argument("--chats", type=int, default=4 if smoke else 48)
    parser.add_argument("--turns", type=int, default=1 if smoke else 7)
    arguments = parser.parse_args()
    chats = ChatOptions(data=tuple(arguments.data), max_length=LENGTH, batch_tokens=1024)
    loaded = load(ScoreConfig(model=ModelOptions(target="smollm2"), chats=chats, out=HERE))
    target, mesh, recipe = loaded.target, loaded.mesh, Recipe(hidden_noise=0.0)
    frozen, draft = borrow(target.config, target.params), draft_of(target.config, recipe, loaded.samples)
    samples = [loaded.samples[i] for i in np.random.default_rng(0).permutation(len(loaded.samples))[: arguments.chats]]
    data = TrainingData(samples, make_recompute(target, mesh, "bfloat16"))

    block = vocabulary_block(jax.default_backend())
    steps = {k: make_top_k_step(k, mesh, block) for k in KS}
    masses, longest = {k: [] for k in KS}, Shape(4, LENGTH)
    for start in range(0, len(samples), longest.rows):
        batch = device_batch(data, range(start, min(start + longest.rows, len(samples))), longest, mesh)
        rows = np.asarray(steps[max(KS)](frozen, batch))[np.asarray(batch.counted)]
        p = np.exp(np.asarray(unpack(rows, max(KS), max(KS) + 1)[0], np.float64))
        for k in KS:
            masses[k] += (p[:, :k].sum(axis=1) / p.sum(axis=1)).tolist()

    print({k: round(float(np.mean(m)), 4) for k, m in masses.items()}, f"of {len(masses[max(KS)])} tokens", flush=True)

    rows = {f"top {k}": steps[k](frozen, batch) for k in (8, 32, 256)}
    rows |= {"head": None, "means": make_means_step(Distance(), mesh, block, "bfloat16")(frozen, batch)}
    optimizer, made = make_optimizer(recipe, 1000), {}
    for name, stored in rows.items():
        k = int(name.removeprefix("top ")) if name.startswith("top ") else None
        changes = {} if k is None else {"soft_targets": "top_k", "soft_top_k": k}
        step = make_train_step(draft, optimizer, mesh, dataclasses.replace(recipe, **changes))
        made[name] = [step, init_state(draft, optimizer, 0), batch._replace(soft_targets=stored)]
    seconds = {name: [] for name in made}
    for turn in range(arguments.turns + 2):  # the first two compile: once for a fresh state, once for a program's own
        for name, (step, state, training_batch) in made.items():
            begin = time.perf_counter()
            made[name][1], _ = jax.block_until_ready(step(frozen, state, training_batch))
            if turn > 1:
                seconds[name].append(time.perf_counter() - begin)

    width, vocab_size = target.config.hidden_size, target.config.vocab_size
    results = {
        "hardware": describe_hardware(),
        "tokens": len(masses[KS[0]]),
        "mass": {k: {"mean": np.mean(m), "tenth": np.quantile(m, 0.1), "below_0.9": np.mean(np.array(m) < 0.9)}
                 for k, m in masses.items()},
        "bytes_a_token": {"means": row_bytes("bfloat16", width + 1)} | {k: 2 * row_words(k, vocab_size, 0) for k in KS},
        "counted_in_step": int(np.asarray(batch.counted).sum()),
        "turns": arguments.turns,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "times_means": {name: sorted(a / b for a, b in zip(values, seconds["means"])) for name, values in seconds.items()},
    }  # fmt: skip
    print(json.dumps(results, indent=1, default=float))
    if not smoke:
        (HERE / "results.json").write_text(json.dumps(results, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
