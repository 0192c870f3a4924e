"""Read the rows of one input file: .jsonl, .json, .csv, each also packed as .gz or .zst, and .parquet and .arrow.

Files are read a piece at a time, so memory does not grow with their size. Every reader yields (value, place, number) for each
row. A place names the file and the line; no error shows the text of a message.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet

from jsfdd.base.files import check_no_pointer
from jsfdd.data.messages import MEDIA

# A longer line is not a row: a few KB of gzip can unfold to any size.
MAX_ROW_BYTES = 64 << 20
ENDINGS = ".jsonl, .ndjson, .json or .csv, each also with .gz or .zst, or .parquet or .arrow"

_PACKABLE = ("jsonl", "ndjson", "json", "csv")
_COLUMNAR = ("parquet", "arrow")
# How each kind of compression fails on bad data.
_UNPACK_ERRORS = {"": (), ".gz": (gzip.BadGzipFile, EOFError, zlib.error), ".zst": (OSError,)}
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_WINDOW = 1 << 20  # characters of a .json file that are read at a time
_ROWS = 256  # rows of a columnar file that become objects at a time

Entry = tuple[object, str, int]  # value, place, number in the file


class Form(NamedTuple):
    """What a file's name says: stem "chats", ending "jsonl", packing ".gz", ".zst" or ""."""

    stem: str
    ending: str
    packing: str


def form_of(path: Path) -> Form | None:
    """How to read a file; None if its name has no known ending. Upper and lower case make no difference."""
    packing = path.suffix if path.suffix.lower() in (".gz", ".zst") else ""
    stem, _, ending = path.name.removesuffix(packing).rpartition(".")
    known = _PACKABLE if packing else (*_PACKABLE, *_COLUMNAR)
    return Form(stem, ending.lower(), packing.lower()) if stem and ending.lower() in known else None


def entries_of(path: Path, columns: Collection[str]) -> Iterator[Entry]:
    """The rows of a file; of a columnar one only these columns, as far as it has them.

    In a columnar file a null stands for a missing key at any depth, since all its rows have all columns.

    Raises ValueError "file:line: what; remedy" for a damaged file.
    """
    _, ending, packing = form_of(path)
    check_no_pointer(path)
    if ending == "parquet":
        return _parquet(path, columns)
    if ending == "arrow":
        return _arrow(path, columns)
    if ending == "csv":
        return _table(path, packing)
    return _list_or_lines(path, packing) if ending == "json" else _lines(path, packing)


def without_nulls(value):
    """A copy of a value in which no object, at any depth, has a null key."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


# --- Text ----------------------------------------------------------------------------------------------------------


def _open(path: Path, packing: str):
    if packing == ".gz":
        return gzip.open(path)
    if packing == ".zst":  # pyarrow brings the codec
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _lines(path: Path, packing: str) -> Iterator[Entry]:
    """Each line that is not blank; its number is the line's."""
    with _open(path, packing) as stream:
        for number in itertools.count(1):
            place = f"{path}:{number}"
            data = _read(stream.readline, MAX_ROW_BYTES + 1, place, packing)
            if not data:
                return
            if len(data) > MAX_ROW_BYTES:
                raise ValueError(_too_long(place))
            line = _decode(data.removeprefix(codecs.BOM_UTF8) if number == 1 else data, place)
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{place}: malformed JSON ({error}); one complete JSON object a line") from error
                yield value, place, number


def _list_or_lines(path: Path, packing: str) -> Iterator[Entry]:
    """A .json file: the one list that it holds, or objects one after the other, as some programs write it."""
    with _open(path, packing) as stream:
        window = _Window(stream, path, packing)
        first = window.skip_space()
        if first == "[":
            yield from _list(window, path)
        elif first == "{":
            yield from _objects(window, path)
        else:
            start = "an empty file" if not first else f"found {first!r}"
            raise ValueError(f"{path}:{window.line}: a .json file holds one list [row, row, …] or objects; {start}")


