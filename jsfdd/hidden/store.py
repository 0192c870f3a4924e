"""A store of the target's hidden states, sharded, checksummed and memory-mapped: the format, and the reader.

    DIR/shard-00000.bin   hidden states of many samples, [tokens, row], one after the other (rows.py: a token's row)
    DIR/manifest.json     what they belong to and were kept for; for each shard the samples, their tokens and its sha256
    DIR/manifest-1.json   the shards of process 1 while several write, until process 0 has taken them over

A sample that was dropped leaves its tokens in the shard, without a name, until the shard is rewritten. writer.py writes.

    store = HiddenStore.open(directory, identity)
    store["sample id"]                                                        # [T, D], read when it is touched
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jsfdd.base.files import decode as decode_record
from jsfdd.base.files import differences, plain, read_json, write_json
from jsfdd.hidden.rows import RowDtype, decode, row_bytes

MANIFEST = "manifest.json"
_SHARD_NAME = re.compile(r"shard-\d{5,}\.bin")
_DELETE_ALL = "delete the directory and store again, or choose another"
_DELETE_SHARD = "delete this shard and store again: only its samples are computed anew"


class _Shard:
    """A shard's file while it is read: its checksum is compared when the first of its samples is touched."""

    def __init__(self, directory: Path, facts: dict, rows: np.ndarray):
        self._directory, self._facts, self._rows, self._checked = directory, facts, rows, False

    def check(self) -> None:
        """Raise ValueError if the shard is not what was written."""
        if not self._checked:
            check_sum(self._directory, self._facts, self._rows)
            self._checked = True


class _Stored(NamedTuple):
    shard: _Shard
    rows: np.ndarray


class HiddenStore(Mapping[str, np.ndarray]):
    """The hidden states of a store by sample id, read-only: [T, D], or with streams in front [T, (n + 1) D]. Made by `open`.

    bfloat16 and float32 are views of the files; int8 is dequantised to float32 whenever it is asked for. A shard's checksum is
    compared once, when the first of its samples is asked for: ValueError names a damaged one and the remedy.

    Attributes:
      dtype: in which they are kept.
      kept_for: the rule by which samples were kept, as given to the writer; None if all were.
      layers: the target's layers whose inputs stand in front of the final state.
    """

    def __init__(self, stored: dict[str, _Stored], dtype: RowDtype, kept_for: dict | None, layers: tuple[int, ...] = ()):
        self._stored, self.dtype, self.kept_for, self.layers = stored, dtype, kept_for, layers

    @classmethod
    def open(cls, directory: Path, identity: dict | None, verify: bool = False) -> HiddenStore:
        """Open a store.

        Args:
          directory: of the store.
          identity: what the hidden states must depend on, as given to the writer; None opens a store of any identity.
          verify: read everything and compare all checksums now.

        Raises:
          FileNotFoundError: there is no store, or a shard is missing.
          ValueError: the store has another identity or is damaged; names the shard and the remedy.
        """
        directory = Path(directory)
        manifest = read_manifest(directory / MANIFEST)
        if identity is not None:
            check_belongs(directory, manifest, {**manifest, "identity": plain(identity)})
        stored = {}
        for shard in manifest["shards"]:
            path = directory / shard["file"]
            if not path.exists():
                raise FileNotFoundError(f"{path}: missing; store again, which computes its samples anew")
            check_size(directory, manifest, shard)
            rows = shard_rows(directory, manifest, shard)
            whole = _Shard(directory, shard, rows)
            if verify:
                whole.check()
            stored.update((name, _Stored(whole, part)) for name, part in samples_of(shard, rows).items())
        return cls(stored, manifest["dtype"], manifest.get("kept_for"), tuple(manifest.get("layers", ())))

    def __getitem__(self, sample_id: str) -> Float[np.ndarray, "T D"]:
        shard, rows = self._stored[sample_id]
        shard.check()
        return decode(rows, self.dtype, len(self.layers) + 1)

    def __contains__(self, sample_id: object) -> bool:  # Mapping's would read the sample
        return sample_id in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def shard_rows(directory: Path, manifest: dict, shard: dict) -> np.ndarray:
    """uint8[tokens, row]: a shard's file, memory-mapped."""
    rows = np.asarray(np.memmap(directory / shard["file"], np.uint8, mode="r"))
    return rows.reshape(-1, _row_bytes(manifest))


def samples_of(shard: dict, rows: np.ndarray) -> dict[str, np.ndarray]:
    """sample id -> rows, for the samples of a shard that were not dropped."""
    rows_by_id, start = {}, 0
    for name, length in shard["samples"]:
        if name is not None:
            rows_by_id[name] = rows[start : start + length]
        start += length
    return rows_by_id


@dataclasses.dataclass(frozen=True)
class _ShardFacts:
    """A shard as the manifest has it. `samples`: (name or None if dropped, tokens), in the order of the file."""

    file: str
    sha256: str
    samples: tuple[tuple[str | None, int], ...]

    def __post_init__(self):
        # A name becomes part of a path, so it must be a plain name.
        if not _SHARD_NAME.fullmatch(self.file):
            raise ValueError(f"a shard is named {self.file!r:.80}")
        if not self.samples or min(length for _, length in self.samples) < 0:
            raise ValueError(f"{self.file} has no sample, or one of less than no tokens")


@dataclasses.dataclass(frozen=True)
class _Manifest:
    dtype: RowDtype
    hidden_size: int
    identity: dict
    kept_for: dict | None
    shards: tuple[_ShardFacts, ...]
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size is {self.hidden_size}")
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("a shard is named twice")


def write_manifest(path: Path, manifest: dict) -> None:
    """Replace a manifest, whole or not at all."""
    write_json(path, manifest, indent=0)


def read_manifest(path: Path) -> dict:
    """A manifest, checked against its checksum and its form. FileNotFoundError, ValueError: there is none, or it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, so {path.parent} is not a store; check the path")
    manifest = read_json(path, dict, remedy=_DELETE_ALL)
    try:
        decode_record(_Manifest, manifest, path, partial=True)
    except ValueError as error:
        raise ValueError(f"{error}: not a manifest; {_DELETE_ALL}") from None
    return manifest


def check_size(directory: Path, manifest: dict, shard: dict) -> None:
    """Raise ValueError if the size of a shard's file does not fit its samples."""
    path = directory / shard["file"]
    size, expected = path.stat().st_size, _shard_size(manifest, shard)
    if size != expected:
        raise ValueError(f"{path}: {size} bytes instead of {expected}; {_DELETE_SHARD}")


def check_sum(directory: Path, shard: dict, rows: np.ndarray) -> None:
    """Raise ValueError if a shard's rows do not have the checksum with which they were written."""
    if hashlib.sha256(rows).hexdigest() != shard["sha256"]:
        raise ValueError(f"{directory / shard['file']}: its checksum is wrong; {_DELETE_SHARD}")


def check_belongs(directory: Path, manifest: dict, expected: dict) -> None:
    """Raise ValueError, naming the difference, if two manifests differ in target, data, format or purpose."""
    different = differences(*({**facts, "shards": None} for facts in (manifest, expected)))
    if different:
        raise ValueError(f"{directory}: hidden states of another run ({different}); {_DELETE_ALL}")


def _shard_size(manifest: dict, shard: dict) -> int:
    return _row_bytes(manifest) * sum(length for _, length in shard["samples"])


def _row_bytes(manifest: dict) -> int:
    return row_bytes(manifest["dtype"], manifest["hidden_size"], len(manifest.get("layers", ())) + 1)
