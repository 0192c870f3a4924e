"""What a training step costs, and how much of it the head: one step of each kind on one batch of the pool. See README.md."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax

from experiments.pool.pool import SMOKE, Pool, open_pool, pool_parser, soft_targets_of
from experiments.results import read_results, write_results
from jsfdd.base.mesh import replicate
from jsfdd.data.batches import make_batches
from jsfdd.training.batch import TrainingData, device_batch
from jsfdd.training.draft_shape import draft_of
from jsfdd.training.loss import borrow, restrict
from jsfdd.training.recipe import Recipe
from jsfdd.training.step import init_state, make_optimizer, make_train_step

HERE = Path(__file__).parent
REPEATS = 2 if SMOKE else 7
KINDS = {
    "EAGLE-2": {},
    "HASS, 3 steps": dict(draft_steps=3),
    **{f"EAGLE-3, {n} steps": dict(draft_kind="eagle3", draft_steps=n) for n in (1, 3, 7)},
    "EAGLE-3, 3 steps, frozen head": dict(draft_kind="eagle3", draft_steps=3, draft_head="frozen"),
    "EAGLE-3, 3 steps, asks the target": dict(draft_kind="eagle3", draft_steps=3, soft_targets="none", draft_vocab=0),
}
VOCABULARIES = (8192, 64)  # of 64 tokens the head costs next to nothing


def main() -> None:
    options = pool_parser(__doc__, epochs=1).parse_args()
    pool = open_pool(options, draft_kind="eagle3")
    path = (options.work if SMOKE else HERE) / "results.jsonl"
    results = read_results(path)
    for name, recipe in KINDS.items():
        for vocabulary in VOCABULARIES if "draft_vocab" not in recipe else (0,):
            changed = dataclasses.replace(pool.recipe, **{"draft_vocab": vocabulary} | recipe)
            seconds, compiled = timed_step(pool, changed)
            row = {"seconds": seconds, "temporary_bytes": compiled}
            results.setdefault("parts", {}).setdefault(name, {})[str(vocabulary)] = row
            print(f"{name}, {vocabulary} tokens: {seconds:.3f} s a step, {compiled / 1e6:.0f} MB of temporaries", flush=True)
            write_results(path, results)


def timed_step(pool: Pool, recipe: Recipe) -> tuple[float, float]:
    """(the least seconds of some steps on the pool's first batch, bytes of temporaries that the compiler reports)."""
    target, mesh = pool.loaded.target, pool.loaded.mesh
    draft = draft_of(target.config, recipe, pool.loaded.samples)
    plan = make_batches([len(sample.tokens) for sample in pool.samples], pool.shapes)[0]
    samples = [pool.samples[i] for i in plan.indices]
    data = TrainingData(samples, pool.store)
    folder = pool.work / "parts" / f"{recipe.draft_kind}_{recipe.draft_head}_{recipe.draft_vocab:g}"
    data = data._replace(soft_targets=soft_targets_of(recipe, pool.loaded, data, draft, folder))
    batch = device_batch(data, range(len(samples)), plan.shape, mesh)
    whole, optimizer = borrow(target.config, target.params), make_optimizer(recipe, 100)
    borrowed = replicate(whole if data.soft_targets is None else restrict(whole, draft), mesh)
    state = replicate(init_state(draft, optimizer, 0, whole.output), mesh)
    step = make_train_step(draft, optimizer, mesh, recipe).lower(borrowed, state, batch).compile()
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(step(borrowed, state, batch))
        best = min(best, time.perf_counter() - begin)
    return best, float(step.memory_analysis().temp_size_in_bytes)


if __name__ == "__main__":
    main()
