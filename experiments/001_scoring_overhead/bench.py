"""What scoring costs on top of the target's own forward pass and head. See README.md."""

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
from jsfdd.models.architecture import DecoderConfig, Rope
from jsfdd.models.counted import fold_counted
from jsfdd.models.target import head_logits, hidden_states, init_params
from jsfdd.scoring.flatness import score_hidden
from jsfdd.weights.target import load_target

TINY = DecoderConfig(
    family="llama", vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, max_position=512, rms_norm_eps=1e-5, rope=Rope(theta=1e4), tie_embeddings=True,
)  # fmt: skip


def next_logit(logits, next_token):
    """The least use of the logits: the bare head."""
    return jnp.take_along_axis(logits, next_token[:, None], axis=-1)[:, 0]


def plain_sums(logits, next_token):
    """The same metrics as the formulas stand, every sum left to the compiler."""
    m, second = jax.lax.top_k(logits, 2)[0].T
    d = logits - m[:, None]
    e = jnp.exp(d)
    s, r, w = jnp.sum(e, -1), jnp.sum(e * e, -1), jnp.sum(d * e, -1)
    return s * jax.lax.rsqrt(r) + jnp.log(s) - w / s + jnp.expm1(second - m) / s + next_logit(logits, next_token)


def two_logsumexps(logits, next_token):
    """Flatness alone, from its textbook form."""
    flatness = jnp.exp(jax.nn.logsumexp(logits, -1) - 0.5 * jax.nn.logsumexp(2 * logits, -1))
    return flatness + next_logit(logits, next_token)


def softmax_cosine(logits, next_token):
    """Flatness alone, as the cosine of the probabilities and the uniform distribution."""
    p = jax.nn.softmax(logits, -1)
    return jnp.sum(p, -1) / jnp.linalg.norm(p, axis=-1) + next_logit(logits, next_token)


def over_blocks(config, statistic, block, params, hidden, tokens):
    """`statistic` of every token's logits, `block` tokens at a time, exactly as `score_hidden` visits them."""
    rows_of_hidden, rows_of_tokens = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)

    def visit(rows, values):
        logits = head_logits(config, params, rows_of_hidden.at[rows].get(mode="fill", fill_value=0))
        next_token = rows_of_tokens.at[rows].get(mode="fill", fill_value=0)
        return values.at[rows].set(statistic(logits, next_token), mode="drop")

    counted = jnp.ones(rows_of_tokens.shape, bool)
    return fold_counted(counted, block, visit, jnp.zeros(rows_of_tokens.shape))


def scored(config, block, params, hidden, tokens):
    """The product, with every token counted."""
    return score_hidden(config, params, hidden, tokens, jnp.ones(tokens.shape, bool), block)


def forward(config, last_stage, params, tokens):
    return last_stage(params, hidden_states(config, params, tokens), tokens)


def measure(programs: dict, repeats: int) -> dict:
    """name -> {"wall": …, "cpu": …}: median seconds, the programs taking turns; CPU seconds are of all threads."""
    times = {name: {"wall": [], "cpu": []} for name in programs}
    for run in programs.values():
        run()
    for _ in range(repeats):
        for name, run in programs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            times[name]["wall"].append(time.perf_counter() - wall)
            times[name]["cpu"].append(time.process_time() - cpu)
    return {name: {kind: statistics.median(values) for kind, values in t.items()} for name, t in times.items()}


def compiled(function, *arguments):
    program = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments))


def main():
    smoke = os.environ.get("SMOKE") == "1"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=3 if smoke else 9)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    arguments = parser.parse_args()

    if smoke:
        config, params, name = TINY, init_params(TINY, jax.random.key(0)), "tiny random"
        arguments.tokens, arguments.blocks, arguments.out = 64, [32], Path(os.devnull)
    else:
        target = load_target(arguments.target)
        config, params, name = target.config, target.params, target.name
    length = min(256, arguments.tokens)
    tokens = jax.random.randint(jax.random.key(1), (arguments.tokens // length, length), 0, config.vocab_size)
    hidden = jax.jit(functools.partial(hidden_states, config))(params, tokens)
    results = {
        "target": name, "tokens": tokens.size, "repeats": arguments.repeats, "hardware": describe_hardware(), "blocks": {},
    }  # fmt: skip
    for block in arguments.blocks:
        bare = functools.partial(over_blocks, config, next_logit, block)
        heads = {"bare": bare, "product": functools.partial(scored, config, block)}
        for statistic in (plain_sums, two_logsumexps, softmax_cosine):
            heads[statistic.__name__] = functools.partial(over_blocks, config, statistic, block)
        head = measure({n: compiled(f, params, hidden, tokens) for n, f in heads.items()}, arguments.repeats)
        whole = {n: functools.partial(forward, config, heads[n]) for n in ("bare", "product", "plain_sums")}
        whole = measure({n: compiled(f, params, tokens) for n, f in whole.items()}, arguments.repeats)
        results["blocks"][block] = {"head": head, "forward_and_head": whole}
        for part, times in results["blocks"][block].items():
            for n, t in times.items():
                print(
                    f"block {block:4d}  {part:16s} {n:15s} {t['wall']:.3f} s  cpu {t['cpu']:.3f} s"
                    f"  ratio {t['wall'] / times['bare']['wall']:.3f}  cpu ratio {t['cpu'] / times['bare']['cpu']:.3f}",
                    flush=True,
                )
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
