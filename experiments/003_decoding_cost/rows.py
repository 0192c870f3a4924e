"""What one verification costs, by the number of tokens it judges. See README.md."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jsfdd.base.hardware import describe_hardware
from jsfdd.models.attention import cached_view, empty_cache
from jsfdd.models.target import decode, head_logits, unstack_layers
from jsfdd.weights.target import load_target

SMOKE = bool(os.environ.get("SMOKE"))
ROWS = (1, 2, 5, 8, 16, 61)
HELD, ROUNDS = 200, 3 if SMOKE else 15


def products(params, x):
    """The layers' matrix products and nothing else, one after the other as in the model."""
    for layer in params["layers"]:
        attention, mlp = layer["attention"], layer["mlp"]
        kv = x @ attention["k_proj"]["kernel"] + x @ attention["v_proj"]["kernel"]
        q = x @ attention["q_proj"]["kernel"] + jnp.tile(kv, (1, x.shape[1] // kv.shape[1]))
        x = x + q @ attention["o_proj"]["kernel"]
        x = x + ((x @ mlp["gate_proj"]["kernel"]) * (x @ mlp["up_proj"]["kernel"])) @ mlp["down_proj"]["kernel"]
    return x @ params["embed"]["embedding"].T


def main(out: Path) -> None:
    target = load_target("smollm2")
    config, params = target.config, unstack_layers(target.params)
    weights = {name: params[name] for name in ("embed", "layers", "norm")}
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(weights))

    def step(params, tokens, cache):
        hidden, cache = decode(config, params, tokens, cached_view(cache, tokens.shape[1]), cache)
        return jnp.argmax(head_logits(config, params, hidden), axis=-1), cache

    programs, caches = {}, {}
    for slots in (320, 1280):
        for rows in ROWS:
            cache = empty_cache(config, 1, slots)._replace(length=jnp.full(1, HELD, jnp.int32))
            tokens = jnp.ones((1, rows), jnp.int32)
            key = f"step, {slots} slots", rows
            programs[key] = jax.jit(step, donate_argnums=2).lower(params, tokens, cache).compile(), tokens
            caches[key] = cache
    for rows in ROWS:
        x = jnp.full((rows, config.hidden_size), 0.01)
        programs["products alone", rows] = jax.jit(products).lower(params, x).compile(), x

    seconds = {key: [] for key in programs}
    for round_ in range(ROUNDS + 1):
        for key, (program, x) in programs.items():  # in turn, so that a slow moment of the machine hits all of them
            begin = time.perf_counter()
            if key in caches:
                _, caches[key] = jax.block_until_ready(program(params, x, caches[key]))
            else:
                jax.block_until_ready(program(params, x))
            if round_:
                seconds[key].append(time.perf_counter() - begin)

    read, read_seconds = np.ones(weight_bytes // 4, np.float32), []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        read.sum()
        read_seconds.append(time.perf_counter() - begin)

    def by_rows(name):
        by_rows = {rows: s for (program, rows), s in seconds.items() if program == name}
        return {rows: {"median": 1e3 * statistics.median(s), "best": 1e3 * min(s)} for rows, s in by_rows.items()}

    milliseconds = {name: by_rows(name) for name in dict.fromkeys(name for name, _ in programs)}
    for name, times in milliseconds.items():
        one = times[1]["median"]
        print(f"{name}: " + "  ".join(f"{n}: {t['median']:.0f} ms ({t['median'] / one:.2f})" for n, t in times.items()))
    rates = {"one row": weight_bytes / milliseconds["step, 320 slots"][1]["median"] / 1e6}
    rates["its products alone"] = weight_bytes / milliseconds["products alone"][1]["median"] / 1e6
    rates["numpy sum on one core"] = weight_bytes / statistics.median(read_seconds) / 1e9
    print("GB/s: " + "  ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))
    results = {
        "hardware": describe_hardware(),
        "rounds": ROUNDS,
        "weight_bytes": weight_bytes,
        "gigabytes_per_second": rates,
        "milliseconds": milliseconds,
    }
    if not SMOKE:
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "rows.json")
