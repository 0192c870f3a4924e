"""The table of all samples' scores, and scores.parquet, which stores it.

The file's metadata holds the identity of the scores and a sha256 of identity and columns, which every reader compares: Parquet
itself takes a flipped bit in a column for another score. The column of the prompts' states, which is larger than all others
together, has a checksum of its own, so that a reader who does not need it leaves it alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Bool, Float, Int

from jsfdd.base.files import written_whole
from jsfdd.base.records import has_repeats
from jsfdd.scoring.metrics import column_names

_TOKEN_COLUMNS = ("counted", "flatness", "entropy")
_IN_PART = "token_"  # a part holds sample and token columns in one file, so the token columns need a prefix
_PROMPT = "prompt_state"
_ROWS = 100_000  # at a time, where a column becomes strings
_IDENTITY, _DIGEST, _PROMPT_DIGEST = b"jsfdd_identity", b"jsfdd_sha256", b"jsfdd_sha256_prompt_state"
_REMEDY = "give a file of `jsfdd score`; if it is one, delete it and score again"


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """Per-token scores of one sample of T tokens; 0 where a token does not count."""

    counted: Bool[np.ndarray, " T"]
    flatness: Float[np.ndarray, " T"]
    entropy: Float[np.ndarray, " T"]  # nats


@dataclasses.dataclass(frozen=True)
class ScoreTable:
    """Scores of N samples, in the order of the data.

    Attributes:
      ids, sources: one per sample.
      num_tokens: int32[N], counted tokens.
      metrics: name -> float64[N], as `metrics.py` defines them; NaN for samples without a counted token.
      identity: JSON-ready; all that the scores depend on.
      tokens: per-token scores of each sample, or None.
      prompt_states: float32[N, P], where the target's states of each prompt lie (`prompt_state.py`), by which
        `select(within="cluster")` finds like prompts; None if they were not read.

    Example:
      >>> table = ScoreTable(("a", "b"), ("chat", "chat"), np.array([3, 0]), {"flatness": np.array([0.02, np.nan])}, {})
      >>> table["flatness"]
      array([0.02,  nan])
    """

    ids: tuple[str, ...]
    sources: tuple[str, ...]
    num_tokens: Int[np.ndarray, " N"]
    metrics: dict[str, Float[np.ndarray, " N"]]
    identity: dict
    tokens: tuple[TokenRow, ...] | None = None
    prompt_states: Float[np.ndarray, "N P"] | None = None

    def __getitem__(self, metric: str) -> Float[np.ndarray, " N"]:
        return self.metrics[metric]

    def __len__(self) -> int:
        return len(self.ids)


def join(tables: Sequence[ScoreTable], ids: Sequence[str]) -> ScoreTable:
    """Join the rows of several tables (at least one, all of one identity) into one table, in the order of `ids`."""
    lacking = any(table.prompt_states is None for table in tables)
    row_of_id = {name: row for row, name in enumerate(itertools.chain.from_iterable(table.ids for table in tables))}
    rows = [row_of_id[name] for name in ids]

    def gathered(values: Sequence) -> tuple:
        joined = list(itertools.chain.from_iterable(values))
        return tuple(joined[row] for row in rows)

    return ScoreTable(
        ids=tuple(ids),
        sources=gathered([table.sources for table in tables]),
        num_tokens=np.concatenate([table.num_tokens for table in tables])[rows],
        metrics={name: np.concatenate([table[name] for table in tables])[rows] for name in tables[0].metrics},
        identity=tables[0].identity,
        tokens=None if tables[0].tokens is None else gathered([table.tokens for table in tables]),
        prompt_states=None if lacking else np.concatenate([table.prompt_states for table in tables])[rows],
    )


def write_scores(path: Path, table: ScoreTable) -> None:
    """Write scores.parquet atomically: one row per sample, no per-token scores, the identity in the file's metadata."""
    _write(path, _sample_columns(table), table.identity, table.prompt_states)


def write_token_scores(path: Path, table: ScoreTable) -> None:
    """Write token_scores.parquet atomically: one row per sample, with its id and T-long lists counted, flatness, entropy."""
    _write(path, {"id": pyarrow.array(table.ids, pyarrow.string()), **_token_columns(table, "")}, table.identity)


def write_part(path: Path, table: ScoreTable) -> None:
    """Write a whole table, per-token scores included, into one file, atomically; `read_scores` reads it."""
    tokens = {} if table.tokens is None else _token_columns(table, _IN_PART)
    _write(path, {**_sample_columns(table), **tokens}, table.identity, table.prompt_states)


