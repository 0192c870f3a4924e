"""The scores of all samples, and scores.parquet, in which they are kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Bool, Float, Int

from jsfdd.selection.atomic import write_atomically

METRICS = ("flatness", "flatness_median", "entropy", "top1", "margin", "energy", "ppl")
COLUMNS = ("id", "source", "num_tokens", *METRICS)
_IDENTITY = b"jsfdd_identity"
_REMEDY = "delete it and score again"


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """Per-token scores of one sample of T tokens; 0 where a token does not count."""

    counted: Bool[np.ndarray, " T"]
    flatness: Float[np.ndarray, " T"]
    entropy: Float[np.ndarray, " T"]  # nats


@dataclasses.dataclass(frozen=True)
class ScoreTable:
    """Scores of N samples, in the order of the data.

    A sample's metric is the mean over its counted tokens, but for flatness_median and for ppl = exp(mean nll). Samples
    without a counted token have NaN.

    Attributes:
      ids, sources: of each sample.
      num_tokens: int32[N], counted tokens.
      flatness, …, ppl: float64[N]; entropy in nats.
      identity: JSON-ready; all that the scores depend on.
      tokens: per-token scores of each sample, where they were asked for.
    """

    ids: tuple[str, ...]
    sources: tuple[str, ...]
    num_tokens: Int[np.ndarray, " N"]
    flatness: Float[np.ndarray, " N"]
    flatness_median: Float[np.ndarray, " N"]
    entropy: Float[np.ndarray, " N"]
    top1: Float[np.ndarray, " N"]
    margin: Float[np.ndarray, " N"]
    energy: Float[np.ndarray, " N"]
    ppl: Float[np.ndarray, " N"]
    identity: dict
    tokens: tuple[TokenRow, ...] | None = None


def write_scores(path: Path, table: ScoreTable) -> None:
    """Write scores.parquet, atomic: one row a sample, the identity in the file's metadata; not the per-token scores."""
    columns = {"id": pyarrow.array(table.ids, pyarrow.string()), "source": pyarrow.array(table.sources, pyarrow.string())}
    columns |= {name: pyarrow.array(getattr(table, name)) for name in ("num_tokens", *METRICS)}
    _write(path, columns, table.identity)


def write_token_scores(path: Path, table: ScoreTable) -> None:
    """Write token_scores.parquet, atomic: id, and of all T tokens the lists counted, flatness and entropy (nats)."""
    columns = {"id": pyarrow.array(table.ids, pyarrow.string())}
    columns |= {name: _lists([getattr(row, name) for row in table.tokens]) for name in ("counted", "flatness", "entropy")}
    _write(path, columns, table.identity)


def read_scores(path: Path) -> ScoreTable:
    """Read scores.parquet.

    Raises:
      FileNotFoundError: there is none.
      ValueError: the file is damaged, lacks a column or is not jsfdd's, or an id occurs twice; names file and remedy.
    """
    path = Path(path)
    table = _read(path, COLUMNS)
    ids = tuple(table["id"].to_pylist())
    if len(set(ids)) != len(ids):
        raise ValueError(f"{path}: an id occurs more than once; {_REMEDY}")
    numbers = {name: table[name].to_numpy() for name in ("num_tokens", *METRICS)}
    for name, values in numbers.items():
        expected = np.int32 if name == "num_tokens" else np.float64
        if values.dtype != expected:
            raise ValueError(f"{path}: column {name} is {values.dtype}, not {np.dtype(expected)}; {_REMEDY}")
    identity = json.loads(table.schema.metadata[_IDENTITY])
    return ScoreTable(ids=ids, sources=tuple(table["source"].to_pylist()), identity=identity, **numbers)


def read_token_scores(path: Path) -> dict[str, TokenRow]:
    """Read token_scores.parquet: sample id -> its scores. Errors as in `read_scores`."""
    path = Path(path)
    table = _read(path, ("id", "counted", "flatness", "entropy"))
    lists = [_arrays(table[name]) for name in ("counted", "flatness", "entropy")]
    return {name: TokenRow(*row) for name, *row in zip(table["id"].to_pylist(), *lists, strict=True)}


def _write(path: Path, columns: dict[str, pyarrow.Array], identity: dict) -> None:
    table = pyarrow.table(columns).replace_schema_metadata({_IDENTITY: json.dumps(identity, sort_keys=True)})
    write_atomically(Path(path), lambda stream: pyarrow.parquet.write_table(table, stream))


def _read(path: Path, columns: tuple[str, ...]) -> pyarrow.Table:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run `jsfdd score` first, or check the path")
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error}); {_REMEDY}") from None
    missing = [name for name in columns if name not in table.column_names]
    if missing or _IDENTITY not in (table.schema.metadata or {}):
        what = f"has no column {', '.join(missing)}" if missing else "was not written by jsfdd"
        raise ValueError(f"{path}: {what}; {_REMEDY}")
    return table


def _lists(arrays: list[np.ndarray]) -> pyarrow.Array:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int64)
    return pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(np.concatenate(arrays)))


def _arrays(column: pyarrow.ChunkedArray) -> list[np.ndarray]:
    rows = column.combine_chunks()
    values, ends = rows.flatten().to_numpy(zero_copy_only=False), rows.value_lengths().to_numpy().cumsum()
    return np.split(values, ends[:-1])
