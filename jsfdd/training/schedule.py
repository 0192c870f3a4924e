"""The steps of a training run: a pure function of the samples, the shapes and the seed.

So the state of a run is its TrainState and nothing else, and a run that goes on at step s finds the same step s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jsfdd.data.batches import BatchPlan, Shape, epoch_batches


class Step(NamedTuple):
    """One optimizer step.

    Attributes:
      number: from 1.
      epoch: from 0.
      plans: one batch, or several whose gradients are accumulated; the last step of an epoch may have fewer.
      ends_epoch: whether it is the last of its epoch.
      tokens: how many the loss has visited by the end of the step, since the run began.
    """

    number: int
    epoch: int
    plans: tuple[BatchPlan, ...]
    ends_epoch: bool
    tokens: int


def schedule_steps(
    lengths: Int[np.ndarray, " N"],
    visited: Int[np.ndarray, " N"],
    shapes: Sequence[Shape],
    *,
    epochs: int,
    accumulate: int,
    seed: int,
) -> tuple[Step, ...]:
    """All steps of a run over samples of these `lengths`; the loss visits `visited` tokens of them."""
    steps, tokens = [], 0
    for epoch in range(epochs):
        plans = epoch_batches(lengths, shapes, seed, epoch)
        groups = [tuple(plans[begin : begin + accumulate]) for begin in range(0, len(plans), accumulate)]
        for group in groups:
            tokens += sum(int(visited[list(plan.indices)].sum()) for plan in group)
            steps.append(Step(len(steps) + 1, epoch, group, group is groups[-1], tokens))
    return tuple(steps)
