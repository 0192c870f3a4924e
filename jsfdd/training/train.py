"""The training loop: from samples and their stored hidden states to a draft, resumable at any moment.

    train_samples, held_out = split_held_out(samples, config.held_out_share)
    data, other = TrainingData(train_samples, store), TrainingData(held_out, store)
    result = train(target.config, target.params, data, other, config, mesh, identity={…})

Step s of a run is batch s of a list that is a pure function of the samples, the shapes and the seed; its noise is a
function of the key and s. So the state of a run is its TrainState and nothing else, and a run that was killed
continues from its last checkpoint to the same bits and the same metrics.jsonl as one that never stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import jax
import numpy as np
from jax.sharding import Mesh

from jsfdd.base.files import differences, plain
from jsfdd.base.mesh import put, to_host
from jsfdd.base.processes import is_primary, wait_for_all
from jsfdd.base.progress import progress as show_progress
from jsfdd.base.records import Sample, TrainState, samples_digest
from jsfdd.commands.options import Seeded
from jsfdd.commands.train import TrainConfig
from jsfdd.data.batches import BatchPlan, Shape, choose_shapes, epoch_batches, make_batches
from jsfdd.data.held_out import split_held_out as split_held_out
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.draft import DraftConfig
from jsfdd.models.sharding import split_vocabulary
from jsfdd.training.batch import TrainingData, device_batch, weights_digest
from jsfdd.training.draft_shape import draft_of
from jsfdd.training.journal import append_line, drop_after, mean_figures, read_lines
from jsfdd.training.loss import Borrowed, borrow, restrict
from jsfdd.training.recipe import Recipe
from jsfdd.training.step import (
    StepMetrics,
    init_state,
    learning_rate_schedule,
    make_accumulating_step,
    make_evaluate_step,
    make_optimizer,
    make_train_step,
    state_shardings,
)
from jsfdd.training.tensorboard import open_board
from jsfdd.training.timings import Laps, Throughput
from jsfdd.weights import checkpoint

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
_STEPS_AHEAD = 2

Probe = Callable[[dict], dict]  # draft params -> figures, among them "tau"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
      draft: the draft's shape.
      state: the last step's.
      steps, samples, tokens: optimizer steps, training samples, and tokens that counted in the loss, over all epochs.
      seconds: of all steps and evaluations that led here, over all starts of the run; lost work is not in it.
      held_out: the last epoch's figures (`log.mean_figures`); empty if nothing was held out.
    """

    draft: DraftConfig
    state: TrainState
    steps: int
    samples: int
    tokens: int
    seconds: float
    held_out: dict[str, float]


