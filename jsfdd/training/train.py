"""The training loop: from samples and the target's hidden states to a draft. It can be killed and resumed at any time.

    kept, held_out = split_held_out(samples, recipe.held_out_share)
    data, other = TrainingData(kept, store), TrainingData(held_out, store)
    result = train(target, data, other, recipe, mesh, out=Path("draft"), seed=0)

Step s of a run is a pure function of the samples, the shapes and the seed (`schedule.py`); its noise is a function of the key
and s. So the state of a run is its TrainState and nothing else, and a run that was killed continues from its last checkpoint
to the same bits and the same metrics.jsonl as one that never stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh

from jsfdd.base import interrupts
from jsfdd.base.mesh import put, to_host
from jsfdd.base.processes import several, wait_for_all
from jsfdd.base.records import DraftBatch, Sample, TrainState, samples_digest
from jsfdd.data.batches import Shape, choose_shapes, make_batches
from jsfdd.models.draft import Draft, DraftConfig, params_digest, vocabulary_digest
from jsfdd.models.sharding import split_vocabulary
from jsfdd.training.batch import TrainingData, device_batch, weights_digest
from jsfdd.training.draft_shape import draft_of
from jsfdd.training.figures import mean_figures
from jsfdd.training.journal import TIMINGS, Journal, read_lines, read_metrics
from jsfdd.training.loss import Borrowed, borrow, restrict
from jsfdd.training.recipe import Recipe
from jsfdd.training.reports import HeldOut, Probe, Reports, Watch
from jsfdd.training.schedule import schedule_steps
from jsfdd.training.step import (
    init_state,
    learning_rate_schedule,
    make_accumulating_step,
    make_evaluate_step,
    make_optimizer,
    make_train_step,
    state_shardings,
)
from jsfdd.training.timings import Throughput
from jsfdd.weights.checkpoint import Checkpoints

if TYPE_CHECKING:
    from jsfdd.models.foreign import ForeignTarget
    from jsfdd.weights.target import Target


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
      draft: after the last step; its record is the run's identity. If the run probed, `load_draft(out)` gives the best.
      state: after the last step.
      steps, samples, tokens: optimizer steps, training samples, and tokens that counted in the loss, over all epochs; of a run
        that lost patience, as far as it went.
      seconds: of all steps and evaluations that led here, over all starts of the run; lost work is not in it.
      compile_seconds: of compiling, over all starts; not in `seconds`.
      held_out: the last epoch's figures (`figures.mean_figures`); empty if nothing was held out.
    """

    draft: Draft
    state: TrainState
    steps: int
    samples: int
    tokens: int
    seconds: float
    compile_seconds: float
    held_out: dict[str, float]