def read_scores(path: Path, *, prompt_states: bool = False) -> ScoreTable:
    """Read scores.parquet or a part.

    Args:
      prompt_states: read these too. Without them a table of a million samples takes a quarter of the memory.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, lacks a column, was not written by jsfdd, or repeats an id; names file and remedy.
    """
    path = Path(path)
    columns, identity = _read(path, ("id", "source", "num_tokens", *column_names()))
    tokens = _token_rows(columns, _IN_PART) if _IN_PART + _TOKEN_COLUMNS[0] in columns else None

    def numbers(name: str, dtype: type) -> np.ndarray:
        values = columns[name]
        kind = values.dtype if isinstance(values, np.ndarray) else values.type
        if kind != dtype:
            raise ValueError(f"{path}: column {name} is {kind}, not {np.dtype(dtype)}; {_REMEDY}")
        return values

    num_tokens, metrics = numbers("num_tokens", np.int32), {name: numbers(name, np.float64) for name in column_names()}
    # A column goes as soon as it is copied: for ten million rows the two together would be gigabytes.
    sources = _shared_strings(columns.pop("source"))
    ids = tuple(_strings(columns.pop("id").chunks))
    if has_repeats(ids):
        raise ValueError(f"{path}: an id occurs more than once; {_REMEDY}")
    states = _read_prompts(path, len(ids)) if prompt_states else None
    return ScoreTable(ids, sources, num_tokens, metrics, identity, tokens, states)


def read_token_scores(path: Path) -> dict[str, TokenRow]:
    """Read token_scores.parquet: sample id -> its scores. Errors as in `read_scores`."""
    columns, _ = _read(Path(path), ("id", *_TOKEN_COLUMNS))
    return dict(zip(columns["id"].to_pylist(), _token_rows(columns, ""), strict=True))


def _strings(chunks: list[pyarrow.Array]) -> Iterator[str]:
    """The values of a column's chunks, which are let go one by one."""
    while chunks:
        chunk = chunks.pop(0)
        for begin in range(0, len(chunk), _ROWS):
            yield from chunk.slice(begin, _ROWS).to_pylist()
        del chunk
        pyarrow.default_memory_pool().release_unused()


def _shared_strings(column: pyarrow.ChunkedArray) -> tuple[str, ...]:
    """A column's values, equal ones as one string: millions of rows have a few sources."""
    names: list[str] = []
    for chunk in column.dictionary_encode().chunks:
        known = chunk.dictionary.to_pylist()
        names += [known[i] for i in chunk.indices.to_numpy()]
    return tuple(names)


def _sample_columns(table: ScoreTable) -> dict[str, pyarrow.Array]:
    return {
        "id": pyarrow.array(table.ids, pyarrow.string()),
        "source": pyarrow.array(table.sources, pyarrow.string()),
        "num_tokens": pyarrow.array(table.num_tokens),
        **{name: pyarrow.array(values) for name, values in table.metrics.items()},
    }


def _token_columns(table: ScoreTable, prefix: str) -> dict[str, pyarrow.Array]:
    ends = np.cumsum([0, *(len(row.counted) for row in table.tokens)])
    return {
        prefix + name: pyarrow.LargeListArray.from_arrays(
            ends, pyarrow.array(np.concatenate([getattr(row, name) for row in table.tokens]))
        )
        for name in _TOKEN_COLUMNS
    }


def _token_rows(table: Mapping[str, pyarrow.ChunkedArray], prefix: str) -> tuple[TokenRow, ...]:
    columns = []
    for name in _TOKEN_COLUMNS:
        lists = table[prefix + name].combine_chunks()
        ends = np.cumsum(lists.value_lengths().to_numpy())
        columns.append(np.split(lists.flatten().to_numpy(zero_copy_only=False), ends[:-1]))
    return tuple(TokenRow(*row) for row in zip(*columns, strict=True))


def _write(
    path: Path, columns: dict[str, pyarrow.Array], identity: dict, prompts: Float[np.ndarray, "N P"] | None = None
) -> None:
    table, text = pyarrow.table(columns), json.dumps(identity, sort_keys=True).encode()
    digests = {_DIGEST: _digest(table, text)}
    if prompts is not None:
        flat = pyarrow.array(np.ascontiguousarray(prompts, np.float32).ravel())
        states = pyarrow.table({_PROMPT: pyarrow.FixedSizeListArray.from_arrays(flat, prompts.shape[1])})
        digests[_PROMPT_DIGEST] = _digest(states, text)
        table = table.append_column(_PROMPT, states[_PROMPT])
    table = table.replace_schema_metadata({_IDENTITY: text, **digests})
    with written_whole(path, table.nbytes) as aside:
        pyarrow.parquet.write_table(table, aside, write_page_checksum=True)


