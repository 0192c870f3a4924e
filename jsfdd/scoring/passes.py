"""Run a compiled step over batches of samples: host and devices at the same time, with a progress bar."""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from jsfdd.base.mesh import num_data_shards, own_rows, shard_built_rows
from jsfdd.base.processes import is_primary
from jsfdd.base.progress import progress as show_progress
from jsfdd.base.records import Batch, Sample
from jsfdd.data.batches import BatchPlan, pad_batch


def run_batches(
    step: Callable,
    params: dict,
    samples: Sequence[Sample],
    plans: Sequence[BatchPlan],
    mesh: Mesh,
    *,
    label: str,
    finished: int,
    progress: bool,
) -> Iterator[tuple[list[Sample], object]]:
    """`step(params, batch)` of each plan in order: its samples, and the results on the host, row b samples[b]'s.

    Every device gets a whole batch of its own, so its program, and every bit of its results, is the same for any number
    of devices. Of several processes each reads the batches of its own devices, and is given their results alone.

    Args:
      step: from `mesh.map_over_devices`.
      params: where they belong on `mesh`.
      samples: those that the plans number.
      label: of the bar.
      finished: batches that an earlier call did.
      progress: show the bar, with the samples' tokens per second (no padding).
    """
    shown = progress and is_primary()
    with show_progress(label, "batches", finished + len(plans), finished=finished, shown=shown) as bar:
        started, tokens, done = time.monotonic(), 0, finished
        for group, results in _one_ahead(step, params, samples, list(group_plans(plans, num_data_shards(mesh))), mesh):
            for shard, rows in own_rows(results, mesh).items():
                if shard < len(group):
                    yield [samples[i] for i in group[shard].indices], rows
            tokens += sum(len(samples[i].tokens) for plan in group for i in plan.indices)
            done += len(group)
            bar.update(done, figures=f"{tokens / (time.monotonic() - started):,.0f} tokens/s")


def spread_out(plans: Sequence[BatchPlan], size: int) -> list[BatchPlan]:
    """The same plans in an order that begins with the first and of which every part is like the whole.

    Of plans from the longest to the shortest: memory still runs out at once or never, but what is done at any time has
    about its share of all lengths. Plans that run at once, `size` a group, stay together.
    """
    groups = list(group_plans(plans, size))
    # Multiples of the golden ratio, modulo 1, lie evenly wherever one stops counting.
    turns = np.arange(len(groups)) * ((5**0.5 - 1) / 2) % 1
    return [plan for number in np.argsort(turns) for plan in groups[number]]


def group_plans(plans: Sequence[BatchPlan], size: int) -> Iterator[tuple[BatchPlan, ...]]:
    """What is computed at once: up to `size` consecutive plans of one shape, one a device."""
    for _, alike in itertools.groupby(plans, key=lambda plan: plan.shape):
        while group := tuple(itertools.islice(alike, size)):
            yield group


def _one_ahead(step: Callable, params: dict, samples: Sequence[Sample], groups: Sequence, mesh: Mesh):
    """The devices already work on the next batches while the caller handles these; no more, for memory's sake."""
    waiting: collections.deque = collections.deque()
    for group in groups:
        waiting.append((group, step(params, _device_batches(samples, group, mesh))))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _device_batches(samples: Sequence[Sample], group: Sequence[BatchPlan], mesh: Mesh) -> Batch:
    """One batch a device; devices beyond the group get an empty one."""
    shape = group[0].shape

    def build(start: int, stop: int) -> Batch:
        shard = start // shape.rows
        if shard < len(group):
            return pad_batch([samples[i] for i in group[shard].indices], shape)
        return Batch(np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape.rows, np.int32))

    return shard_built_rows(build, shape.rows * num_data_shards(mesh), mesh)
