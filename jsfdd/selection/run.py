"""Run a compiled step over batches of samples: host and devices at the same time, with a progress bar."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Sequence

from jax.sharding import Mesh

from jsfdd.data.batches import BatchPlan, pad_batch
from jsfdd.mesh import replicate, shard_rows, to_host
from jsfdd.progress import progress as show_progress
from jsfdd.records import Sample


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

    Args:
      step: from `mesh.map_over_devices`.
      samples: those that the plans number.
      label: of the bar.
      finished: batches that an earlier call did.
      progress: show the bar, with the samples' tokens per second (no padding).
    """
    with show_progress(label, "batches", finished + len(plans), finished=finished, shown=progress) as bar:
        started, tokens = time.monotonic(), 0
        batches = _one_ahead(step, replicate(params, mesh), samples, plans, mesh)
        for done, (batch, results) in enumerate(batches, finished + 1):
            yield batch, results
            tokens += sum(len(sample.tokens) for sample in batch)
            bar.update(done, figures=f"{tokens / (time.monotonic() - started):,.0f} tokens/s")


def _one_ahead(step: Callable, params: dict, samples: Sequence[Sample], plans: Sequence[BatchPlan], mesh: Mesh):
    """The devices already work on the next batch while the caller handles this one; no more, for memory's sake."""
    waiting: collections.deque = collections.deque()
    for plan in plans:
        batch = [samples[i] for i in plan.indices]
        waiting.append((batch, step(params, shard_rows(pad_batch(batch, plan.shape), mesh))))
        if len(waiting) > 1:
            batch, results = waiting.popleft()
            yield batch, to_host(results)
    for batch, results in waiting:
        yield batch, to_host(results)
