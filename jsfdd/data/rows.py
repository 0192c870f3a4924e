"""Input files: which ones a name stands for, and their rows.

A name, as `--data` and `--prompts` take it, is one of

    a file         .jsonl (one JSON object a line) or .json (one list of objects), each also .gz or .zst; or .parquet
    a directory    all files in it that end so, at any depth, hidden ones aside; others are not read
    a pattern      with *, ? or [ ]; ** stands for any depth
    hf:NAME        a Hugging Face dataset (`data.hub`)

Directories and patterns give their files in the order of their paths. Blank lines of a .jsonl file hold no row. Errors
name the file and the line (row of a .parquet file, entry of a .json list) and never show what a message says.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet

from jsfdd.base.files import sha256
from jsfdd.data.hub import dataset_rows, is_dataset

# Reading stops here instead of filling the memory: a few KB of gzip can unfold to any size.
MAX_LINE_BYTES = 64 << 20
MAX_JSON_BYTES = 4 << 30

_ENDINGS = ".jsonl or .json, each also with .gz or .zst, or .parquet"
# How each kind of compression fails on bad data.
_UNPACK_ERRORS = {"": (), ".gz": (gzip.BadGzipFile, EOFError, zlib.error), ".zst": (OSError,)}
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


class Row(NamedTuple):
    """One object of a file, its id and source settled.

    Attributes:
      value: the object.
      id: its own "id", or "NAME-NUMBER": the file's name without its endings, and the row's number in it.
      source: its own "source", or the file's name without its endings.
      place: "file:line", for errors.
      file: as `expand_names` gives it.
    """

    value: dict
    id: str
    source: str
    place: str
    file: str


class InputFile(NamedTuple):
    """A file or a dataset to read.

    Attributes:
      path: as errors name it.
      stem: its name without endings; of a file in a directory or pattern, its path from there on. Ids start with it.
    """

    path: str
    stem: str


class _Form(NamedTuple):
    """What a file's name says: stem "chats", ending "jsonl", packing ".gz", ".zst" or ""."""

    stem: str
    ending: str
    packing: str


def expand_names(names: Sequence[str | Path]) -> list[InputFile]:
    """The files and datasets that names stand for, in order; the same on every machine and at every call.

    Raises FileNotFoundError for a file that is missing, a pattern that matches no file, or a directory without one, and
    ValueError for a file that ends in something else.
    """
    inputs: list[InputFile] = []
    for name in map(str, names):
        path = Path(name)
        if is_dataset(name):
            inputs.append(InputFile(name, re.sub(r"[/@:]", "-", name.removeprefix("hf:"))))
        elif path.is_file():
            inputs.append(_input_file(path, path.parent))
        elif path.is_dir():
            found = sorted(file for file in path.rglob("*") if _belongs(file.relative_to(path)) and file.is_file())
            if not found:
                raise FileNotFoundError(f"{name}: no chat or prompt file in this directory; they end in {_ENDINGS}")
            inputs += [_input_file(file, path) for file in found]
        elif glob.has_magic(name):
            found = sorted(file for file in map(Path, glob.glob(name, recursive=True)) if file.is_file())
            if not found:
                raise FileNotFoundError(f"{name}: the pattern matches no file; check the path")
            fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
            inputs += [_input_file(file, fixed) for file in found]
        else:
            raise FileNotFoundError(f"{name}: no such file; check the path")
    return inputs


def input_digests(names: Sequence[str | Path]) -> dict[str, str]:
    """sha256 hex by path, in the order of `expand_names`: what a result from these inputs depends on.

    Of a dataset the rows are hashed, of a file its bytes.
    """
    paths = [file.path for file in expand_names(names)]
    return {path: _dataset_digest(path) if is_dataset(path) else sha256(Path(path)) for path in paths}


def read_rows(names: Sequence[str | Path], columns: Collection[str]) -> Iterator[Row]:
    """The rows of all files.

    Args:
      names: see the module's docstring.
      columns: the only ones that are read of Parquet files and datasets, beside "id" and "source".

    Raises FileNotFoundError for what is missing, and ValueError "file:line: what; remedy" for a row that is not an
    object, an id or source that is no text, a damaged file, or one without rows.
    """
    columns = {"id", "source", *columns}
    for file, stem in expand_names(names):
        place = None
        for value, place, number in _entries_of(file, columns):
            if not isinstance(value, dict):
                raise ValueError(f"{place}: found {kind_of(value)}; a row is an object {{…}}")
            row_id, source = value.get("id", f"{stem}-{number}"), value.get("source", stem)
            if type(row_id) is int:
                row_id = str(row_id)
            check_text(row_id, "'id'", place)
            check_text(source, "'source'", place)
            yield Row(value, row_id, source, place, file)
        if place is None:
            raise ValueError(f"{file}: the file holds no rows; remove it from the list or write it again")


def check_text(value: object, what: str, place: str) -> None:
    """A string, and one that UTF-8 can hold: JSON's escapes can spell half a surrogate pair, which is no character."""
    if not isinstance(value, str):
        raise ValueError(f"{place}: {what} is {kind_of(value)}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: {what} holds half a surrogate pair at character {error.start}; remove it or write the character"
        ) from error