def train(
    target_config: DecoderConfig,
    target_params: dict,
    data: TrainingData,
    held_out: TrainingData,
    config: TrainConfig,
    mesh: Mesh,
    *,
    identity: dict,
    draft: DraftConfig | None = None,
    shapes: Sequence[Shape] | None = None,
    probe: Probe | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train a draft on `data`, or continue or just return the run that `config.out` already holds.

    Args:
      target_config, target_params: the target; of its parameters only embedding and head are used.
      data, held_out: two sides of `split_held_out`, of the first only the selected; `known` and `weights` matter to the first.
      config: `config.out` receives checkpoints/, metrics.jsonl and timings.jsonl.
      identity: JSON-ready; what else the result depends on (the target's fingerprint, the data's hash, …). A run is
        only continued with the same identity, options, samples and shapes.
      draft: its shape, if several runs should share one draft vocabulary; `draft_of` of the options and `data` otherwise.
      shapes: batch shapes, if several runs should share programs; chosen for `samples` and `held_out` otherwise.
      probe: a real decode, every `config.probe_every` steps and after the last: its figures are logged, and the draft of the
        best τ so far is kept beside the checkpoints.
      progress: show a bar.

    The draft does not depend on the mesh or the number of processes but for rounding, and a run may go on on another
    mesh. Of several processes each calls this with the same arguments, and process 0 writes.

    Raises:
      ValueError: no token counts, a sample's hidden states are missing or misshapen, or `config.out` holds another run.
      FloatingPointError: a loss or gradient is not finite; names the step and the samples of its batch.
    """
    draft = draft or draft_of(target_config, config, data.samples)
    samples, others = data.samples, held_out.samples
    shapes = shapes or choose_shapes([len(sample.tokens) for sample in [*samples, *others]], config.batch_tokens)
    counted = np.array([_loss_tokens(data, sample) for sample in samples])
    if not counted.sum():
        raise ValueError("no token to train on: every sample's answers are empty or one token long; check the data")
    lengths = [len(sample.tokens) for sample in samples]
    steps = [
        (epoch, batches)
        for epoch in range(config.epochs)
        for batches in _grouped(epoch_batches(lengths, shapes, config.seed, epoch), config.accumulate)
    ]
    tokens_until = np.cumsum([sum(counted[list(plan.indices)].sum() for plan in batches) for _, batches in steps])

    optimizer = make_optimizer(config, len(steps))
    learning_rate = learning_rate_schedule(config, len(steps))
    accumulates = config.accumulate > 1
    make_step = make_accumulating_step if accumulates else make_train_step
    train_step = make_step(target_config, draft, optimizer, mesh, config, config.shard_optimizer)
    held_out_figures = _make_held_out_figures(target_config, draft, held_out, config, mesh, shapes)
    whole = split_vocabulary(borrow(target_config, target_params), mesh)
    frozen = split_vocabulary(restrict(whole, draft), mesh)
    places = state_shardings(draft, optimizer, mesh, config.shard_optimizer)
    state = jax.tree.map(put, init_state(draft, optimizer, config.seed), places)
    identity = {**identity, **_identity(data, others, shapes, config), "vocabulary": _vocabulary_digest(draft)}

    metrics_path, timings_path = config.out / METRICS, config.out / TIMINGS
    with checkpoint.open_checkpoints(config.out) as checkpoints:
        start = checkpoint.latest_step(checkpoints) or 0
        if start:
            changed = differences(checkpoint.read_identity(checkpoints, start), plain(identity))
            if changed:
                raise ValueError(
                    f"{config.out}: holds a run that was trained on other inputs or options ({changed}); continue it "
                    "with the same ones, or choose another --out"
                )
            state = checkpoint.restore(checkpoints, start, state)
        if is_primary():
            drop_after(metrics_path, start)
            drop_after(timings_path, start)
            checkpoint.drop_best_after(config.out, start)
        wait_for_all("later lines dropped")
        earlier = read_lines(metrics_path) if metrics_path.exists() else []
        best_tau = max((line["probe"]["tau"] for line in earlier if "probe" in line), default=0.0)

        products = 3 if data.known is None else 2
        throughput = Throughput(draft, mesh, np.array(lengths), counted, products, config.hass_steps)
        pending: list[tuple[int, Sequence[BatchPlan], StepMetrics]] = []  # since the last line, figures on the device
        laps = Laps()
        log = append_line if is_primary() else _log_nothing
        with_board = config.tensorboard and is_primary()
        board = open_board(config.out / "tensorboard", start) if with_board else nullcontext(_show_nothing)
        shown = progress and is_primary()
        with board as show, show_progress("train", "steps", len(steps), finished=start, shown=shown) as bar:

            def note(line: dict) -> None:
                log(metrics_path, line)
                show(line)

            for step, (epoch, plans) in enumerate(steps[start:], start + 1):
                with laps.lap("reading"):
                    batches = [device_batch(data, plan.indices, plan.shape, mesh) for plan in plans]
                state, metrics = train_step(frozen, state, batches if accumulates else batches[0])
                pending.append((step, plans, metrics))
                if len(pending) > _STEPS_AHEAD:  # else batches would queue on the device for as long as no one looks
                    jax.block_until_ready(pending[-_STEPS_AHEAD][2])
                epoch_ends = step == len(steps) or steps[step][0] != epoch
                save = step % config.save_every == 0 or step == len(steps)
                # A checkpoint ends a line too: figures that still await theirs are not part of it.
                probes = probe is not None and (step % config.probe_every == 0 or step == len(steps))
                line_ends = step % config.log_every == 0 or epoch_ends or save or probes

                if not line_ends:
                    bar.update(step)
                else:
                    figures = _checked_figures(pending, samples)
                    done, pending = [plan for _, plans, _ in pending for plan in plans], []
                    bar.update(step, figures=f"loss {figures['loss']:.3f}")
                    line = {"step": step, "epoch": epoch, **figures, "learning_rate": float(learning_rate(step - 1))}
                    note({**line, "tokens": int(tokens_until[step - 1])})
                if epoch_ends and others:
                    with laps.lap("held_out"):
                        figures = held_out_figures(whole, state.params)
                    note({"step": step, "epoch": epoch, "held_out": figures})
                if probes:
                    with laps.lap("probe"):
                        figures = probe(state.params)
                    if figures["tau"] > best_tau:
                        best_tau = figures["tau"]
                        checkpoint.save_best(config.out, state, draft, identity)
                    note({"step": step, "epoch": epoch, "probe": figures})
                if line_ends:
                    lap = laps.since_last()
                    log(timings_path, {"step": step, **lap, **throughput.of(done, lap)})
                if save:
                    checkpoint.save(checkpoints, state, draft, identity)

    wait_for_all("trained")
    ends = [line["held_out"] for line in read_lines(metrics_path) if "held_out" in line]
    return TrainResult(
        draft=draft,
        state=state,
        steps=len(steps),
        samples=len(samples),
        tokens=int(tokens_until[-1]),
        seconds=sum(line["seconds"] for line in read_lines(timings_path)),
        held_out=ends[-1] if ends else {},
    )


def _loss_tokens(data: TrainingData, sample: Sample) -> int:
    """Tokens of a sample that the loss visits: the EAGLE pairing needs one more to the left than the score."""
    return int(np.count_nonzero(data.weight(sample)[1:]))


def _grouped(plans: Sequence[BatchPlan], size: int) -> list[tuple[BatchPlan, ...]]:
    """An epoch's batches, `size` to an optimizer step; its last step may have fewer."""
    return [tuple(plans[begin : begin + size]) for begin in range(0, len(plans), size)]


def _log_nothing(path, line: dict) -> None:
    """What processes other than the first log."""


def _show_nothing(line: dict) -> None:
    """What is shown without a board."""


def _checked_figures(
    pending: Sequence[tuple[int, Sequence[BatchPlan], StepMetrics]], samples: Sequence[Sample]
) -> dict[str, float]:
    """Mean figures of the pending steps, after a look whether all of them are finite."""
    fetched = to_host([metrics for _, _, metrics in pending])
    for (step, plans, _), metrics in zip(pending, fetched, strict=True):
        if not (math.isfinite(metrics.sums.total) and math.isfinite(metrics.grad_norm)):
            ids = ", ".join(samples[i].id for plan in plans for i in plan.indices)
            raise FloatingPointError(
                f"step {step}: loss {float(metrics.sums.total)}, gradient norm {float(metrics.grad_norm)}; look at the "
                f"hidden states of its samples ({ids}), or lower --learning-rate"
            )
    grad_norm = float(np.mean([metrics.grad_norm for metrics in fetched], dtype=np.float64))
    return {**mean_figures([metrics.sums for metrics in fetched]), "grad_norm": grad_norm}


def _make_held_out_figures(target_config, draft, held_out: TrainingData, config, mesh, shapes):
    """`(frozen, draft_params) -> figures` of the held-out samples."""
    evaluate_step = make_evaluate_step(target_config, draft, mesh, config)
    plans = make_batches([len(sample.tokens) for sample in held_out.samples], shapes)

    def figures(frozen: Borrowed, draft_params: dict) -> dict[str, float]:
        sums = []
        for plan in plans:
            batch = device_batch(held_out, plan.indices, plan.shape, mesh)
            sums.append(evaluate_step(frozen, draft_params, batch))
        return mean_figures(to_host(sums))

    return figures


def _vocabulary_digest(draft: DraftConfig) -> str | None:
    return hashlib.sha256(np.array(draft.vocabulary, np.int32).tobytes()).hexdigest() if draft.vocabulary else None


def _identity(data: TrainingData, held_out: Sequence[Sample], shapes: Sequence[Shape], config: TrainConfig) -> dict:
    """What the run's bits depend on and `train` can see."""
    names = [field.name for kind in (Recipe, Seeded) for field in dataclasses.fields(kind)]
    return {
        "options": {name: getattr(config, name) for name in names},
        "samples": samples_digest(data.samples),
        "weights": None if data.weights is None else weights_digest(data),
        "held_out": samples_digest(held_out),
        "shapes": [list(shape) for shape in shapes],
    }
