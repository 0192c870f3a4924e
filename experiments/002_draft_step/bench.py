"""What a draft training step costs on top of its matrix products. See README.md."""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jsfdd.base.hardware import describe_hardware
from jsfdd.base.mesh import make_mesh, replicate, shard_rows
from jsfdd.base.records import DraftBatch
from jsfdd.models.architecture import DecoderConfig, Rope
from jsfdd.models.counted import fold_counted
from jsfdd.models.draft import draft_config
from jsfdd.training.loss import Borrowed
from jsfdd.training.recipe import Recipe
from jsfdd.training.step import init_state, make_optimizer, make_train_step
from jsfdd.training.token_loss import Distance
from jsfdd.training.visited_loss import Exact, visited_loss

SMOLLM2 = DecoderConfig(
    family="llama", vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
    num_kv_heads=3, head_dim=64, max_position=8192, rms_norm_eps=1e-5, rope=Rope(theta=1e5), tie_embeddings=True,
)  # fmt: skip
TINY = DecoderConfig(
    family="llama", vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, max_position=512, rms_norm_eps=1e-5, rope=Rope(theta=1e4), tie_embeddings=True,
)  # fmt: skip


def token_major(matrix, predicted, truth):
    """The loss's three matrix products and nothing else, [tokens, V] in between."""
    return (truth @ matrix.T - predicted @ matrix.T) @ matrix


def vocabulary_major(matrix, predicted, truth):
    """The same with [V, tokens] in between."""
    return (matrix @ truth.T - matrix @ predicted.T).T @ matrix


def in_blocks(function, block, matrix, predicted, truth):
    """`function` a block of tokens at a time, as `visited_loss` takes them."""

    def visit(rows, result):
        picked = [x.at[rows].get(mode="fill", fill_value=0) for x in (predicted, truth)]
        return result.at[rows].set(function(matrix, *picked), mode="drop")

    return fold_counted(jnp.ones(len(predicted), bool), block, visit, jnp.zeros(predicted.shape))


def gap_times_head(matrix, predicted, truth):
    """The gradient with sums over the trailing axis, as one would write it first."""
    gap = jax.nn.softmax(predicted @ matrix.T) - jax.nn.softmax(truth @ matrix.T)
    return gap @ matrix


def closed_form(block, matrix, predicted, truth):
    """`visited_loss` with all its figures and its gradient."""

    def loss(predicted):
        sums = visited_loss(Exact(Distance()), block, matrix, predicted, (matrix, truth), jnp.ones(len(predicted)))
        return sums["minimised"], sums

    return jax.grad(loss, has_aux=True)(predicted)


def with_expected_embedding(matrix, predicted, expected):
    """Loss and gradient if `expected`, the target's Σ_v p_v · head_v, were stored: two products, and p is never needed.

    H(p, q) = logsumexp(z_q) − expected · predicted, and its gradient is q @ head − expected.
    """
    z_q = matrix @ predicted.T
    top = jnp.max(z_q, axis=0)
    e_q = jnp.exp(z_q - top[None])
    s_q = jnp.sum(e_q, axis=0)
    loss = top + jnp.log(s_q) - jnp.sum(expected * predicted, axis=1)
    return e_q.T @ matrix / s_q[:, None] - expected + 0.0 * loss[:, None]  # the loss, so that it is computed as well


def autodiff(matrix, predicted, truth):
    """Everything at once, [tokens, V] materialised and differentiated by JAX; no figures but the loss."""
    p = jax.nn.softmax(truth @ matrix.T)
    return jax.value_and_grad(lambda x: -jnp.sum(p * jax.nn.log_softmax(x @ matrix.T)))(predicted)


def layer_operands(config, rows):
    """Inputs, kernel and output gradient of each of the draft's own linear maps."""
    width, attention = config.hidden_size, config.num_heads * config.head_dim
    keys = 2 * config.num_kv_heads * config.head_dim
    shapes = [(2 * width, width), (width, attention + keys), (attention, width)]
    shapes += [(width, 2 * config.intermediate_size), (config.intermediate_size, width)]
    random = functools.partial(jax.random.normal, jax.random.key(5))
    return [(random((rows, m)), random((m, n)), random((rows, n))) for m, n in shapes]


def layer_products(operands):
    """The forward and both backward products of each."""
    return [(x @ kernel, gradient @ kernel.T, x.T @ gradient) for x, kernel, gradient in operands]


