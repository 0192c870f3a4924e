"""Score all samples with the target: data-parallel, resumable, and without a [tokens, vocabulary] array of a whole batch.

table = score_samples(target, samples, mesh, parts_dir=out / "scores.parts")
write_scores(out / "scores.parquet", table)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jsfdd.base.files import plain
from jsfdd.base.mesh import map_over_devices, num_data_shards
from jsfdd.base.processes import several
from jsfdd.base.records import Batch, Sample, TokenScores, samples_digest
from jsfdd.base.tuning import scoring_block
from jsfdd.data.batches import BatchPlan, Shape, choose_shapes, make_batches, pad_batch, pad_rows
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.foreign import ForeignTarget, foreign_hidden
from jsfdd.models.sharding import place_params
from jsfdd.models.target import final_state, hidden_states
from jsfdd.scoring.flatness import score_hidden
from jsfdd.scoring.metrics import METRICS, column_names
from jsfdd.scoring.parts import Parts
from jsfdd.scoring.passes import run_batches, spread_out
from jsfdd.scoring.prompt_state import SIZE, prompt_lengths, prompt_states
from jsfdd.scoring.table import ScoreTable, TokenRow

if TYPE_CHECKING:
    from jsfdd.weights.target import Target  # imports transformers, which is slow


class Keeper(Protocol):
    """Stores the hidden states that a scoring pass computes (`hidden.capture.HiddenKeeper`)."""

    device_dtype: Literal["bfloat16", "float32"]
    layers: tuple[int, ...]

    def resume(self, tables: Sequence[ScoreTable]) -> None:
        """Continue after the scores of an earlier call."""

    def lacks(self, samples: Sequence[Sample]) -> bool:
        """Whether hidden states that it should store are missing for any of these samples."""

    def keep(self, samples: Sequence[Sample], scores: ScoreTable | None, hidden: np.ndarray) -> None:
        """Store a batch, row b for samples[b], right-padded; `scores` is None if an earlier call computed them."""


@functools.lru_cache(maxsize=8)
def make_score_step(
    config: DecoderConfig,
    mesh: Mesh,
    *,
    hidden_dtype: Literal["bfloat16", "float32"] | None = None,
    layers: tuple[int, ...] = (),
    block: int | None = None,
) -> Callable:
    """Compile the scoring of one batch: `(params, Batch) -> (TokenScores [B, T], prompts [B, P], hidden [B, T, S] or None)`.

    Every device runs the head on the counted tokens of its own rows, so there is no communication. The step traces once
    for each shape of a batch.

    Args:
      config: the target's architecture.
      mesh: its data axis must divide the batch's rows.
      hidden_dtype: also return the hidden states after the final norm, in this dtype.
      layers: with the streams that enter these layers in front of them.
      block: as in `score_hidden`; by default a size that suits the mesh's devices.
    """
    block = block or _block(mesh)

    def step(params: dict, batch: Batch) -> tuple[TokenScores, jax.Array, jax.Array | None]:
        hidden = hidden_states(config, params, batch.tokens, layers)
        final = final_state(config, hidden)
        scores = score_hidden(config, params, final, _next_tokens(batch), batch.counted, block)
        return (
            scores,
            prompt_states(final, prompt_lengths(batch.counted)),
            None if hidden_dtype is None else hidden.astype(hidden_dtype),
        )

    return map_over_devices(step, mesh)


@functools.lru_cache(maxsize=8)
def make_head_step(config: DecoderConfig, mesh: Mesh) -> Callable:
    """Compile `(params, (Batch, hidden [B, T, S])) -> (TokenScores [B, T], prompts [B, P])`, from given hidden states."""
    block = _block(mesh)

    def step(params: dict, batch: tuple[Batch, jax.Array]) -> tuple[TokenScores, jax.Array]:
        batch, hidden = batch
        final = final_state(config, hidden)
        scores = score_hidden(config, params, final, _next_tokens(batch), batch.counted, block)
        return scores, prompt_states(final, prompt_lengths(batch.counted))

    return map_over_devices(step, mesh)


def _choose_step(
    target: Target | ForeignTarget, mesh: Mesh, keeper: Keeper | None, hidden: Mapping[str, np.ndarray] | None
) -> tuple[Callable, Callable]:
    """(step, build) for `run_batches`: the whole target, or its head alone where hidden states are given."""
    hidden_dtype, layers = (None, ()) if keeper is None else (keeper.device_dtype, keeper.layers)
    if hidden is not None:
        return _stored_step(target, hidden, mesh)
    if isinstance(target, ForeignTarget):
        return _foreign_step(target, mesh, hidden_dtype, layers), pad_batch
    return make_score_step(target.config, mesh, hidden_dtype=hidden_dtype, layers=layers), pad_batch


def _foreign_step(target: ForeignTarget, mesh: Mesh, hidden_dtype, layers: tuple[int, ...]) -> Callable:
    """`make_score_step` for a foreign target, in two programs: its own computes hidden states, ours scores them."""
    head_step = make_head_step(target.config, mesh)

    def step(params: dict, batch: Batch) -> tuple[TokenScores, jax.Array, jax.Array | None]:
        hidden = foreign_hidden(target, batch, mesh, layers)
        return *head_step(params, (batch, hidden)), None if hidden_dtype is None else hidden.astype(hidden_dtype)

    return step


def _stored_step(target: Target | ForeignTarget, hidden: Mapping[str, np.ndarray], mesh: Mesh) -> tuple[Callable, Callable]:
    """(step, build) for `run_batches` when hidden states are given."""
    head_step = make_head_step(target.config, mesh)

    def build(samples: Sequence[Sample], shape: Shape) -> tuple[Batch, np.ndarray]:
        for sample in samples:
            present = hidden[sample.id].shape if sample.id in hidden else None
            # Streams for an EAGLE-3 draft may precede the final state; only the final state is scored.
            if present is None or present[0] != len(sample.tokens) or present[1] % target.config.hidden_size:
                raise ValueError(
                    f"sample {sample.id}: hidden states [{len(sample.tokens)}, {target.config.hidden_size}] are needed, "
                    f"found {present or 'nothing'}; compute them for the same tokens with the same target"
                )
        return pad_batch(samples, shape), pad_rows([hidden[sample.id] for sample in samples], shape)

    return lambda params, batch: (*head_step(params, batch), None), build


def _block(mesh: Mesh) -> int:
    return scoring_block(mesh.devices.flat[0].platform)


def _next_tokens(batch: Batch) -> jax.Array:
    return jnp.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))


def score_samples(
    target: Target | ForeignTarget,
    samples: Sequence[Sample],
    mesh: Mesh,
    *,
    batch_tokens: int = 4096,
    identity: dict | None = None,
    parts_dir: Path | None = None,
    per_token: bool = False,
    keeper: Keeper | None = None,
    hidden: Mapping[str, np.ndarray] | None = None,
    progress: bool = True,
    seconds_per_part: float = 20.0,
) -> ScoreTable:
    """Score every sample, continuing from the parts that an interrupted call left in `parts_dir`.

    A sample's scores do not depend on the other samples of its batch. An interrupted and continued call gives the same bits
    as an uninterrupted one, on any number of data shards and processes; only a model axis changes the order of sums. In the
    end the parts hold the whole table, so a further call computes nothing. With several processes, each writes its own
    parts, and all return the whole table.

    Args:
      target: from `load_target` or `foreign_target`.
      samples: at least one, with unique ids.
      mesh: devices that share the batches.
      batch_tokens: tokens of a batch, padding included; every device takes one batch at a time.
      identity: JSON-ready: what the scores depend on besides the other arguments, by default the target's fingerprint. The
        table stores it with a hash of the samples; parts of another identity are refused.
      parts_dir: where finished batches are stored; if None, a new call starts from the beginning. With several processes,
        all of them must see it. Scores in its given.parquet, which came with the answers, are taken as they are.
      per_token: keep per-token scores in the table.
      keeper: stores hidden states of samples that may still be selected; use a new one for each call.
      hidden: the hidden states of all samples by id, [T, D] each, after the final norm: a `HiddenStore` or any mapping to
        arrays. Given these, only the target's head runs.
      progress: show a bar with tokens per second.
      seconds_per_part: about how much work an interruption may lose.

    Raises:
      ValueError: there is no sample, `parts_dir` holds parts of another identity, or a score is not finite; names the
        sample and the remedy.
    """
    _check_call(samples, parts_dir, keeper, hidden)
    identity = {"target": target.fingerprint} if identity is None else identity
    identity = identity_of_scores(identity, samples, mesh, batch_tokens, per_token)
    parts = Parts(parts_dir, identity, seconds_per_part)
    plans = _plans(samples, parts.given, mesh, batch_tokens)
    if keeper is not None:
        keeper.resume(parts.tables)

    def is_finished(plan: BatchPlan) -> bool:
        batch = [samples[i] for i in plan.indices]
        return not parts.lack(batch) and (keeper is None or not keeper.lacks(batch))

    remaining = [plan for plan in plans if not is_finished(plan)]
    step, build = _choose_step(target, mesh, keeper, hidden)
    for batch, (scores, prompts, states) in run_batches(
        step, place_params(target.params, mesh), samples, remaining, mesh,
        label="score", finished=len(plans) - len(remaining), progress=progress, build=build,
    ):  # fmt: skip
        # Of a batch that an earlier call scored, only the hidden states were lost.
        table = summarise(batch, scores, prompts, per_token, identity) if parts.lack(batch) else None
        if keeper is not None:
            keeper.keep(batch, table, states)
        if table is not None:
            parts.add(table)
    return parts.whole([sample.id for sample in samples])


def identity_of_scores(
    identity: dict, samples: Sequence[Sample], mesh: Mesh, batch_tokens: int = 4096, per_token: bool = False
) -> dict:
    """All that the scores of `score_samples` with these arguments depend on. Batch shapes and model shards affect rounding, so
    parts made with others are refused."""
    return plain(identity) | {
        "samples": samples_digest(samples), "batch_tokens": batch_tokens, "model_shards": mesh.shape["model"],
        "per_token": per_token, "prompt_state": SIZE,
    }  # fmt: skip


def _plans(samples: Sequence[Sample], given: Collection[str], mesh: Mesh, batch_tokens: int) -> list[BatchPlan]:
    """The batches of the samples whose scores are not given, and then those of the others, which may lack hidden states."""
    lengths = np.array([len(sample.tokens) for sample in samples])
    is_given = np.array([sample.id in given for sample in samples])
    plans = []
    for rows in (np.flatnonzero(~is_given), np.flatnonzero(is_given)):
        batches = make_batches(lengths[rows], choose_shapes(lengths[rows], batch_tokens))
        # The order does not affect the scores; interleaved, a keeper's store grows evenly.
        for plan in spread_out(batches, num_data_shards(mesh)):
            plans.append(plan._replace(indices=tuple(rows[list(plan.indices)].tolist())))
    return plans


def _check_call(samples: Sequence[Sample], parts_dir: Path | None, keeper: Keeper | None, hidden: Mapping | None) -> None:
    if not samples:
        raise ValueError("there is no sample to score; check the data")
    if keeper is not None and hidden is not None:
        raise ValueError("hidden states that are stored need no keeper")
    if several() and parts_dir is None:
        raise ValueError("several processes can only put their scores together in a parts_dir")


def summarise(
    samples: Sequence[Sample], scores: TokenScores, prompts: np.ndarray, per_token: bool, identity: dict
) -> ScoreTable:
    """Make the table of one batch, row b for samples[b]; `scores` [B, T] and `prompts` [B, P] may have more rows."""
    columns = {name: np.full(len(samples), np.nan) for name in column_names()}
    rows = []
    for b, sample in enumerate(samples):
        counted = sample.counted
        tokens = TokenScores(*[values[b, : len(counted)] for values in scores])
        rows.append(TokenRow(counted, tokens.flatness.copy(), tokens.entropy.copy()))
        if counted.any():
            visited = {name: values[counted].astype(np.float64) for name, values in tokens._asdict().items()}
            _check_finite(sample, visited)
            if not np.isfinite(prompts[b]).all():
                raise ValueError(
                    f"sample {sample.id}: the target's hidden states of the prompt are not finite; check its weights"
                )
            for name, column in columns.items():
                column[b] = METRICS[name].aggregate(visited[METRICS[name].token_score])
    return ScoreTable(
        ids=tuple(sample.id for sample in samples),
        sources=tuple(sample.source for sample in samples),
        num_tokens=np.array([row.counted.sum() for row in rows], np.int32),
        metrics=columns,
        identity=identity,
        tokens=tuple(rows) if per_token else None,
        prompt_states=np.asarray(prompts[: len(samples)], np.float32),
    )


def _check_finite(sample: Sample, visited: dict[str, np.ndarray]) -> None:
    """Raise ValueError, naming the token, if a score of a counted token is not finite."""
    for name, values in visited.items():
        broken = ~np.isfinite(values)
        if broken.any():
            raise ValueError(
                f"sample {sample.id}: {name} at token {np.flatnonzero(sample.counted)[broken][0]} is not a finite number, so "
                "the target's logits are broken there; check its weights, and try --dtype float32"
            )
