"""Progressive Data Dropout (arXiv 2505.22342) for drafts: every sample at first, then the hardest few, at last every one again.

Its authors drop what the model classifies well and read that off the pass they make anyway. Here a sample is as hard as the
target and the draft differ on it, which is asked before every pass that needs it: the cost is told apart, and would be saved.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from jsfdd.base.mesh import put
from jsfdd.data.batches import epoch_batches
from jsfdd.models.draft import DraftConfig
from jsfdd.selection.sfdd import how_many
from jsfdd.training.batch import TrainingData, device_batch
from jsfdd.training.loss import borrow, restrict
from jsfdd.training.step import init_state, make_optimizer, make_train_step, state_shardings
from jsfdd.weights.checkpoint import Checkpoints

if TYPE_CHECKING:
    from experiments.pool.pool import Pool


@dataclasses.dataclass(frozen=True)
class Progressive:
    """One draft that sees a share of all samples in each pass.

    Attributes:
      passes: the shares.
      rank: `(pool, draft, params) -> hardness [N]`; the hardest stay. None: who stays is drawn.
      seed: of the draft, the order of the samples and the draw.
    """

    passes: tuple[float, ...]
    rank: Callable[[Pool, DraftConfig, dict], np.ndarray] | None
    seed: int

    def train(self, pool: Pool, directory: Path) -> tuple[dict, DraftConfig, dict]:
        """(cost, draft, its parameters)."""
        target, mesh, draft = pool.loaded.target, pool.loaded.mesh, pool.draft
        lengths = np.array([len(sample.tokens) for sample in pool.samples])
        data = TrainingData(pool.samples, pool.store, pool.soft_targets)
        random, everyone = np.random.default_rng(self.seed), np.arange(len(lengths))
        # The schedule wants the number of steps; a share has about as many batches whoever stays.
        some = [random.permutation(everyone)[: how_many(share, len(lengths))] for share in self.passes]
        expected = sum(len(epoch_batches(lengths[kept], pool.shapes, 0, 0)) for kept in some)
        optimizer = make_optimizer(pool.recipe, expected)
        step = make_train_step(draft, optimizer, mesh, pool.recipe)
        frozen = restrict(borrow(target.config, target.params), draft)
        state = jax.tree.map(put, init_state(draft, optimizer, self.seed), state_shardings(draft, optimizer, mesh, False))
        ranking, tokens, begin, cpu = 0.0, 0, time.perf_counter(), time.process_time()
        for number, share in enumerate(self.passes):
            kept = everyone
            if share < 1:
                cpu_before = time.process_time()
                hardness = random.random(len(lengths)) if self.rank is None else self.rank(pool, draft, state.params)
                kept = np.sort(np.argsort(-hardness, kind="stable")[: how_many(share, len(lengths))])
                ranking += time.process_time() - cpu_before
            for plan in epoch_batches(lengths[kept], pool.shapes, self.seed, number):
                state, metrics = step(frozen, state, device_batch(data, kept[list(plan.indices)], plan.shape, mesh))
            jax.block_until_ready(metrics)
            tokens += sum(int(np.count_nonzero(pool.samples[i].counted[1:])) for i in kept)
        with Checkpoints(directory, draft, pool.loaded.identity) as checkpoints:
            checkpoints.save(state)
        row = {
            "samples": len(pool.samples), "steps": int(state.step), "tokens_in_loss": tokens, "tokens": int(lengths.sum()),
            "seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu - ranking,
            "cpu_seconds_of_own_store": ranking,
        }  # fmt: skip
        return row, draft, jax.device_get(state.params)