def _list(window: _Window, path: Path) -> Iterator[Entry]:
    window.position += 1
    character = window.skip_space()
    for number in itertools.count(1):
        if character == "]" and number == 1:
            break
        place = f"{path}:{window.line}: entry {number}"
        yield window.value(place), place, number
        character = window.skip_space()
        if character == "]":
            break
        if character != ",":
            raise ValueError(f"{path}:{window.line}: expected ',' or ']' after entry {number}; is the file cut off?")
        window.position += 1
        window.skip_space()
    window.position += 1
    if window.skip_space():
        raise ValueError(f"{path}:{window.line}: text after the closing ']'; a .json file holds one list")


def _objects(window: _Window, path: Path) -> Iterator[Entry]:
    for number in itertools.count(1):
        line = window.line
        yield window.value(f"{path}:{line}"), f"{path}:{line}", number
        if not window.skip_space():
            return


class _Window:
    """The part of a JSON text that is looked at: what lies behind is forgotten, what lies ahead is read when it is needed."""

    def __init__(self, stream, path: Path, packing: str):
        self.stream, self.path, self.packing = stream, path, packing
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.json = json.JSONDecoder()
        self.text, self.position, self.line, self.ended = "", 0, 1, False

    def skip_space(self) -> str:
        """Moves to the next character that is no white space, and returns it ("" at the end)."""
        skipped = 0
        while True:
            to = _JSON_SPACE.match(self.text, self.position).end()
            self.line += self.text.count("\n", self.position, to)
            skipped += to - self.position
            self.position = to
            if to < len(self.text) or not self._more():
                return self.text[self.position : self.position + 1]
            if skipped > MAX_ROW_BYTES:
                raise ValueError(_too_long(f"{self.path}:{self.line}"))

    def value(self, place: str) -> object:
        """The JSON value at the position, which moves behind it."""
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.position)
                if end < len(self.text) or self.ended:  # a number may go on
                    break
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or self.ended:
                    raise ValueError(f"{place}: malformed JSON ({error}); the file is one list of complete objects") from error
            if len(self.text) - self.position > MAX_ROW_BYTES:
                raise ValueError(_too_long(place))
            self._more()
        self.line += self.text.count("\n", self.position, end)
        self.position = end
        return value

    def _more(self) -> bool:
        """Reads on, twice as far each time that a value is not complete; False at the end of the file."""
        if self.ended:
            return False
        kept = self.text[self.position :]
        place = f"{self.path}:{self.line}"
        data = _read(self.stream.read, max(_WINDOW, len(kept)), place, self.packing)
        try:
            self.text, self.position = kept + self.decoder.decode(data, final=not data), 0
        except UnicodeDecodeError as error:
            raise ValueError(_not_utf8(place, data, error)) from error
        self.ended = not data
        return not self.ended


