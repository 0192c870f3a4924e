"""Scoring and training on one accelerator: tokens/s, MFU, overhead of flatness, peak memory against `plan`. See README.md."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsfdd.base.hardware import describe_hardware
from jsfdd.base.mesh import make_mesh
from jsfdd.base.records import Batch, DraftBatch
from jsfdd.base.tuning import scoring_block, vocabulary_block
from jsfdd.commands.costs import Lengths, score_stage, train_stage
from jsfdd.models.architecture import DecoderConfig, Rope
from jsfdd.models.counted import fold_counted
from jsfdd.models.draft import draft_config
from jsfdd.models.target import head_logits, hidden_states, init_params
from jsfdd.scoring.score import make_score_step
from jsfdd.training.loss import borrow
from jsfdd.training.recipe import Recipe
from jsfdd.training.soft_means import make_means_step
from jsfdd.training.step import init_state, make_optimizer, make_train_step
from jsfdd.training.token_loss import Distance
from jsfdd.weights.target import load_target, read_architecture

LLAMA_8B = DecoderConfig(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, max_position=8192, rms_norm_eps=1e-5, rope=Rope(theta=5e5), tie_embeddings=False,
)  # fmt: skip
TINY = dataclasses.replace(
    LLAMA_8B, vocab_size=2048, hidden_size=256, intermediate_size=768, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64
)


class Case(NamedTuple):
    """A target with the batch that it is measured on; half of its tokens count."""

    name: str
    config: DecoderConfig
    rows: int
    length: int


def cases(smoke: bool) -> dict[str, Case]:
    if smoke:
        return {"smollm2": Case("smollm2", read_architecture("smollm2"), 1, 64), "8b": Case("8b", TINY, 4, 64)}
    return {"smollm2": Case("smollm2", read_architecture("smollm2"), 64, 1024), "8b": Case("8b", LLAMA_8B, 16, 1024)}


def random_params(config: DecoderConfig, dtype) -> dict:
    """Small random weights, each made in `dtype` at once: a float32 copy of an 8B target would be the peak."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def leaf(path, shape):
        if path[-1].key == "scale":
            return jnp.ones(shape.shape, jnp.float32)
        make = jax.jit(lambda key: 0.02 * jax.random.normal(key, shape.shape, dtype))
        return make(jax.random.fold_in(jax.random.key(0), zlib.crc32(str(path).encode())))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def target_params(case: Case, dtype) -> dict:
    """SmolLM2's own parameters, or random ones."""
    if case.name == "smollm2":
        return load_target("smollm2", dtype).params
    return random_params(case.config, dtype)


def seconds(program, arguments: tuple, repeats: int) -> float:
    """Median of a compiled program's calls, which leave their arguments alone."""
    jax.block_until_ready(program(*arguments))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def matmul_rate(size: int, dtype) -> float:
    """FLOP/s of a product of two [size, size] matrices."""
    x = jnp.ones((size, size), dtype)
    return 2 * size**3 / seconds(jax.jit(jnp.matmul), (x, x), 10)


def bare(config: DecoderConfig, block: int, params: dict, batch: Batch) -> jax.Array:
    """The least that a scoring pass can be: the layers, and one logit of each token that counts."""
    hidden = hidden_states(config, params, batch.tokens).reshape(-1, config.hidden_size)

    def visit(rows, values):
        logits = head_logits(config, params, hidden.at[rows].get(mode="fill", fill_value=0))
        return values.at[rows].set(logits[:, 0], mode="drop")

    return fold_counted(batch.counted.reshape(-1), block, visit, jnp.zeros(batch.tokens.size))


