"""A store of the target's hidden states for the samples that stay: sharded, checksummed, memory-mapped.

    DIR/shard-00000.bin   hidden states of many samples, [tokens, D], little-endian, one after the other
    DIR/manifest.json     what they belong to; of each shard its samples, their tokens, and its sha256
    DIR/manifest-1.json   the shards of process 1, where several write, until process 0 has taken them over

A shard is written aside and renamed when it is full, then the manifest is replaced: killed at any byte, the store keeps
all of its closed shards, and a new writer goes on behind them. A damaged shard may be deleted: the next writer takes
its samples for missing.

    store = store_hidden(config, params, samples, mesh, batch_tokens=4096, directory=…, identity={…})
    store["sample id"]                                                        # [T, D], read when it is touched
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jsfdd.data.batches import choose_shapes, make_batches
from jsfdd.files import differences, plain, written_whole
from jsfdd.mesh import map_over_devices
from jsfdd.models.architecture import DecoderConfig
from jsfdd.models.sharding import place_params
from jsfdd.models.target import hidden_states
from jsfdd.processes import agree, is_primary, several, wait_for_all
from jsfdd.records import Batch, Sample
from jsfdd.selection.run import run_batches

MANIFEST = "manifest.json"
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype("<f4")}
_SHARD_NAME = re.compile(r"shard-\d{5,}\.bin")
_SHARD_BYTES = 256 << 20
_DELETE_ALL = "delete the directory and store again, or choose another"
_DELETE_SHARD = "delete this shard and store again: only its samples are computed anew"


class HiddenWriter:
    """Appends samples to a store, or starts one; use it in a `with`.

    Several processes may each append their own samples at the same time: each writes shards and a manifest of its own,
    and process 0 puts them together when all have closed, or at the next start where a run was killed.

    Args:
      directory: of the store; made if missing.
      hidden_size: D.
      dtype: in which hidden states are kept; bfloat16 halves the disk.
      identity: JSON-ready; what the hidden states depend on. A store of another identity is refused.
      shard_bytes: a shard is closed once it is so large; what a kill loses is less than that.

    Raises:
      ValueError: the directory holds another store or a damaged one; the message names the difference and the remedy.
    """

    def __init__(
        self,
        directory: Path,
        hidden_size: int,
        dtype: Literal["bfloat16", "float32"],
        identity: dict,
        shard_bytes: int = _SHARD_BYTES,
    ):
        self._directory, self._dtype, self._shard_bytes = Path(directory), _DTYPES[dtype], shard_bytes
        self._directory.mkdir(parents=True, exist_ok=True)
        self._manifest = {"dtype": dtype, "hidden_size": hidden_size, "identity": plain(identity), "shards": []}
        if is_primary():
            self._take_over()
        wait_for_all("the store is ready")
        merged = _read_manifest(self._directory / MANIFEST)
        self._stored = {name for shard in merged["shards"] for name, _ in shard["samples"]}
        agree({"the hidden states that an earlier call left": sorted(self._stored)})
        self._next = max((int(shard["file"][6:-4]) for shard in merged["shards"]), default=-1) + 1
        self._next += (jax.process_index() - self._next) % jax.process_count()
        if is_primary():
            self._manifest = merged
        self._open = None  # the stream of the shard that is not full
        self._samples: list[tuple[str, int]] = []  # in it
        self._sha = hashlib.sha256()

    @property
    def ids(self) -> set[str]:
        """The samples that are stored or in the open shard."""
        return self._stored

    def add(self, sample_id: str, hidden: Float[np.ndarray, "T D"]) -> None:
        """Append a new sample's hidden states. ValueError if it is not new, or they are misshapen or not finite."""
        if sample_id in self._stored:
            raise ValueError(f"sample {sample_id} is already in {self._directory}")
        hidden = np.ascontiguousarray(hidden, self._dtype)
        if hidden.ndim != 2 or hidden.shape[1] != self._manifest["hidden_size"]:
            width = self._manifest["hidden_size"]
            raise ValueError(f"sample {sample_id}: hidden states of shape {hidden.shape} in a store of [T, {width}]")
        if not np.isfinite(hidden).all():
            raise ValueError(f"sample {sample_id}: the target's hidden states are not finite; check its weights")
        if self._open is None:
            self._open = self._aside.open("wb")
        data = hidden.view(np.uint8)
        self._open.write(data)
        self._sha.update(data)
        self._samples.append((sample_id, len(hidden)))
        self._stored.add(sample_id)
        if self._open.tell() >= self._shard_bytes:
            self._close_shard()

    def add_missing(self, samples: Sequence[Sample], hidden: Float[np.ndarray, "B T D"]) -> None:
        """Append those of a batch's samples that are not there yet; row b is samples[b]'s, right-padded."""
        for sample, states in zip(samples, hidden):
            if sample.id not in self._stored:
                self.add(sample.id, states[: len(sample.tokens)])

    def close(self) -> None:
        """Close the open shard; all that was added, by any process, is then in the store. Waits for all processes."""
        if self._open is not None:
            self._close_shard()
        if several():
            wait_for_all("hidden states stored")
            if is_primary():
                self._take_over()
            wait_for_all("hidden states put together")

    def __enter__(self) -> HiddenWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        elif self._open is not None:  # it may be cut short, and the disk may be full: give its place back
            self._open.close()
            self._aside.unlink(missing_ok=True)

    @property
    def _aside(self) -> Path:
        return self._directory / f"open-shard-{jax.process_index()}.tmp"

    def _take_over(self) -> None:
        """Read all manifests, without shards that are gone, into one."""
        parts = sorted(self._directory.glob("manifest-*.json"))
        whole = [self._directory / MANIFEST] if (self._directory / MANIFEST).exists() else []
        shards = {}
        for path in [*whole, *parts]:
            found = _read_manifest(path)
            _check_belongs(self._directory, found, self._manifest)
            for shard in found["shards"]:
                if (self._directory / shard["file"]).exists():
                    _check_size(self._directory, found, shard)
                    shards[shard["file"]] = shard
        for left in self._directory.glob("open-shard*.tmp"):
            left.unlink()
        self._manifest["shards"] = [shards[name] for name in sorted(shards)]
        _write_manifest(self._directory / MANIFEST, self._manifest)
        for path in parts:
            path.unlink()

    def _close_shard(self) -> None:
        name = f"shard-{self._next:05d}.bin"
        self._next += jax.process_count()
        self._open.flush()
        os.fsync(self._open.fileno())
        self._open.close()
        self._aside.replace(self._directory / name)
        self._manifest["shards"].append({"file": name, "sha256": self._sha.hexdigest(), "samples": self._samples})
        own = MANIFEST if is_primary() else f"manifest-{jax.process_index()}.json"
        _write_manifest(self._directory / own, self._manifest)
        self._open, self._samples, self._sha = None, [], hashlib.sha256()


