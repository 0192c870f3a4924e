"""Where a draft's hidden states come from: the scoring pass, which keeps what can be selected, a pass of its own, or no store.

    with keep_features(config, stays, directory=…, identity={…}, kept_for={…}) as keeper:
        score_samples(…, keeper=keeper)                       # one pass of the target: scores, and features of what stays
    store = store_hidden(config, params, samples, mesh, batch_tokens=4096, directory=…, identity={…})
    hidden_of = make_recompute(config, params, mesh, "bfloat16")                      # batch -> hidden states on the device
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jsfdd.base.mesh import map_over_devices
from jsfdd.base.processes import several
from jsfdd.base.records import Batch, Sample
from jsfdd.data.batches import choose_shapes, make_batches
from jsfdd.hidden.best_k import StillPossible
from jsfdd.hidden.rows import FeatureDtype, row_bytes
from jsfdd.hidden.store import HiddenStore
from jsfdd.hidden.writer import SHARD_BYTES, HiddenWriter, moderate_shard_bytes
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.sharding import place_params
from jsfdd.models.target import hidden_states
from jsfdd.scoring.passes import run_batches
from jsfdd.scoring.table import ScoreTable

_DeviceDtype = Literal["bfloat16", "float32"]


class FeatureKeeper:
    """Of the batches of a scoring pass, keeps the hidden states that can still be selected. Made by `keep_features`.

    Attributes:
      device_dtype: in which it wants them from the device.
    """

    def __init__(self, writer: HiddenWriter, stays: StillPossible, device_dtype: _DeviceDtype):
        self._writer, self._stays, self.device_dtype = writer, stays, device_dtype

    def resume(self, tables: Sequence[ScoreTable]) -> None:
        """Go on behind the scores of an earlier call, which had come at least so far.

        What it stored of samples whose scores were lost is dropped: they are computed again in any case, and the store
        never holds more than the scores that are known allow.
        """
        for table in tables:
            self._stays.score(table)
        self._writer.drop([name for name in self._writer.ids if name not in self._stays])

    def lacks(self, samples: Sequence[Sample]) -> bool:
        """Whether samples that may be selected, by the scores so far, are not stored."""
        return any(sample.id in self._stays and sample.id not in self._writer.ids for sample in samples)

    def keep(self, samples: Sequence[Sample], scores: ScoreTable | None, hidden: Float[np.ndarray, "B T D"]) -> None:
        """Take a batch: row b is samples[b]'s, right-padded; `scores` are None where they were known before."""
        if scores is not None:
            gone = self._stays.score(scores)
            self._writer.drop([name for name in gone if name in self._writer.ids])
        for sample, states in zip(samples, hidden):
            if sample.id in self._stays and sample.id not in self._writer.ids:
                self._writer.add(sample.id, states[: len(sample.tokens)])


@contextmanager
def keep_features(
    config: DecoderConfig,
    stays: StillPossible,
    *,
    directory: Path,
    identity: dict,
    kept_for: dict,
    dtype: FeatureDtype = "bfloat16",
) -> Iterator[FeatureKeeper]:
    """A keeper of features for one scoring pass; what it keeps is in the store in `directory` when the block ends.

    Args:
      config: the target's.
      stays: what may be selected; fresh.
      directory, identity, kept_for, dtype: as in `HiddenWriter`.

    Raises:
      ValueError: as in `HiddenWriter`, or there are several processes, none of which would know the others' scores.
    """
    if several():
        raise ValueError(
            "what can still be selected is only known where all scores are: keep features with one process, or leave "
            "--keep-features out, and `jsfdd train` computes them for what was selected"
        )
    size = stays.expected_tokens * row_bytes(dtype, config.hidden_size)
    with HiddenWriter(directory, config.hidden_size, dtype, identity, moderate_shard_bytes(size), kept_for) as writer:
        yield FeatureKeeper(writer, stays, _device_dtype(dtype))


def make_hidden_step(config: DecoderConfig, mesh: Mesh, dtype: _DeviceDtype) -> Callable:
    """Compile `(params, Batch) -> hidden [B, T, D]` in `dtype`, after the final norm. Build it once."""

    def step(params: dict, batch: Batch):
        return hidden_states(config, params, batch.tokens).astype(dtype)

    return map_over_devices(step, mesh)


def make_recompute(
    config: DecoderConfig, params: dict, mesh: Mesh, dtype: _DeviceDtype
) -> Callable[[Batch], Float[jax.Array, "B T D"]]:
    """`batch -> hidden` in `dtype`: the target computes a batch's hidden states anew, and they never leave the devices.

    The call returns before they are computed, so a caller that goes on to its own step keeps the devices busy. The batch's
    rows are split over the data axis. To the bit what a store in `dtype` holds, where that was computed in batches of the
    same shape a device; else but for rounding.
    """
    return functools.partial(make_hidden_step(config, mesh, dtype), place_params(params, mesh))


def store_hidden(
    config: DecoderConfig,
    params: dict,
    samples: Sequence[Sample],
    mesh: Mesh,
    *,
    batch_tokens: int,
    directory: Path,
    identity: dict,
    dtype: FeatureDtype = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> HiddenStore:
    """The store in `directory` with the hidden states of all samples, after computing those it lacks.

    Args: as in `HiddenWriter` and `score.score_samples`. Errors as in `HiddenWriter`.
    """
    lengths = [len(sample.tokens) for sample in samples]
    plans = make_batches(lengths, choose_shapes(lengths, batch_tokens))
    with HiddenWriter(directory, config.hidden_size, dtype, identity, shard_bytes) as writer:
        missing = [plan for plan in plans if any(samples[i].id not in writer.ids for i in plan.indices)]
        batches = run_batches(
            make_hidden_step(config, mesh, _device_dtype(dtype)), place_params(params, mesh), samples, missing, mesh,
            label="hidden states", finished=len(plans) - len(missing), progress=progress,
        )  # fmt: skip
        for batch, hidden in batches:
            writer.add_missing(batch, hidden)
    return HiddenStore.open(directory, identity)


def _device_dtype(dtype: FeatureDtype) -> _DeviceDtype:
    """What the device rounds to: int8 is made on the host, of what was not rounded before."""
    return "float32" if dtype == "int8" else dtype