def make_batch(case: Case) -> tuple[Batch, Lengths]:
    shape = (case.rows, case.length)
    tokens = np.random.default_rng(0).integers(0, case.config.vocab_size, shape, np.int32)
    counted = np.broadcast_to(np.arange(case.length) >= case.length // 2, shape)
    batch = Batch(jnp.asarray(tokens), jnp.asarray(counted), jnp.full(case.rows, case.length, jnp.int32))
    return batch, Lengths(np.full(case.rows, case.length), np.full(case.rows, int(counted[0].sum())), "made")


def peak_bytes(compiled) -> dict:
    """What the compiler allocates for one step, and what the device's allocator has seen at most (None: it does not say)."""
    memory = compiled.memory_analysis()
    step = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"step": step, "device": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")}


def figures(stage, tokens: int, took: float, rate: float, compiled) -> dict:
    return {
        "seconds": took,
        "tokens_per_second": tokens / took,
        "mfu": stage.flops / took / rate,
        "plan_bytes": stage.peak,
        "peak_bytes": peak_bytes(compiled),
    }


def measure_score(case: Case, dtype, rate: float, repeats: int) -> dict:
    params, (batch, lengths) = target_params(case, dtype), make_batch(case)
    step = make_score_step(case.config, make_mesh(1)).lower(params, batch).compile()
    took = seconds(step, (params, batch), repeats)
    stage = score_stage(case.config, lengths, batch.tokens.size, jnp.dtype(dtype).itemsize, 1, "gpu")
    row = figures(stage, batch.tokens.size, took, rate, step)
    plain = jax.jit(functools.partial(bare, case.config, scoring_block(jax.default_backend()))).lower(params, batch).compile()
    return row | {"overhead_over_bare": took / seconds(plain, (params, batch), repeats) - 1}


def measure_train(case: Case, dtype, rate: float, repeats: int) -> dict:
    draft = draft_config(case.config)
    params = target_params(case, dtype)  # kept all the while, as `jsfdd train` keeps it
    frozen = borrow(case.config, params)
    batch, lengths = make_batch(case)
    hidden = jax.random.normal(jax.random.key(1), (*batch.tokens.shape, case.config.hidden_size), jnp.float32)
    recipe = Recipe()
    optimizer = make_optimizer(recipe, 100)
    state = init_state(draft, optimizer, 0)
    mesh = make_mesh(1)
    batch = DraftBatch(batch.tokens, batch.counted, batch.counted.astype(jnp.float32), hidden)
    means = make_means_step(Distance(), mesh, vocabulary_block(jax.default_backend()), "bfloat16")(frozen, batch)
    batch = batch._replace(soft_targets=means)  # two products with the head a step, as the plan counts them
    step = make_train_step(draft, optimizer, mesh, recipe).lower(frozen, state, batch).compile()
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        state, metrics = step(frozen, state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - begin)
    recipe = Recipe(epochs=1)
    stage = train_stage(case.config, lengths, batch.tokens.size, 1.0, recipe, jnp.dtype(dtype).itemsize, 1, 1, "gpu")
    return figures(stage, batch.tokens.size, statistics.median(times[1:]), rate, step)


def main() -> None:
    smoke = os.environ.get("SMOKE") == "1"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=2, metavar=("TARGET", "STAGE"), help="only this one, printed: for the script itself")
    parser.add_argument("--out", type=Path, default=Path(os.devnull) if smoke else Path(__file__).with_name("gpu.json"))
    arguments = parser.parse_args()
    if arguments.case:
        dtype, size, repeats = ("float32", 512, 1) if smoke else ("bfloat16", 8192, 10)
        rate = matmul_rate(size, dtype)
        target, stage = arguments.case
        measure = {"score": measure_score, "train": measure_train}[stage]
        row = measure(cases(smoke)[target], dtype, rate, repeats)
        print(json.dumps({"hardware": describe_hardware(), "dtype": dtype, "matmul_flops": rate} | row))
        return
    results = {}
    for target in ("smollm2", "8b"):
        for stage in ("score", "train"):
            # A process each: the allocator's peak is that of the process.
            command = [sys.executable, __file__, "--case", target, stage]
            process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[f"{target} {stage}"] = json.loads(process.stdout.splitlines()[-1])
            print(target, stage, json.dumps(results[f"{target} {stage}"]), flush=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
