"""Run a compiled step over batches of samples, with host and devices working at the same time, and a progress bar.

    for batch, rows in run_batches(step, params, samples, plans, mesh, label="score"):
        ...                                                                 # row b of `rows` belongs to batch[b]

Scoring, the store of hidden states and the store of soft targets use it.
"""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jsfdd.base.mesh import num_data_shards, own_rows, shard_built_rows
from jsfdd.base.processes import is_primary
from jsfdd.base.progress import progress as show_progress
from jsfdd.base.records import Sample
from jsfdd.data.batches import BatchPlan, Shape, pad_batch


def run_batches(
    step: Callable,
    params: Any,
    samples: Sequence[Sample],
    plans: Sequence[BatchPlan],
    mesh: Mesh,
    *,
    label: str,
    finished: int = 0,
    progress: bool = True,
    build: Callable[[Sequence[Sample], Shape], Any] = pad_batch,
) -> Iterator[tuple[list[Sample], Any]]:
    """Run `step(params, batch)` for each plan in order; yield its samples and the results on the host, row b for samples[b].

    Every device gets a whole batch, so its program and its results, to the bit, do not depend on the number of devices.
    With several processes, each reads the batches of its own devices and gets only their results.

    Args:
      step: takes a batch whose rows are split over `mesh`, one plan per data shard, as `mesh.map_over_devices` compiles it.
      params: the step's first argument, placed on `mesh`.
      samples: the samples that the plans index.
      label: the bar's label.
      finished: batches that an earlier call did.
      progress: show the bar, with tokens per second (without padding).
      build: makes the host arrays of one plan, whose leading axis is shape.rows.
    """
    groups = list(group_plans(plans, num_data_shards(mesh)))
    shown = progress and is_primary()
    with show_progress(label, "batches", finished + len(plans), finished=finished, shown=shown) as bar:
        started, tokens, done = time.monotonic(), 0, finished
        for group, results in _one_ahead(groups, lambda group: step(params, _device_batches(build, samples, group, mesh))):
            for shard, rows in own_rows(results, mesh).items():
                if shard < len(group):
                    yield [samples[i] for i in group[shard].indices], rows
            tokens += sum(len(samples[i].tokens) for plan in group for i in plan.indices)
            done += len(group)
            bar.update(done, figures=f"{tokens / (time.monotonic() - started):,.0f} tokens/s")


def spread_out(plans: Sequence[BatchPlan], size: int) -> list[BatchPlan]:
    """Interleave long and short batches, the first plan still first.

    `make_batches` sorts batches from the longest to the shortest. Interleaved, any n batches hold about n batches' share of
    all tokens, so the files that a pass writes grow evenly. Groups of `size` plans, which run at once, stay together.
    """
    groups = list(group_plans(plans, size))
    # Multiples of the golden ratio, modulo 1, are spread evenly for any number of groups.
    turns = np.arange(len(groups)) * ((5**0.5 - 1) / 2) % 1
    return [plan for number in np.argsort(turns) for plan in groups[number]]


def group_plans(plans: Sequence[BatchPlan], size: int) -> Iterator[tuple[BatchPlan, ...]]:
    """Group the plans that run at once: up to `size` consecutive plans of one shape, one per device."""
    for _, alike in itertools.groupby(plans, key=lambda plan: plan.shape):
        while group := tuple(itertools.islice(alike, size)):
            yield group


def _one_ahead(groups: Sequence, start: Callable) -> Iterator[tuple]:
    """Yield (group, start(group)), starting the next group before the caller handles this one.

    This keeps the devices busy, with at most two groups' results in memory.
    """
    waiting: collections.deque = collections.deque()
    for group in groups:
        waiting.append((group, start(group)))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _device_batches(build: Callable, samples: Sequence[Sample], group: Sequence[BatchPlan], mesh: Mesh) -> Any:
    """Build one batch per device; devices beyond the group get zeros, where no token counts."""
    shape = group[0].shape

    def build_shard(start: int, stop: int) -> Any:
        shard = start // shape.rows
        batch = build([samples[i] for i in group[min(shard, len(group) - 1)].indices], shape)
        return batch if shard < len(group) else jax.tree.map(np.zeros_like, batch)

    return shard_built_rows(build_shard, shape.rows * num_data_shards(mesh), mesh)
