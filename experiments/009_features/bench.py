"""What keeping features in the scoring pass costs in seconds and disk, and reading them in a training step. See README.md."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jsfdd.base.hardware import describe_hardware
from jsfdd.base.mesh import make_mesh
from jsfdd.commands.options import ChatOptions, ModelOptions
from jsfdd.commands.score import ScoreConfig, still_possible
from jsfdd.data.chat import read_chats
from jsfdd.data.template import tokenize_chats
from jsfdd.hidden.capture import keep_hidden
from jsfdd.hidden.rows import row_bytes
from jsfdd.hidden.store import HiddenStore
from jsfdd.scoring.score import score_samples
from jsfdd.selection.sfdd import select
from jsfdd.training.batch import TrainingData
from jsfdd.training.journal import TIMINGS, read_lines
from jsfdd.training.recipe import Recipe
from jsfdd.training.train import train
from jsfdd.weights.target import load_target

compiling = 0.0


def count_compiling(event: str, seconds: float, **_) -> None:
    global compiling
    compiling += seconds if event.startswith("/jax/core/compile") else 0.0


def watched(directory: Path):
    """A function that looks at a directory's size, and gives the most it ever saw; files are looked at before they go."""
    peak, unlink = 0, Path.unlink

    def look() -> int:
        nonlocal peak
        peak = max(peak, sum(path.stat().st_size for path in directory.glob("*") if path.suffix != ".json"))
        return peak

    def look_and_unlink(path, **rest):
        look()
        unlink(path, **rest)

    Path.unlink = look_and_unlink
    return look


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--chats", type=int, default=60)
    parser.add_argument("--retain-ratio", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=8, help="training steps, about")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    arguments = parser.parse_args()
    if os.environ.get("SMOKE"):
        arguments.chats, arguments.steps = 6, 2
    jax.monitoring.register_event_duration_secs_listener(count_compiling)

    target, mesh = load_target(arguments.target, jnp.float32), make_mesh()
    samples, _ = tokenize_chats(read_chats((arguments.data,)), target.tokenizer, 384)
    samples = samples[: arguments.chats]
    work = Path(tempfile.mkdtemp())
    options = ScoreConfig(
        model=ModelOptions(target=arguments.target), chats=ChatOptions(data=(arguments.data,), batch_tokens=1024), out=work,
        keep_hidden=("flatness",), retain_ratio=arguments.retain_ratio, held_out_share=0.0,
    )  # fmt: skip

    def score(keeper=None):
        compiling_before, start, cpu = compiling, time.perf_counter(), time.process_time()
        table = score_samples(target, samples, mesh, batch_tokens=1024, identity={}, keeper=keeper, progress=False)
        compiled = compiling - compiling_before
        return table, time.perf_counter() - start - compiled, time.process_time() - cpu - compiled

    full = sum(len(sample.tokens) for sample in samples) * row_bytes("bfloat16", target.config.hidden_size)
    results = {"hardware": describe_hardware(), "chats": len(samples), "tokens": sum(len(s.tokens) for s in samples)}
    _, results["score_seconds"], results["score_cpu_seconds"] = score()
    look = watched(work / "hidden")
    store_arguments = dict(directory=work / "hidden", identity={}, kept_for={})
    with keep_hidden(target, still_possible(options, samples), **store_arguments) as keeper:
        keep, spent = keeper.keep, 0.0

        def timed_keep(*batch):
            nonlocal spent
            start = time.perf_counter()
            keep(*batch)
            spent += time.perf_counter() - start
            look()

        keeper.keep = timed_keep
        table, results["keep_seconds"], results["keep_cpu_seconds"] = score(keeper)
    results["in_the_keeper_seconds"] = spent
    store = HiddenStore.open(work / "hidden", {}, verify=True)
    chosen = select(table, arguments.retain_ratio).ids
    assert set(store) == set(chosen)
    kept = sum(path.stat().st_size for path in (work / "hidden").glob("shard-*"))
    results["disk"] = {
        "full": full, "bound": 1.2 * arguments.retain_ratio * full, "most": look(), "in_the_end": kept,
        "selected": sum(store[name].nbytes for name in chosen),
    }  # fmt: skip

    held = [sample for sample in samples if sample.id in store]
    start = time.perf_counter()
    for _ in range(20):
        for sample in held:
            store[sample.id].copy()
    results["read_seconds_per_1000_tokens"] = (time.perf_counter() - start) / 20 / sum(len(s.tokens) for s in held) * 1000
    results["train"] = train_reading(target, held, store, mesh, arguments, work)
    print(json.dumps(results, indent=1))
    if not os.environ.get("SMOKE"):
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def train_reading(target, samples, store, mesh, arguments, work) -> dict:
    """Seconds of some training steps, and of the host's part in them: reading, padding, uploading a batch."""
    data, nothing = TrainingData(samples[: 2 * arguments.steps], store), TrainingData([], store)
    recipe = Recipe(held_out_share=0.0, epochs=1, log_every=1)
    result = train(target, data, nothing, recipe, mesh, out=work / "draft", batch_tokens=1024, progress=False)
    lines = read_lines(work / "draft" / TIMINGS)
    steps, host = (sorted(line[name] for line in lines) for name in ("seconds", "reading"))
    return {
        "steps": result.steps, "median_step_seconds": steps[len(steps) // 2], "median_host_seconds": host[len(host) // 2]
    }  # fmt: skip


if __name__ == "__main__":
    main()