def _read(path: Path, columns: Sequence[str]) -> tuple[dict[str, np.ndarray | pyarrow.ChunkedArray], dict]:
    """All columns but the prompts' states, checked, and the identity. Numbers without gaps are arrays.

    Columns are read one by one, because together they would take twice their size. Errors as in `read_scores`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run `jsfdd score` first, or check the path")
    values: dict[str, np.ndarray | pyarrow.ChunkedArray] = {}
    with _opened(path) as file:
        metadata = file.schema_arrow.metadata or {}
        sha = hashlib.sha256(metadata.get(_IDENTITY, b""))
        for name in file.schema_arrow.names:  # which may be no UTF-8
            if name != _PROMPT:
                column = file.read(columns=[name])[name]
                _add_column(sha, name, column)
                values[name] = column if column.null_count or not _is_number(column.type) else column.to_numpy()
    missing = [name for name in columns if name not in values]
    if missing or not {_IDENTITY, _DIGEST} <= metadata.keys():
        what = f"has no column {', '.join(missing)}" if missing else "was not written by this version of jsfdd"
        raise ValueError(f"{path}: {what}; {_REMEDY}")
    _check_digest(path, sha, metadata[_DIGEST])
    pyarrow.default_memory_pool().release_unused()  # Arrow keeps what reading has freed
    return values, json.loads(metadata[_IDENTITY])


def _read_prompts(path: Path, rows: int) -> Float[np.ndarray, "N P"] | None:
    """The prompts' states, checked; None in a file from before they were kept."""
    with _opened(path) as file:
        metadata = file.schema_arrow.metadata
        column = file.read(columns=[_PROMPT])[_PROMPT] if _PROMPT in file.schema_arrow.names else None
    if column is None:
        return None
    sha = hashlib.sha256(metadata[_IDENTITY])
    _add_column(sha, _PROMPT, column)
    _check_digest(path, sha, metadata.get(_PROMPT_DIGEST))
    return column.combine_chunks().flatten().to_numpy().reshape(rows, -1)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """Open a Parquet file; whatever Arrow raises for a damaged one becomes one ValueError."""
    size = path.stat().st_size
    # Nothing in the footer has more parts or letters than the file has bytes: a damaged length asks for gigabytes.
    limits = {"thrift_container_size_limit": size, "thrift_string_size_limit": size}
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True, **limits) as file:
            yield file
    except (pyarrow.ArrowException, KeyError, OSError, ValueError, MemoryError) as error:  # a damaged size asks for terabytes
        raise ValueError(f"{path}: not a whole Parquet file ({error}); {_REMEDY}") from None


def _is_number(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)


def _check_digest(path: Path, sha, expected: bytes | None) -> None:
    if sha.hexdigest().encode() != expected:
        raise ValueError(f"{path}: damaged: its checksum is of other scores; {_REMEDY}")


def _digest(table: pyarrow.Table, identity: bytes) -> bytes:
    """sha256 hex of the identity and of every column."""
    sha = hashlib.sha256(identity)
    for name in table.column_names:
        _add_column(sha, name, table[name])
    return sha.hexdigest().encode()


def _add_column(sha, name: str, column: pyarrow.ChunkedArray) -> None:
    """Add a column's name, type and values to a digest."""
    kind = getattr(column.type, "value_type", column.type)  # Parquet renames a list's items, and so their list
    sha.update(f"\0{name} {kind} {len(column)} {column.null_count}\0".encode())
    for part in _parts(column):
        sha.update(part)


def _parts(column: pyarrow.ChunkedArray) -> Iterator[np.ndarray]:
    """A column's bytes, whatever its chunks."""
    chunks = column.chunks
    if pyarrow.types.is_large_list(column.type):
        yield from (chunk.value_lengths().to_numpy() for chunk in chunks)
        chunks = [chunk.flatten() for chunk in chunks]
    elif pyarrow.types.is_fixed_size_list(column.type):
        yield np.array(column.type.list_size)
        chunks = [chunk.flatten() for chunk in chunks]
    elif pyarrow.types.is_string(column.type):
        yield from (np.diff(_ends(chunk)[1]) for chunk in chunks if len(chunk))
        for text, ends in (_ends(chunk) for chunk in chunks if len(chunk)):
            if ends[-1]:
                yield np.frombuffer(text.buffers()[2], np.uint8)[ends[0] : ends[-1]]
        return
    yield from (np.ascontiguousarray(chunk.to_numpy(zero_copy_only=False)) for chunk in chunks)


def _ends(chunk: pyarrow.Array) -> tuple[pyarrow.Array, np.ndarray]:
    """A chunk of strings with offsets of 64 bits, and those."""
    text = chunk.cast(pyarrow.large_string())
    return text, np.frombuffer(text.buffers()[1], np.int64)[text.offset :][: len(text) + 1]