def train(
    target: Target | ForeignTarget,
    data: TrainingData,
    held_out: TrainingData,
    recipe: Recipe,
    mesh: Mesh,
    *,
    out: str | Path,
    seed: int = 0,
    draft: DraftConfig | None = None,
    init: Draft | None = None,
    identity: dict | None = None,
    shapes: Sequence[Shape] | None = None,
    batch_tokens: int = 4096,
    probe: Probe | None = None,
    probe_every: int = 200,
    patience: int | None = None,
    shard_optimizer: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train a draft on `data`, or continue or just return the run that `out` already holds.

    Args:
      target: its embedding and head are used, its architecture for the draft's shape, and its fingerprint; hidden states come
        with the data. So a model of another library will do (`models/foreign.py`).
      data, held_out: the two sides of `split_held_out`, the first after selection. Soft targets and weights are read from the
        first only.
      recipe: how the draft learns.
      out: receives checkpoints/, metrics.jsonl and timings.jsonl.
      seed: for the draft's initial weights, the order of the samples and the noise.
      draft: the draft's shape, if several runs should share a vocabulary; otherwise as the recipe and `data` have it.
      init: the draft from which training starts; its shape stays. A fresh one by default.
      identity: JSON-ready: further facts that the result depends on (the target's dtype, the data's hash, …). A run is only
        continued with the same identity, target, recipe, samples and shapes.
      shapes: batch shapes, if several runs should share programs; otherwise chosen for both sides.
      batch_tokens: tokens of a batch, padding included, where shapes are chosen here.
      probe: decodes a few prompts every `probe_every` steps and after the last one. Its figures are logged, and the draft
        with the best τ so far is kept beside the checkpoints.
      patience: stop after so many probes in a row without a new best τ; by default train to the last step.
      shard_optimizer: keep Adam's moments in parts, one on each data shard.
      tensorboard: also write TensorBoard's files, to `out`/tensorboard.
      progress: show a bar.

    But for rounding the draft does not depend on the mesh or the number of processes, and a run may continue on another
    mesh. Several processes all call this with the same arguments, and process 0 writes.

    Raises:
      ValueError: no token counts, a sample's hidden states are missing or misshapen, or `out` holds another run.
      FloatingPointError: a loss or gradient is not finite; names the step and the samples of its batch.
    """
    out = Path(out)
    if patience is not None and probe is None:
        raise ValueError("patience counts probes, and there is no probe")
    draft = draft or draft_of(target.config, recipe, data.samples, None if init is None else init.config)
    lengths, visited = (np.array([count(sample) for sample in data.samples]) for count in (_length, data.visited))
    _check(draft, data, visited)
    shapes = shapes or choose_shapes([*lengths, *map(_length, held_out.samples)], batch_tokens)
    steps = schedule_steps(lengths, visited, shapes, epochs=recipe.epochs, accumulate=recipe.accumulate, seed=seed)
    run = {"target": target.fingerprint, **(identity or {}), **_identity(data, held_out.samples, shapes, recipe, seed, draft)}
    run |= {} if init is None else {"init": params_digest(init.params)}
    run |= {} if patience is None else {"patience": patience}

    optimizer, learning_rate = make_optimizer(recipe, len(steps)), learning_rate_schedule(recipe, len(steps))
    train_step = _make_step(draft, optimizer, mesh, recipe, shard_optimizer)
    whole = split_vocabulary(borrow(target.config, target.params), mesh)
    borrowed = split_vocabulary(restrict(whole, draft), mesh)
    held_out_figures = _make_held_out_figures(whole, draft, held_out, shapes, recipe, mesh)
    head = whole.output if draft.kind == "eagle3" and init is None else None
    fresh = init_state(draft, optimizer, seed, head, None if init is None else init.params)
    fresh = jax.tree.map(put, fresh, state_shardings(draft, optimizer, mesh, shard_optimizer))
    products = recipe.head_products + (data.soft_targets is None)
    throughput = Throughput(draft, mesh, lengths, visited, products=products, draft_steps=recipe.unrolled)
    watch = Watch(held_out_figures, probe, probe_every, patience)

    with Checkpoints(out, draft, run) as checkpoints:
        state = checkpoints.resume(fresh)
        start = int(state.step)
        journal = Journal(out, start, tensorboard)
        reports = Reports(
            checkpoints, journal, data.samples, steps, start, recipe, watch, learning_rate, throughput, progress
        )  # fmt: skip
        with reports, _signals() as signalled:
            for step in steps[start:]:
                if reports.out_of_patience or signalled():
                    break
                with reports.reading():
                    batches = [device_batch(data, plan.indices, plan.shape, mesh) for plan in step.plans]
                state, metrics = train_step(borrowed, state, batches)
                reports.after(step, state, metrics)
            if signalled():
                reports.save_now(state)

    wait_for_all("trained")
    compiling = sum(line.get("compiling", 0.0) for line in read_lines(out / TIMINGS))  # earlier versions did not note it
    ends = [line["held_out"] for line in read_metrics(out) if "held_out" in line]
    return TrainResult(
        draft=Draft(draft, state.params, run),
        state=state,
        steps=int(state.step),
        samples=len(data.samples),
        tokens=steps[int(state.step) - 1].tokens,
        seconds=sum(line["seconds"] for line in read_lines(out / TIMINGS)) - compiling,
        compile_seconds=compiling,
        held_out=ends[-1] if ends else {},
    )


def _check(draft: DraftConfig, data: TrainingData, visited: np.ndarray) -> None:
    if draft.vocabulary and data.soft_targets is None:
        raise ValueError("a draft vocabulary is trained on soft targets; store them first (`soft_store.store_soft_targets`)")
    if not visited.sum():
        raise ValueError("no token to train on: every sample's answers are empty or one token long; check the data")


def _signals() -> AbstractContextManager[Callable[[], bool]]:
    """Signals wait for the end of a step; of several processes one may have none, so there they do not."""
    return nullcontext(lambda: False) if several() else interrupts.noted()


def _length(sample: Sample) -> int:
    return len(sample.tokens)


def _make_step(draft: DraftConfig, optimizer, mesh: Mesh, recipe: Recipe, shard_optimizer: bool):
    """`(borrowed, state, batches) -> (state, metrics)`; without accumulation there is one batch."""
    if recipe.accumulate > 1:
        return make_accumulating_step(draft, optimizer, mesh, recipe, shard_optimizer)
    train_step = make_train_step(draft, optimizer, mesh, recipe, shard_optimizer)

    def step(borrowed: Borrowed, state: TrainState, batches: Sequence[DraftBatch]):
        (batch,) = batches
        return train_step(borrowed, state, batch)

    return step


def _make_held_out_figures(
    borrowed: Borrowed, draft: DraftConfig, held_out: TrainingData, shapes: Sequence[Shape], recipe: Recipe, mesh: Mesh
) -> HeldOut | None:
    """Figures of the held-out samples, on all their tokens and by the target's own head; None if there are none."""
    if not held_out.samples:
        return None
    held_out = TrainingData(held_out.samples, held_out.hidden)
    evaluate_step = make_evaluate_step(draft, mesh, recipe)
    plans = make_batches([len(sample.tokens) for sample in held_out.samples], shapes)

    def figures(draft_params: dict) -> dict[str, float]:
        batches = (device_batch(held_out, plan.indices, plan.shape, mesh) for plan in plans)
        return mean_figures(to_host([evaluate_step(borrowed, draft_params, batch) for batch in batches]))

    return figures


def _identity(
    data: TrainingData,
    held_out: Sequence[Sample],
    shapes: Sequence[Shape],
    recipe: Recipe,
    seed: int,
    draft: DraftConfig,
) -> dict:
    """What the run's bits depend on and `train` can see."""
    return {
        "options": {**dataclasses.asdict(recipe), "seed": seed},
        "samples": samples_digest(data.samples),
        "weights": None if data.weights is None else weights_digest(data),
        "held_out": samples_digest(held_out),
        "shapes": [list(shape) for shape in shapes],
        "vocabulary": vocabulary_digest(draft),
    }
