"""Three sources of hidden states: the scoring pass, a separate pass, or the target at every training step.

with keep_hidden(target, possible, directory=…, identity={…}, kept_for={…}) as keeper:
    score_samples(target, samples, mesh, keeper=keeper)              # one pass: scores, and hidden states of what stays
store = store_hidden(target, samples, mesh, directory=…)             # a pass of its own, for samples known beforehand
hidden_of = make_recompute(target, mesh, "bfloat16")                 # batch -> hidden states, on the devices
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jsfdd.base.mesh import map_over_devices
from jsfdd.base.processes import several
from jsfdd.base.records import Batch, Sample
from jsfdd.hidden.best_k import StillPossible
from jsfdd.hidden.rows import HiddenDtype, row_bytes
from jsfdd.hidden.store import HiddenStore
from jsfdd.hidden.writer import HiddenWriter, large_shard_bytes, moderate_shard_bytes, write_missing
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.foreign import ForeignTarget, foreign_hidden
from jsfdd.models.sharding import place_params
from jsfdd.models.target import hidden_states
from jsfdd.scoring.table import ScoreTable

if TYPE_CHECKING:
    from jsfdd.weights.target import Target  # brings transformers

_DeviceDtype = Literal["bfloat16", "float32"]


class HiddenKeeper:
    """Keeps the hidden states of a scoring pass for the samples that can still be selected. Made by `keep_hidden`.

    Attributes:
      device_dtype: the dtype in which it wants them from the device.
      layers: the target's layers whose inputs it wants in front of the final state.
    """

    def __init__(self, writer: HiddenWriter, possible: StillPossible, device_dtype: _DeviceDtype, layers: tuple[int, ...] = ()):
        self._writer, self._possible, self.device_dtype, self.layers = writer, possible, device_dtype, layers

    def resume(self, tables: Sequence[ScoreTable]) -> None:
        """Go on after the scores of an earlier call.

        Stored samples whose scores were lost are dropped: they are computed again in any case, and so the store never holds
        more than the known scores allow.
        """
        for table in tables:
            self._possible.score(table)
        self._writer.drop([name for name in self._writer.ids if name not in self._possible])

    def lacks(self, samples: Sequence[Sample]) -> bool:
        """Whether one of these samples may still be selected and is not stored."""
        return any(sample.id in self._possible and sample.id not in self._writer.ids for sample in samples)

    def keep(self, samples: Sequence[Sample], scores: ScoreTable | None, hidden: Sequence[Float[np.ndarray, "T S"]]) -> None:
        """Add a batch, right-padded, with row b for samples[b]; `scores` are None if an earlier call computed them."""
        if scores is not None:
            fallen = self._possible.score(scores)
            self._writer.drop([name for name in fallen if name in self._writer.ids])
        wanted = [b for b, sample in enumerate(samples) if sample.id in self._possible]
        self._writer.add_missing([samples[b] for b in wanted], [hidden[b] for b in wanted])

    def save(self) -> None:
        """Put on disk what it keeps so far."""
        self._writer.save()


@contextmanager
def keep_hidden(
    target: Target | ForeignTarget,
    possible: StillPossible,
    *,
    directory: Path,
    identity: dict,
    kept_for: dict,
    dtype: HiddenDtype = "bfloat16",
    layers: tuple[int, ...] = (),
) -> Iterator[HiddenKeeper]:
    """Keep hidden states during one scoring pass; the store in `directory` is complete when the block ends.

    Args:
      target: of the pass.
      possible: what may be selected; a fresh one.
      directory, identity, kept_for, dtype, layers: as in `HiddenWriter`.

    Raises:
      ValueError: as in `HiddenWriter`, or there are several processes, of which none would know the others' scores.
    """
    if several():
        raise ValueError(
            "what can still be selected is only known where all scores are: keep hidden states with one process, or leave "
            "--keep-hidden out, and `jsfdd train` computes them for what was selected"
        )
    parts = len(layers) + 1
    width = parts * target.config.hidden_size
    shard_bytes = moderate_shard_bytes(possible.expected_tokens * row_bytes(dtype, width, parts))
    with HiddenWriter(directory, width, dtype, identity, shard_bytes, kept_for, layers) as writer:
        yield HiddenKeeper(writer, possible, _device_dtype(dtype), layers)


@functools.lru_cache(maxsize=8)
def make_hidden_step(config: DecoderConfig, mesh: Mesh, dtype: _DeviceDtype, layers: tuple[int, ...] = ()) -> Callable:
    """Compile `(params, Batch) -> hidden [B, T, S]` in `dtype`: as `models.target.hidden_states`."""

    def step(params: dict, batch: Batch):
        return hidden_states(config, params, batch.tokens, layers).astype(dtype)

    return map_over_devices(step, mesh)


def make_recompute(
    target: Target | ForeignTarget, mesh: Mesh, dtype: _DeviceDtype, layers: tuple[int, ...] = ()
) -> Callable[[Batch], Float[jax.Array, "B T S"]]:
    """`batch -> hidden` in `dtype`: the target computes the hidden states of a batch anew, and they never leave the devices.

    The call returns before they are computed, so a caller that goes on to its own step keeps the devices busy. The batch's
    rows are split over the data axis. The result is to the bit what a store in `dtype` holds if that was computed in
    batches of the same shape per device; otherwise it differs by rounding. The streams that enter `layers` stand in front of
    the final state.
    """
    if isinstance(target, ForeignTarget):
        return lambda batch: foreign_hidden(target, batch, mesh, layers).astype(dtype)
    return functools.partial(make_hidden_step(target.config, mesh, dtype, layers), place_params(target.params, mesh))


def store_hidden(
    target: Target | ForeignTarget,
    samples: Sequence[Sample],
    mesh: Mesh,
    *,
    batch_tokens: int = 4096,
    directory: Path,
    identity: dict | None = None,
    dtype: HiddenDtype = "bfloat16",
    layers: tuple[int, ...] = (),
    shard_bytes: int | None = None,
    progress: bool = True,
) -> HiddenStore:
    """The store in `directory` with the hidden states of all samples, after computing the missing ones.

    Args: as in `HiddenWriter` and `score.score_samples`. Errors as in `HiddenWriter`.
    """
    identity = {"target": target.fingerprint} if identity is None else identity
    hidden_of = make_recompute(target, mesh, _device_dtype(dtype), layers)
    width, parts = (len(layers) + 1) * target.config.hidden_size, len(layers) + 1
    if shard_bytes is None:
        shard_bytes = large_shard_bytes(sum(len(sample.tokens) for sample in samples) * row_bytes(dtype, width, parts))
    with HiddenWriter(directory, width, dtype, identity, shard_bytes, layers=layers) as writer:
        write_missing(
            writer, lambda _, batch: hidden_of(batch), None, samples, mesh,
            batch_tokens=batch_tokens, label="hidden states", progress=progress,
        )  # fmt: skip
    return HiddenStore.open(directory, identity)


def _device_dtype(dtype: HiddenDtype) -> _DeviceDtype:
    """The dtype to which the device rounds. int8 is made on the host, from float32."""
    return "float32" if dtype == "int8" else dtype
