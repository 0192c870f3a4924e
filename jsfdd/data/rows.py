"""Input files: find the files of a name, and read their rows.

A name, as `--data` and `--prompts` take it, is one of

    a file         .jsonl or .ndjson (one JSON object a line), .json (one list of objects, or objects one after the other) or
                   .csv, each also .gz or .zst; or .parquet or .arrow
    a directory    all files in it that end so, at any depth, hidden ones aside; others are not read. What datasets'
                   `save_to_disk` wrote is one dataset: of several splits the one named train
    a pattern      with *, ? or [ ]; ** stands for any depth
    hf:NAME        a Hugging Face dataset (`data.hub`)

Directories and patterns give their files in the order of their paths. Blank lines of a .jsonl file hold no row. Errors
name the file and the line (row of a .parquet file, entry of a .json list) and never show what a message says.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jsfdd.base.files import sha256
from jsfdd.data.formats import ENDINGS, Entry, columns_beside, entries_of, form_of, without_nulls
from jsfdd.data.hub import dataset_rows, is_dataset


class Row(NamedTuple):
    """One row of a file, its id and source settled.

    Attributes:
      value: nearly always an object.
      id: its own "id" if that is a text or a number; else `name`.
      name: "NAME-NUMBER": the file's name without its endings, and the row's number in it.
      source: its own "source" if that is a text or a number; else the file's name without its endings.
      place: "file:line", for errors.
      file: as `expand_names` gives it.
    """

    value: object
    id: str
    name: str
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


def expand_names(names: str | Path | Sequence[str | Path]) -> list[InputFile]:
    """Expand names to files and datasets, in order; the result is the same on every machine and at every call.

    Raises FileNotFoundError for a file that is missing, a pattern that matches no file, or a directory without one, and
    ValueError for a file that ends in something else.
    """
    inputs: list[InputFile] = []
    for name in map(str, [names] if isinstance(names, str | Path) else names):
        path = Path(name)
        if is_dataset(name):
            inputs.append(InputFile(name, re.sub(r"[/@:]", "-", name.removeprefix("hf:"))))
        elif path.is_file():
            inputs.append(_input_file(path, path.parent))
        elif path.is_dir():
            inputs += _directory(path)
        elif glob.has_magic(name):
            files = sorted(file for file in map(Path, glob.glob(name, recursive=True)) if file.is_file())
            if not files:
                raise FileNotFoundError(f"{name}: the pattern matches no file; check the path")
            fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
            inputs += [_input_file(file, fixed) for file in files]
        else:
            raise FileNotFoundError(f"{name}: no such file; check the path")
    return inputs


def input_digests(names: Sequence[str | Path]) -> dict[str, str]:
    """sha256 hex by path, in the order of `expand_names`: what a result from these inputs depends on.

    Of a dataset the rows are hashed, of a file its bytes.
    """
    paths = [file.path for file in expand_names(names)]
    return {path: _dataset_digest(path) if is_dataset(path) else sha256(Path(path)) for path in paths}


def read_rows(names: Sequence[str | Path], columns: Collection[str], beside: Counter[str] | None = None) -> Iterator[Row]:
    """The rows of all files.

    Args:
      names: see the module's docstring.
      columns: the only ones that are read of columnar files and datasets, beside "id" and "source".
      beside: to it the others are added, with the number of rows that have a value there.

    Raises FileNotFoundError for what is missing, and ValueError "file:line: what; remedy" for a damaged file, or one without
    rows.
    """
    columns = {"id", "source", *columns}
    beside = Counter() if beside is None else beside
    for file, stem in expand_names(names):
        place = None
        for value, place, number in _entries(file, columns, beside):
            row, name = value if isinstance(value, dict) else {}, f"{stem}-{number}"
            yield Row(value, label_of(row.get("id")) or name, name, label_of(row.get("source")) or stem, place, file)
        if place is None:
            raise ValueError(f"{file}: the file holds no rows; remove it from the list or write it again")


def label_of(value: object) -> str | None:
    """An id or a source as a text: of a text or a number. None for anything else, and for what UTF-8 cannot hold."""
    if type(value) is float and value.is_integer():  # what a table makes of whole numbers in a column with gaps
        value = int(value)
    text = str(value) if type(value) in (str, int, float) else ""
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return None
    return text or None


def _directory(path: Path) -> list[InputFile]:
    """The files of a directory."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in path.glob("*/state.json"))
        if "train" not in splits:
            raise FileNotFoundError(f"{path}: a saved dataset with the splits {', '.join(splits) or 'none'}; name one of them")
        path = path / "train"
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return [InputFile(str(file), file.stem) for file in _saved_files(path)]
    files = sorted(file for file in path.rglob("*") if _belongs(file.relative_to(path)) and file.is_file())
    if not files:
        raise FileNotFoundError(f"{path}: no chat or prompt file in this directory; they end in {ENDINGS}")
    return [_input_file(file, path) for file in files]


def _saved_files(path: Path) -> list[Path]:
    """The files of a dataset that `save_to_disk` wrote; others beside them are the library's cache."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [path / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path / 'state.json'}: no list of data files ({error}); save the dataset again") from error
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, but {path / 'state.json'} names it; copy the dataset again")
    return files


def _belongs(path: Path) -> bool:
    """Whether a file in a directory is one to read."""
    return form_of(path) is not None and not any(part.startswith(".") for part in path.parts)


def _input_file(path: Path, base: Path) -> InputFile:
    form = form_of(path)
    if form is None:
        raise ValueError(f"{path}: unknown file ending; expected {ENDINGS}")
    return InputFile(str(path), path.relative_to(base).with_name(form.stem).as_posix())


def _entries(file: str, columns: Collection[str], beside: Counter[str]) -> Iterator[Entry]:
    if is_dataset(file):
        rows = enumerate(dataset_rows(file, columns, beside), 1)
        return ((without_nulls(value), f"{file}: row {number}", number) for number, value in rows)
    beside.update(columns_beside(Path(file), columns))
    return entries_of(Path(file), columns)


def _dataset_digest(name: str) -> str:
    sha = hashlib.sha256()
    for row in dataset_rows(name, columns=None):
        # A value that is not JSON (an image, a date) is not read, and its repr may differ between processes.
        sha.update(json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode() + b"\n")
    return sha.hexdigest()
