"""Writes a store of hidden states: appends samples, drops them again, and survives a kill at any byte.

A shard is written aside and renamed when it is full, then the manifest is replaced. Killed at any byte, the store keeps all
closed shards, and a new writer goes on after them. A damaged shard may be deleted: the next writer computes its samples anew.

The bytes of a dropped sample stay in the shard. When dropped bytes are too large a share of all, the shard with most of them is
rewritten: its living samples are appended to the open shard, which is closed; the manifest names the new shard in place of the
old; only then is the old one deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jsfdd.base.disk import writing
from jsfdd.base.files import plain
from jsfdd.base.processes import agree, is_primary, several, wait_until_seen
from jsfdd.base.records import Sample
from jsfdd.data.batches import choose_shapes, make_batches, pad_batch
from jsfdd.hidden.rows import RowDtype, encode
from jsfdd.hidden.store import (
    MANIFEST,
    check_belongs,
    check_size,
    check_sum,
    read_manifest,
    samples_of,
    shard_rows,
    write_manifest,
)
from jsfdd.scoring.passes import run_batches

SHARD_BYTES = 256 << 20
_SMALLEST_SHARD = 4 << 10  # about a block of a disk
_MOST_SHARDS = 256
_SHARDS = 32  # the least in a store from which samples are dropped: rewriting a shard takes its size once more
_DEAD_SHARE = 0.1  # dropped bytes per living byte; a smaller share would rewrite more for each byte it frees


def large_shard_bytes(store_bytes: float) -> int:
    """The size at which shards of a large store are closed, so that there are few: each one writes the manifest anew."""
    return int(max(SHARD_BYTES, store_bytes / _MOST_SHARDS))


def moderate_shard_bytes(store_bytes: float) -> int:
    """The size at which shards are closed in a store from which samples are dropped."""
    return int(min(large_shard_bytes(store_bytes), max(_SMALLEST_SHARD, store_bytes / _SHARDS)))


@dataclasses.dataclass
class _Shard:
    """A shard while its samples come and go. `samples`: (name or None if dropped, tokens), in the order of the file."""

    file: str
    sha256: str
    samples: list[tuple[str | None, int]]
    dead: int = 0  # tokens of dropped samples

    def drop(self, index: int) -> None:
        length = self.samples[index][1]
        self.samples[index] = (None, length)
        self.dead += length


class HiddenWriter:
    """Appends samples to a store, or starts one; use it in a `with`.

    Several processes may append samples at the same time: each writes shards and a manifest of its own, and process 0 puts
    them together when all have closed, or at the next start if a run was killed. Samples may be dropped only when there is
    one process.

    Args:
      directory: of the store; made if missing.
      hidden_size: D, of all parts together.
      dtype: in which hidden states are kept; bfloat16 takes half the disk of float32, int8 about a quarter.
      identity: JSON-ready; what the hidden states depend on. A store of another identity is refused.
      shard_bytes: a shard is closed once it is this large; a kill loses less than that.
      kept_for: JSON-ready: the rule by which samples are kept, or None for all samples. A store of another rule is refused.
      layers: the target's layers whose inputs stand in front of its final state. A store of others is refused.

    Raises:
      ValueError: the directory holds another store or a damaged one; the message names the difference and the remedy.
    """

    def __init__(
        self,
        directory: Path,
        hidden_size: int,
        dtype: RowDtype,
        identity: dict,
        shard_bytes: int = SHARD_BYTES,
        kept_for: dict | None = None,
        layers: tuple[int, ...] = (),
    ):
        self._directory, self._shard_bytes = Path(directory), shard_bytes
        self._directory.mkdir(parents=True, exist_ok=True)
        self._head = {"dtype": dtype, "hidden_size": hidden_size, "identity": plain(identity), "kept_for": plain(kept_for)}
        if layers:
            self._head["layers"] = list(layers)
        if is_primary():
            self._take_over()
        wait_until_seen(self._written_as_one())
        merged = read_manifest(self._directory / MANIFEST)
        stored = {name for shard in merged["shards"] for name, _ in shard["samples"] if name is not None}
        agree({"the hidden states that an earlier call left": sorted(stored)})
        self._next = max((int(shard["file"][6:-4]) for shard in merged["shards"]), default=-1) + 1
        self._next += (jax.process_index() - self._next) % jax.process_count()
        self._closed: list[_Shard] = []
        # sample -> (shard, number in it). Shards of earlier calls belong to process 0.
        self._place: dict[str, tuple[_Shard, int]] = dict.fromkeys(stored)
        if is_primary():
            for facts in merged["shards"]:
                shard = _Shard(facts["file"], facts["sha256"], [tuple(sample) for sample in facts["samples"]])
                shard.dead = sum(length for name, length in shard.samples if name is None)
                self._closed.append(shard)
                self._place |= {name: (shard, i) for i, (name, _) in enumerate(shard.samples) if name is not None}
        self._open = _Shard("", "", [])  # gets a name when it is closed
        self._tokens = sum(length for shard in self._closed for _, length in shard.samples)
        self._dead = sum(shard.dead for shard in self._closed)
        self._stream = None  # the open shard's file, from the first sample on
        self._unsaved = False  # whether a drop is not in the manifest yet
        self._sha = hashlib.sha256()

    @property
    def ids(self) -> Collection[str]:
        """The samples that are stored or in the open shard."""
        return self._place.keys()

    def add(self, sample_id: str, hidden: Float[np.ndarray, "T D"]) -> None:
        """Append a new sample's hidden states. ValueError if it is not new, or they are misshapen or not finite."""
        if sample_id in self._place:
            raise ValueError(f"sample {sample_id} is already in {self._directory}")
        hidden, width = np.asarray(hidden), self._head["hidden_size"]
        if hidden.ndim != 2 or hidden.shape[1] != width:
            raise ValueError(f"sample {sample_id}: hidden states of shape {hidden.shape} in a store of [T, {width}]")
        if not np.isfinite(hidden).all():
            raise ValueError(f"sample {sample_id}: the target's hidden states are not finite; check its weights")
        self._append(sample_id, encode(hidden, self._head["dtype"], len(self._head.get("layers", ())) + 1))
        if self._stream.tell() >= self._shard_bytes:
            self._close_shard()

    def add_missing(self, samples: Sequence[Sample], hidden: Sequence[Float[np.ndarray, "T D"]]) -> None:
        """Append the samples of a batch that are not there yet; hidden[b] belongs to samples[b], right-padded."""
        for sample, states in zip(samples, hidden):
            if sample.id not in self._place:
                self.add(sample.id, states[: len(sample.tokens)])

    def drop(self, sample_ids: Iterable[str]) -> None:
        """Drop samples from the store, and free their disk space once it exceeds a tenth of what stays."""
        for sample_id in sample_ids:
            shard, index = self._place.pop(sample_id)
            shard.drop(index)
            self._dead += shard.samples[index][1]
            self._unsaved = True
        while self._dead > _DEAD_SHARE * (self._tokens - self._dead):
            emptiest = max(self._closed, key=lambda shard: shard.dead, default=None)
            if emptiest is None or not emptiest.dead:
                self._close_shard()  # all dropped bytes are in the open shard
            else:
                self._rewrite(emptiest)

    def save(self) -> None:
        """Close the open shard: everything that this process added and dropped is then in the store."""
        if self._stream is not None:
            self._close_shard()
        elif self._unsaved:
            self._write_own_manifest()

    def close(self) -> None:
        """Everything added, by any process, is then in the store. Waits for all processes."""
        self.save()
        if several():
            wait_until_seen(self._directory / name for name in (self._own_manifest, *(shard.file for shard in self._closed)))
            if is_primary():
                self._take_over()
            wait_until_seen(self._written_as_one())

    def __enter__(self) -> HiddenWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if self._stream is not None:  # the shard may be cut short and the disk full, so free its space
                with contextlib.suppress(OSError):  # closing writes what is left, which fails again
                    self._stream.close()
                self._aside.unlink(missing_ok=True)

    def _written_as_one(self) -> list[Path]:
        return [self._directory / MANIFEST] if is_primary() else []

    @property
    def _own_manifest(self) -> str:
        return MANIFEST if is_primary() else f"manifest-{jax.process_index()}.json"

    @property
    def _aside(self) -> Path:
        return self._directory / f"open-shard-{jax.process_index()}.tmp"

    def _append(self, sample_id: str, rows: np.ndarray) -> None:
        if self._stream is None:
            self._stream = self._aside.open("wb")
        data = np.ascontiguousarray(rows)
        with writing(self._directory, data.nbytes):
            self._stream.write(data)
        self._sha.update(data)
        self._place[sample_id] = self._open, len(self._open.samples)
        self._open.samples.append((sample_id, len(rows)))
        self._tokens += len(rows)

    def _rewrite(self, shard: _Shard) -> None:
        """Append a closed shard's living samples to the open one, close that, and delete the shard."""
        if shard.dead < sum(length for _, length in shard.samples):
            facts = dataclasses.asdict(shard)
            rows = shard_rows(self._directory, self._head, facts)
            check_sum(self._directory, facts, rows)  # otherwise a damaged byte would get a valid checksum
            for sample_id, sample_rows in samples_of(facts, rows).items():
                self._append(sample_id, sample_rows)
        self._closed.remove(shard)
        self._tokens -= sum(length for _, length in shard.samples)
        self._dead -= shard.dead
        if self._stream is not None:
            self._close_shard()
        else:
            self._write_own_manifest()
        (self._directory / shard.file).unlink()

    def _take_over(self) -> None:
        """Merge all manifests into one, without shards that are gone, and delete what a kill left outside of them."""
        parts = sorted(self._directory.glob("manifest-*.json"))
        whole = [self._directory / MANIFEST] if (self._directory / MANIFEST).exists() else []
        shards = {}
        for path in [*whole, *parts]:
            manifest = read_manifest(path)
            check_belongs(self._directory, manifest, self._head)
            for shard in manifest["shards"]:
                if (self._directory / shard["file"]).exists():
                    check_size(self._directory, manifest, shard)
                    shards[shard["file"]] = shard
        write_manifest(self._directory / MANIFEST, {**self._head, "shards": [shards[name] for name in sorted(shards)]})
        orphans = [path for path in self._directory.glob("shard-*.bin") if path.name not in shards]
        for path in [*parts, *self._directory.glob("open-shard*.tmp"), *orphans]:
            path.unlink()

    def _close_shard(self) -> None:
        shard, self._open = self._open, _Shard("", "", [])
        shard.file, shard.sha256 = f"shard-{self._next:05d}.bin", self._sha.hexdigest()
        self._next += jax.process_count()
        with writing(self._directory / shard.file, self._stream.tell()):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._aside.replace(self._directory / shard.file)
        self._closed.append(shard)
        self._stream, self._sha = None, hashlib.sha256()
        self._write_own_manifest()

    def _write_own_manifest(self) -> None:
        shards = [{"file": shard.file, "sha256": shard.sha256, "samples": shard.samples} for shard in self._closed]
        write_manifest(self._directory / self._own_manifest, {**self._head, "shards": shards})
        self._unsaved = False


def write_missing(
    writer: HiddenWriter,
    step: Callable,
    params: Any,
    samples: Sequence[Sample],
    mesh: Mesh,
    *,
    batch_tokens: int,
    label: str,
    progress: bool = True,
    build: Callable = pad_batch,
) -> None:
    """Compute and append a row for each token of the samples that the store lacks: `step(params, batch) -> [B, T, row]`.

    Args:
      batch_tokens: tokens of a batch, padding included.
      step, params, label, progress, build: as in `passes.run_batches`.
    """
    lengths = [len(sample.tokens) for sample in samples]
    plans = make_batches(lengths, choose_shapes(lengths, batch_tokens))
    missing = [plan for plan in plans if any(samples[i].id not in writer.ids for i in plan.indices)]
    finished = len(plans) - len(missing)
    for batch, rows in run_batches(
        step, params, samples, missing, mesh, label=label, finished=finished, progress=progress, build=build
    ):
        writer.add_missing(batch, rows)
