"""Other ways to write the layers' products of a few rows, SmolLM2's shapes; flags come through XLA_FLAGS. See README.md."""

from __future__ import annotations

import os
import time

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

SMOKE = bool(os.environ.get("SMOKE"))
LAYERS, ROUNDS = (2, 2) if SMOKE else (30, 11)
SHAPES = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576), "gate": (576, 1536), "up": (576, 1536)}
SHAPES["down"] = (1536, 576)


def chain(dot):
    """All layers' products, each waiting for the one before as in the model."""

    def run(x, layers):
        for w in layers:
            y = dot(x, w["q"]) + jnp.tile(dot(x, w["k"]) + dot(x, w["v"]), (1, 3))
            x = x + dot(y, w["o"])
            x = x + dot(dot(x, w["gate"]) * dot(x, w["up"]), w["down"])
        return x

    return run


def fused(x, layers):
    """Queries, keys and values as one product, gate and up as another."""
    for w in layers:
        q, k, v = jnp.split(x @ w["qkv"], [576, 768], axis=1)
        x = x + (q + jnp.tile(k + v, (1, 3))) @ w["o"]
        gate, up = jnp.split(x @ w["gate_up"], 2, axis=1)
        x = x + (gate * up) @ w["down"]
    return x


def variants(layers):
    """name -> (program, its weights)."""
    transposed = jax.tree.map(lambda w: w.T.copy(), layers)
    halves = jax.tree.map(lambda w: w.astype(jnp.bfloat16), layers)
    wide = [
        {"qkv": jnp.concatenate([w["q"], w["k"], w["v"]], 1), "gate_up": jnp.concatenate([w["gate"], w["up"]], 1)} | w
        for w in layers
    ]
    columns = Format(Layout(major_to_minor=(1, 0)), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    column_major = jax.tree.map(lambda w: jax.device_put(w, columns), layers)

    def in_float32(x, w):
        return jnp.matmul(x.astype(w.dtype), w, preferred_element_type=jnp.float32)

    def row_by_row(x, w):
        return jnp.stack([row @ w for row in x])

    def in_chunks(x, w):  # columns that stay in a core's cache, 0.6 or 1.6 MB, while all rows go over them
        return jnp.concatenate([row_by_row(x, part) for part in w], 1)

    chunks = jax.tree.map(lambda w: jnp.split(w, list(range(256, w.shape[1], 256)), 1), layers)
    return {
        "x @ w": (chain(jnp.matmul), layers),
        "(w_T @ x_T)_T": (chain(lambda x, w: (w @ x.T).T), transposed),
        "columns first": (chain(jnp.matmul), column_major),
        "fused": (fused, wide),
        "bfloat16": (chain(in_float32), halves),
        "row by row": (chain(row_by_row), layers),
        "in chunks": (chain(in_chunks), chunks),
    }


def main():
    keys = iter(jax.random.split(jax.random.key(0), LAYERS * len(SHAPES)))
    layers = [{name: 0.02 * jax.random.normal(next(keys), shape) for name, shape in SHAPES.items()} for _ in range(LAYERS)]
    programs = variants(layers)
    for rows in (1, 5, 16, 61):
        x = jnp.ones((rows, 576))
        compiled = {}
        for name, (program, weights) in programs.items():
            if name in ("row by row", "in chunks") and rows > 5:
                continue
            shardings = (None, jax.tree.map(lambda w: w.format, weights)) if name == "columns first" else None
            compiled[name] = jax.jit(program, in_shardings=shardings) if shardings else jax.jit(program)
            jax.block_until_ready(compiled[name](x, weights))
        best = dict.fromkeys(compiled, float("inf"))
        for _ in range(ROUNDS):
            for name, run in compiled.items():
                begin = time.perf_counter()
                jax.block_until_ready(run(x, programs[name][1]))
                best[name] = min(best[name], time.perf_counter() - begin)
        print(f"{rows} rows: " + "  ".join(f"{name} {1e3 * t:.0f} ms" for name, t in best.items()), flush=True)


if __name__ == "__main__":
    main()