def measure(programs: dict, repeats: int) -> dict:
    """name -> {"wall", "cpu"}: median seconds, the programs taking turns; CPU seconds are of all threads."""
    times = {name: {"wall": [], "cpu": []} for name in programs}
    for run in programs.values():
        run()
    for _ in range(repeats):
        for name, run in programs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            times[name]["wall"].append(time.perf_counter() - wall)
            times[name]["cpu"].append(time.process_time() - cpu)
    return {name: {kind: statistics.median(values) for kind, values in kinds.items()} for name, kinds in times.items()}


def compiled(function, *arguments):
    program = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments))


def training_step(config, tokens):
    """A whole step on `tokens` tokens in four rows, of which all but each row's first and last two count."""
    recipe = Recipe()
    optimizer, draft, mesh = make_optimizer(recipe, 100), draft_config(config), make_mesh(data=1)
    step = make_train_step(draft, optimizer, mesh, recipe)
    shape = (4, tokens // 4)
    embedding = 0.1 * jax.random.normal(jax.random.key(2), (config.vocab_size, config.hidden_size))
    frozen = replicate(Borrowed(embedding, None), mesh)
    position = jnp.arange(shape[1])
    counted = jnp.broadcast_to((position > 0) & (position < shape[1] - 1), shape)
    batch = DraftBatch(
        jax.random.randint(jax.random.key(3), shape, 0, config.vocab_size),
        counted,
        counted.astype(jnp.float32),
        2 * jax.random.normal(jax.random.key(4), (*shape, config.hidden_size)),
    )
    state, batch = replicate(init_state(draft, optimizer, 0), mesh), shard_rows(batch, mesh)

    def run():
        nonlocal state
        state, metrics = step(frozen, state, batch)
        jax.block_until_ready(metrics)

    return run


def main():
    smoke = os.environ.get("SMOKE") == "1"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    arguments = parser.parse_args()
    config = SMOLLM2
    if smoke:
        config, arguments.tokens, arguments.blocks, arguments.repeats = TINY, 64, [32], 2
        arguments.out = Path(os.devnull)

    keys = jax.random.split(jax.random.key(0), 3)
    matrix = 0.1 * jax.random.normal(keys[0], (config.vocab_size, config.hidden_size))
    predicted, truth = (2 * jax.random.normal(key, (arguments.tokens, config.hidden_size)) for key in keys[1:])
    inputs = matrix, predicted, truth

    programs = {
        "products": compiled(token_major, *inputs),
        "autodiff": compiled(autodiff, *inputs),
        "draft layer's products": compiled(layer_products, layer_operands(config, arguments.tokens)),
        "training step": training_step(config, arguments.tokens),
    }
    for block in arguments.blocks:
        for name, function in (("token-major products", token_major), ("vocabulary-major products", vocabulary_major),
                               ("token-major gradient only", gap_times_head),
                               ("expected embedding stored", with_expected_embedding)):  # fmt: skip
            programs[f"{name} / {block}"] = compiled(functools.partial(in_blocks, function, block), *inputs)
        loss = functools.partial(closed_form, block)
        programs[f"token_loss / {block}"] = compiled(loss, *inputs)
        of_kernel = lambda kernel, *hidden, loss=loss: loss(kernel.T, *hidden)  # noqa: E731
        programs[f"token_loss, head as [D, V] / {block}"] = compiled(of_kernel, matrix.T, *inputs[1:])

    times = measure(programs, arguments.repeats)
    for name, t in times.items():
        ratios = {f"{kind}_ratio": t[kind] / times["products"][kind] for kind in ("wall", "cpu")}
        t |= ratios
        for kind in ("wall", "cpu"):
            name = f"{name:40s}  {kind} {t[kind]:.4f} s, ratio {t[kind + '_ratio']:.2f}"
        print(name)
    all_products = {k: times["products"][k] + times["draft layer's products"][k] for k in ("wall", "cpu")}
    step = {kind: times["training step"][kind] / all_products[kind] for kind in all_products}
    print(f"training step over all its products: {step['wall']:.2f} (wall), {step['cpu']:.2f} (cpu)")
    results = {
        "tokens": arguments.tokens, "repeats": arguments.repeats, "hardware": describe_hardware(), "times": times,
        "step_over_products": step,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