_KINDS = {str: "a string", list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    return _KINDS.get(type(value), "null")


# --- One file ------------------------------------------------------------------------------------------------------


def _form(path: Path) -> _Form | None:
    packing = path.suffix if path.suffix in (".gz", ".zst") else ""
    stem, _, ending = path.name.removesuffix(packing).rpartition(".")
    known = ("jsonl", "json") if packing else ("jsonl", "json", "parquet")
    return _Form(stem, ending, packing) if stem and ending in known else None


def _belongs(path: Path) -> bool:
    """Whether a file in a directory is one to read."""
    return _form(path) is not None and not any(part.startswith(".") for part in path.parts)


def _input_file(path: Path, base: Path) -> InputFile:
    form = _form(path)
    if form is None:
        raise ValueError(f"{path}: unknown file ending; expected {_ENDINGS}")
    return InputFile(str(path), path.relative_to(base).with_name(form.stem).as_posix())


def _entries_of(file: str, columns: Collection[str]) -> Iterator[tuple[object, str, int]]:
    """(value, place, number) of each row."""
    if is_dataset(file):
        rows = enumerate(dataset_rows(file, columns), 1)
        return ((_without_nulls(value), f"{file}: row {number}", number) for number, value in rows)
    path = Path(file)
    _, ending, packing = _form(path)
    if ending == "parquet":
        return _parquet_rows(path, columns)
    return _lines(path, packing) if ending == "jsonl" else _entries(path, packing)


def _dataset_digest(name: str) -> str:
    sha = hashlib.sha256()
    for row in dataset_rows(name, columns=None):
        # What is no JSON (an image, a date) is not read either, and its repr may differ from one process to the next.
        sha.update(json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode() + b"\n")
    return sha.hexdigest()


def _open(path: Path, packing: str):
    if packing == ".gz":
        return gzip.open(path)
    if packing == ".zst":  # pyarrow brings the codec
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _lines(path: Path, packing: str) -> Iterator[tuple[object, str, int]]:
    """(value, place, line number) of each line that is not blank."""
    with _open(path, packing) as stream:
        for number in itertools.count(1):
            place = f"{path}:{number}"
            data = _read(stream.readline, MAX_LINE_BYTES, place, packing)
            if not data:
                return
            line = _decode(data.removeprefix(codecs.BOM_UTF8) if number == 1 else data, place)
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{place}: malformed JSON ({error}); one complete JSON object a line") from error
                yield value, place, number


def _entries(path: Path, packing: str) -> Iterator[tuple[object, str, int]]:
    """(value, place, entry number from 1) of the one list that a .json file holds, each with the line it starts on."""
    with _open(path, packing) as stream:
        data = _read(stream.read, MAX_JSON_BYTES, f"{path}:1", packing)
    text = _decode(data.removeprefix(codecs.BOM_UTF8), f"{path}:1")
    decoder = json.JSONDecoder()
    line, position = 1, 0

    def advance(to: int) -> str:
        """Moves to the next character after `to` that is no white space, and returns it ("" at the end)."""
        nonlocal line, position
        to = _JSON_SPACE.match(text, to).end()
        line += text.count("\n", position, to)
        position = to
        return text[to : to + 1]

    if advance(0) != "[":
        raise ValueError(
            f"{path}:{line}: a .json file holds one list [row, row, …]; call a file of one object a line .jsonl"
        )
    character = advance(position + 1)
    number = 0
    while not (character == "]" and number == 0):
        number += 1
        place = f"{path}:{line}: entry {number}"
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: malformed JSON ({error}); the file is one list of complete objects") from error
        yield value, place, number
        character = advance(end)
        if character == "]":
            break
        if character != ",":
            raise ValueError(f"{path}:{line}: expected ',' or ']' after entry {number}; is the file cut off?")
        advance(position + 1)
    if advance(position + 1):
        raise ValueError(f"{path}:{line}: text after the closing ']'; a .json file holds one list")


def _read(read: Callable[[int], bytes], limit: int, place: str, packing: str) -> bytes:
    """Up to `limit` bytes from `read`, with the ways of failing that its compression has named."""
    try:
        data = read(limit + 1)
    except _UNPACK_ERRORS[packing] as error:
        name = {".gz": "gzip", ".zst": "zstd"}[packing]
        raise ValueError(
            f"{place}: cannot be unpacked as {name} ({error}); copy the file again, or drop {packing} if it is not "
            "compressed"
        ) from error
    if len(data) > limit:
        raise ValueError(f"{place}: longer than {limit >> 20} MiB; split it into smaller rows")
    return data


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        remedy = "save the file as UTF-8"
        for magic, name in ((b"\x1f\x8b", "gz"), (b"\x28\xb5\x2f\xfd", "zst"), (b"PAR1", "parquet")):
            if data.startswith(magic):
                remedy = f"this is {name} data: end the file's name in .{name}"
        raise ValueError(f"{place}: invalid UTF-8 at byte {error.start} ({error.reason}); {remedy}") from error


def _parquet_rows(path: Path, columns: Collection[str]) -> Iterator[tuple[object, str, int]]:
    """(value, place, row number from 1); a null stands for a missing key, since a Parquet row has all columns."""
    try:
        with pa.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if name in columns]
            if not wanted:
                raise ValueError(f"{path}: no column of {', '.join(sorted(columns))}; it has {', '.join(names)}; rename them")
            batches = (batch.to_pylist() for batch in file.iter_batches(256, columns=wanted))
            for number, value in enumerate(itertools.chain.from_iterable(batches), 1):
                yield _without_nulls(value), f"{path}: row {number}", number
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error}); copy or write the file again") from error


def _without_nulls(value):
    """A value whose objects, at any depth, lack the keys that were null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