def _table(path: Path, packing: str) -> Iterator[Entry]:
    """A .csv file with its columns' names in the first row; an empty cell is a missing key."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with _open(path, packing) as stream:
        reader = csv.reader(_text_lines(stream, path, packing))
        try:
            names = [name.strip() for name in next(reader, [])]
            if len(set(names)) < len(names):
                raise ValueError(f"{path}: two columns have one name; rename one of {', '.join(names)}")
            for number, cells in enumerate(reader, 1):
                place = f"{path}: row {number}"
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise ValueError(f"{place}: {len(cells)} cells under {len(names)} names; write the file again")
                yield {name: cell for name, cell in zip(names, cells) if cell}, place, number
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: malformed CSV ({error}); write the file again") from error


def _text_lines(stream, path: Path, packing: str) -> Iterator[str]:
    for number in itertools.count(1):
        place = f"{path}:{number}"
        data = _read(stream.readline, MAX_ROW_BYTES + 1, place, packing)
        if not data:
            return
        if len(data) > MAX_ROW_BYTES:
            raise ValueError(_too_long(place))
        yield _decode(data.removeprefix(codecs.BOM_UTF8) if number == 1 else data, place)


def _read(read: Callable[[int], bytes], size: int, place: str, packing: str) -> bytes:
    """Up to `size` bytes from `read`, with the ways of failing that its compression has named."""
    try:
        return read(size)
    except _UNPACK_ERRORS[packing] as error:
        name = {".gz": "gzip", ".zst": "zstd"}[packing]
        raise ValueError(
            f"{place}: cannot be unpacked as {name} ({error}); copy the file again, or drop {packing} if it is not compressed"
        ) from error


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(place, data, error)) from error


def _not_utf8(place: str, data: bytes, error: UnicodeDecodeError) -> str:
    remedy = "save the file as UTF-8"
    for magic, name in ((b"\x1f\x8b", "gz"), (b"\x28\xb5\x2f\xfd", "zst"), (b"PAR1", "parquet"), (b"ARROW1", "arrow")):
        if data.startswith(magic):
            remedy = f"this is {name} data: end the file's name in .{name}"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        remedy = "this is UTF-16: save the file as UTF-8"
    return f"{place}: invalid UTF-8 at byte {error.start} ({error.reason}); {remedy}"


def _too_long(place: str) -> str:
    return f"{place}: longer than {MAX_ROW_BYTES >> 20} MiB; split it into smaller rows"


# --- Columns -------------------------------------------------------------------------------------------------------


def columns_beside(path: Path, columns: Collection[str]) -> Counter[str]:
    """The other columns of a columnar file than these, with the rows that have a value there; of other files none.

    Nothing of the columns themselves is read, so nested ones of a Parquet file count in all rows.

    Raises ValueError for a damaged file.
    """
    ending = form_of(path).ending
    check_no_pointer(path)
    counts: Counter[str] = Counter()
    if ending == "parquet":
        with _reading(path, "Parquet"), pa.parquet.ParquetFile(path) as file:
            for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
                for name in _names_beside(file.schema_arrow, columns):
                    counts[name] += group.num_rows - _nulls(group, name)
    elif ending == "arrow":
        with _reading(path, "Arrow"), _arrow_batches(path) as (schema, batches):
            names = _names_beside(schema, columns)
            for batch in batches if names else ():
                for name in names:
                    counts[name] += batch.num_rows - batch.column(name).null_count
    return +counts


def _names_beside(schema: pa.Schema, columns: Collection[str]) -> list[str]:
    return [field.name for field in schema if field.name not in columns and not pa.types.is_null(field.type)]


def _nulls(group, name: str) -> int:
    """Nulls of a column in a row group of a Parquet file, as far as the file's statistics say."""
    leaves = [leaf for leaf in map(group.column, range(group.num_columns)) if leaf.path_in_schema == name]
    statistics = leaves[0].statistics if leaves else None
    return statistics.null_count if statistics is not None and statistics.has_null_count else 0


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as {kind} ({error}); copy or write the file again") from error


def _parquet(path: Path, columns: Collection[str]) -> Iterator[Entry]:
    with _reading(path, "Parquet"), pa.parquet.ParquetFile(path) as file:
        wanted = _wanted(path, file.schema_arrow.names, columns)
        yield from _rows(path, file.iter_batches(_ROWS, columns=wanted))


def _arrow(path: Path, columns: Collection[str]) -> Iterator[Entry]:
    with _reading(path, "Arrow"), _arrow_batches(path) as (schema, batches):
        wanted = _wanted(path, schema.names, columns)
        parts = (batch.select(wanted).slice(begin, _ROWS) for batch in batches for begin in range(0, batch.num_rows, _ROWS))
        yield from _rows(path, parts)


@contextlib.contextmanager
def _arrow_batches(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Read an Arrow file, or the stream that datasets' save_to_disk writes."""
    with pa.memory_map(str(path)) as source:
        packed = source.read(6) == b"ARROW1"
        source.seek(0)
        if packed:
            reader = pa.ipc.open_file(source)
            yield reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(source)
            yield reader.schema, iter(reader)


def _wanted(path: Path, names: list[str], columns: Collection[str]) -> list[str]:
    wanted = [name for name in names if name in columns]
    if not wanted:
        known = ", ".join(sorted(set(columns) - MEDIA))
        raise ValueError(f"{path}: no column of {known}; it has {', '.join(names)}; rename them")
    return wanted


def _rows(path: Path, batches) -> Iterator[Entry]:
    rows = itertools.chain.from_iterable(batch.to_pylist(maps_as_pydicts="lossy") for batch in batches)
    for number, value in enumerate(rows, 1):
        yield without_nulls(value), f"{path}: row {number}", number
