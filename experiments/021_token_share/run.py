"""A training step's arithmetic and time against the share of the tokens that are trained on. See README.md."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from jsfdd.base.hardware import describe_hardware
from jsfdd.base.tuning import vocabulary_block
from jsfdd.commands.inputs import load
from jsfdd.commands.options import ChatOptions, ModelOptions
from jsfdd.commands.score import ScoreConfig
from jsfdd.data.batches import Shape
from jsfdd.hidden.capture import make_recompute
from jsfdd.models.flops import step_flops
from jsfdd.training.batch import TrainingData, device_batch
from jsfdd.training.draft_shape import draft_of
from jsfdd.training.loss import borrow, restrict
from jsfdd.training.recipe import Recipe
from jsfdd.training.soft_means import make_means_step
from jsfdd.training.step import init_state, make_optimizer, make_train_step
from jsfdd.training.token_loss import Distance

matplotlib.use("Agg")
HERE = Path(__file__).parent
SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)
HEADS = {"full head": 0, "8,192 tokens": 8192}


def main() -> None:
    smoke = os.environ.get("SMOKE") == "1"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="chats, best the target's own")
    parser.add_argument("--turns", type=int, default=1 if smoke else 9)
    arguments = parser.parse_args()
    loaded = load(
        ScoreConfig(
            model=ModelOptions(target="smollm2"), chats=ChatOptions(data=tuple(arguments.data), max_length=256), out=HERE
        )
    )
    target, mesh, shape = loaded.target, loaded.mesh, Shape(4, 256)
    # The chats whose answers are longest: most of a batch's tokens count, as in long chats.
    samples = sorted(loaded.samples, key=lambda sample: -sample.counted.sum())[: shape.rows]
    store = make_recompute(target, mesh, "bfloat16")
    batch = device_batch(TrainingData(samples, store), range(shape.rows), shape, mesh)
    counted = np.asarray(batch.counted)
    order = np.random.default_rng(0).random(counted.shape)
    weights = {share: (counted & (order <= np.quantile(order[counted], share))).astype(np.float32) for share in SHARES}
    means = make_means_step(Distance(), mesh, vocabulary_block(jax.default_backend()), "bfloat16")
    made, flops = {}, {}
    for head, size in HEADS.items():
        recipe = Recipe(hidden_noise=0.0, draft_vocab=size)
        draft = draft_of(target.config, recipe, loaded.samples)
        frozen = restrict(borrow(target.config, target.params), draft)
        stored = means(frozen, batch)
        optimizer = make_optimizer(recipe, 1000)
        for share in SHARES:
            step = make_train_step(draft, optimizer, mesh, recipe)
            chosen = batch._replace(weight=weights[share], soft_targets=stored)
            made[head, share] = [step, init_state(draft, optimizer, 0), frozen, chosen]
            flops[head, share] = step_flops(draft, [shape], float((weights[share][:, 1:] > 0).sum()), 2)
    seconds = {key: [] for key in made}
    for turn in range(arguments.turns + 2):  # the first two compile: once for a fresh state, once for a program's own
        for key, (step, state, frozen, training_batch) in made.items():
            begin = time.perf_counter()
            made[key][1], _ = jax.block_until_ready(step(frozen, state, training_batch))
            if turn > 1:
                seconds[key].append(time.perf_counter() - begin)

    rows = []
    for (head, share), values in seconds.items():
        ratios = sorted(a / b for a, b in zip(values, seconds[head, 1.0]))
        rows.append({
            "head": head, "share": share, "tokens": int((weights[share] > 0).sum()), "gflops": flops[head, share] / 1e9,
            "flops_ratio": flops[head, share] / flops[head, 1.0], "seconds": statistics.median(values),
            "time_ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1],
        })  # fmt: skip
        row = rows[-1]
        cells = [head, f"{share:.0%}", f"{row['tokens']}", f"{row['gflops']:.0f}", f"{row['flops_ratio']:.2f}"]
        cells += [f"{row['seconds']:.3f}", f"{row['time_ratio']:.2f} [{row['least']:.2f}, {row['most']:.2f}]"]
        print("| " + " | ".join(cells) + " |")
    if not smoke:
        results = {"hardware": describe_hardware(), "counted": int(counted.sum()), "turns": arguments.turns, "rows": rows}
        (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        _plot(rows, HERE / "share.png")


def _plot(rows: list[dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for number, head in enumerate(HEADS):
        of_head = [row for row in rows if row["head"] == head]
        x = [100 * row["share"] for row in of_head]
        axis.plot(x, [row["flops_ratio"] for row in of_head], "--", color=f"C{number}", label=f"{head}: arithmetic")
        axis.plot(x, [row["time_ratio"] for row in of_head], "o-", color=f"C{number}", label=f"{head}: time")
        axis.vlines(x, [row["least"] for row in of_head], [row["most"] for row in of_head], color=f"C{number}", alpha=0.4)
    axis.set(xlabel="tokens trained on (% of the counted)", ylabel="of the step on all", ylim=(0, None), xlim=(0, 103))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