class HiddenStore(Mapping[str, np.ndarray]):
    """The hidden states of a store by sample id: [T, D], memory-mapped, read-only. Made by `open`."""

    def __init__(self, places: dict[str, np.ndarray]):
        self._places = places

    @classmethod
    def open(cls, directory: Path, identity: dict | None, verify: bool = False) -> HiddenStore:
        """Open a store.

        Args:
          directory: of the store.
          identity: what the hidden states must depend on, as the writer was told; None for a store of any identity, to
            find out what is in it.
          verify: read everything and compare checksums.

        Raises:
          FileNotFoundError: there is no store, or a shard is missing.
          ValueError: the store has another identity or is damaged; names the shard and the remedy.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory / MANIFEST)
        if identity is not None:
            _check_belongs(directory, manifest, {**manifest, "identity": plain(identity)})
        places = {}
        for shard in manifest["shards"]:
            path = directory / shard["file"]
            if not path.exists():
                raise FileNotFoundError(f"{path}: missing; store again, which computes its samples anew")
            _check_size(directory, manifest, shard)
            rows = np.asarray(np.memmap(path, _DTYPES[manifest["dtype"]], mode="r"))
            rows = rows.reshape(-1, manifest["hidden_size"])
            if verify and hashlib.sha256(rows.view(np.uint8)).hexdigest() != shard["sha256"]:
                raise ValueError(f"{path}: its checksum is wrong; {_DELETE_SHARD}")
            start = 0
            for name, length in shard["samples"]:
                places[name] = rows[start : start + length]
                start += length
        return cls(places)

    def __getitem__(self, sample_id: str) -> Float[np.ndarray, "T D"]:
        return self._places[sample_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def make_hidden_step(config: DecoderConfig, mesh: Mesh, dtype: Literal["bfloat16", "float32"]) -> Callable:
    """Compile `(params, Batch) -> hidden [B, T, D]` in `dtype`, after the final norm. Build it once."""

    def step(params: dict, batch: Batch):
        return hidden_states(config, params, batch.tokens).astype(dtype)

    return map_over_devices(step, mesh)


def store_hidden(
    config: DecoderConfig,
    params: dict,
    samples: Sequence[Sample],
    mesh: Mesh,
    *,
    batch_tokens: int,
    directory: Path,
    identity: dict,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    shard_bytes: int = _SHARD_BYTES,
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
            make_hidden_step(config, mesh, dtype), place_params(params, mesh), samples, missing, mesh,
            label="hidden states", finished=len(plans) - len(missing), progress=progress,
        )  # fmt: skip
        for batch, hidden in batches:
            writer.add_missing(batch, hidden)
    return HiddenStore.open(directory, identity)


def _write_manifest(path: Path, manifest: dict) -> None:
    with written_whole(path) as aside:
        aside.write_text(json.dumps(manifest), encoding="utf-8")


def _read_manifest(path: Path) -> dict:
    """A manifest, checked against its own form."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, so {path.parent} is not a store; check the path")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for shard in manifest["shards"]:
            _shard_size(manifest, shard)
        names = [shard["file"] for shard in manifest["shards"]]
        # A name goes into a path, so it must be nothing but a name.
        if not all(map(_SHARD_NAME.fullmatch, names)) or len(set(names)) < len(names):
            raise ValueError("shards are named wrongly or twice")
        manifest["identity"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest ({type(error).__name__}: {error}); {_DELETE_ALL}") from None
    return manifest


def _shard_size(manifest: dict, shard: dict) -> int:
    return _DTYPES[manifest["dtype"]].itemsize * manifest["hidden_size"] * sum(length for _, length in shard["samples"])


def _check_size(directory: Path, manifest: dict, shard: dict) -> None:
    path = directory / shard["file"]
    found, expected = path.stat().st_size, _shard_size(manifest, shard)
    if found != expected:
        raise ValueError(f"{path}: {found} bytes instead of {expected}; {_DELETE_SHARD}")


def _check_belongs(directory: Path, found: dict, expected: dict) -> None:
    different = differences(*({**manifest, "shards": None} for manifest in (found, expected)))
    if different:
        raise ValueError(f"{directory}: hidden states of another run ({different}); {_DELETE_ALL}")
