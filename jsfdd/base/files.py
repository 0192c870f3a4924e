"""Atomic file writes, checked JSON, and the comparison of identities, which say what a file was made from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from jsfdd.base.disk import writing


@contextmanager
def written_whole(path: str | Path, wanted: int | None = None) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends, rename that file to `path` in one step.

    If the block raises or the process dies, `path` is unchanged. A killed process may leave `path`.tmp behind; the next
    write replaces it. A full or broken disk raises `disk.DiskError`, which says how many bytes were `wanted` if that is known.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        with writing(path, wanted):
            yield aside
            sync(aside)  # the data must be on disk before the rename is
            aside.replace(path)
            sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file's data, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_POINTER = b"version https://git-lfs"


def append_line(path: Path, line: dict) -> None:
    """Append a line of JSON to a log, and return when it is on disk."""
    data = json.dumps(line).encode() + b"\n"
    with writing(path, len(data)), path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_no_pointer(path: str | Path) -> None:
    """Raise ValueError if a file is a Git LFS pointer: what git leaves in place of a file that was not fetched."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise ValueError(
                    f"{path}: a Git LFS pointer, not the file itself; run git lfs pull in the repository that it came from"
                )


_SEAL = "sha256_of_the_rest"


def write_json(path: str | Path, value, *, indent: int = 1) -> None:
    """Write a value as indented JSON, atomically. An object gets a checksum of its own, which `read_json` compares."""
    text = json.dumps(sealed(value) if isinstance(value, dict) else value, ensure_ascii=False, allow_nan=False)
    data = msgspec.json.format(text.encode(), indent=indent) + b"\n"  # the standard library's is slow
    with written_whole(path, len(data)) as aside:
        aside.write_bytes(data)


def read_json(
    path: str | Path,
    kind: type = object,
    *,
    remedy: str = "give another file; if jsfdd wrote this one, delete it and run again",
) -> Any:
    """Read a JSON file, without the checksum that `write_json` put there.

    Args:
      path: the file.
      kind: the type that the value must have: dict, list, or object for any.
      remedy: what to do about a damaged file, for the error message.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, was changed since it was written, or holds another kind of value; names it.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; check the path") from None
    except (ValueError, RecursionError) as error:  # ValueError: also bad UTF-8 and numbers of thousands of digits
        raise ValueError(f"{path}: damaged JSON ({error}); {remedy}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected a JSON {_JSON_NAMES[kind]}, got {type(value).__name__}; {remedy}")
    return unsealed(value, path, remedy) if isinstance(value, dict) else value


def sealed(values: dict) -> dict:
    """Add a checksum of all its values to a JSON-ready object."""
    return values | {_SEAL: _checksum(values)}


def unsealed(values: dict, where: str | Path, remedy: str) -> dict:
    """Remove the checksum of `sealed`, and raise ValueError if it does not match. Objects without one are returned as is."""
    content = {key: value for key, value in values.items() if key != _SEAL}
    if _SEAL in values and values[_SEAL] != _checksum(content):
        raise ValueError(f"{where}: not what was written there: its checksum ({_SEAL}) is of other values; {remedy}")
    return content


def _checksum(values: dict) -> str:
    text = json.dumps(values, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


_JSON_NAMES = {dict: "object", list: "array"}


def decode(kind: type, values: Any, where: str | Path, *, partial: bool = False) -> Any:
    """Build a dataclass from JSON values, the inverse of `dataclasses.asdict`, and check every field.

    Dataclasses may be nested. Tuples are read from arrays, and Paths from strings.

    Args:
      kind: the dataclass.
      values: an object as `json.loads` returns it.
      where: the file, for error messages.
      partial: whether fields with a default may be missing. True suits files that people write, False files that jsfdd wrote.

    Raises:
      ValueError: a field is unknown, missing, of the wrong type, or refused by the dataclass; names `where` and the field.
    """
    _check_fields(kind, values, where, "", partial)
    try:
        return msgspec.convert(values, kind, dec_hook=_path_from_text)
    except UnicodeError as error:  # half a surrogate pair, which JSON's escapes can spell
        raise ValueError(f"{where}: {error}") from None
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        field = place.rstrip("`").lstrip(".")
        subject = f"{field} is {_value_at(values, field)!r:.80}: " if field else ""
        raise ValueError(f"{where}: {subject}{reason}") from None


@functools.cache
def _holds_records(kind) -> bool:
    return dataclasses.is_dataclass(kind) or any(map(_holds_records, typing.get_args(kind)))


def _check_fields(kind, values, where, prefix: str, partial: bool) -> None:
    """Check field names at every depth. (msgspec checks types, but accepts unknown fields, and missing ones with defaults.)"""
    if not _holds_records(kind):
        return
    arguments = typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(values, dict):
            raise ValueError(f"{where}: {prefix or kind.__name__} is {values!r:.80}: Expected `object`")
        types = typing.get_type_hints(kind)
        fields = [field for field in dataclasses.fields(kind) if field.init]
        optional = {field.name for field in fields if partial and _has_default(field)}
        names = {field.name for field in fields}
        for problem, wrong in (("unknown", set(values) - names), ("missing", names - optional - set(values))):
            if wrong:
                listed = ", ".join(prefix + name for name in sorted(wrong))
                raise ValueError(f"{where}: {problem}: {listed}; {kind.__name__} has {', '.join(sorted(names))}")
        for name in names & set(values):
            _check_fields(types[name], values[name], where, f"{prefix}{name}.", partial)
    elif isinstance(values, dict):
        inner = next((part for part in arguments if dataclasses.is_dataclass(part)), None)
        if inner is not None and typing.get_origin(kind) is dict:
            for key, value in values.items():
                _check_fields(inner, value, where, f"{prefix}{key}.", partial)
        elif inner is not None:  # Kind | None
            _check_fields(inner, values, where, prefix, partial)
    elif isinstance(values, list) and arguments:
        for position, value in enumerate(values):
            _check_fields(arguments[0], value, where, f"{prefix}{position}.", partial)


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _path_from_text(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"Expected `{kind.__name__}`, got `{type(value).__name__}`")


def _value_at(values: Any, field: str) -> Any:
    """The value at a path from a msgspec error, such as "ids[3]" or "draft.layers", as far as the path can be followed."""
    for key, position in re.findall(r"(\w+)|\[(\d+)\]", field):
        if isinstance(values, dict) and key in values:
            values = values[key]
        elif isinstance(values, list) and position:
            values = values[int(position)]
    return values


def plain(value):
    """Round-trip a value through JSON: tuples become lists, keys become strings. Identities are compared in this form."""
    return json.loads(json.dumps(value))


def differences(actual: dict, expected: dict, prefix: str = "") -> str:
    """Describe where two JSON-ready identities differ, as "key: found …, expected …; …"; empty if they are equal."""
    parts = []
    for key in sorted(actual.keys() | expected.keys()):
        value, wanted = actual.get(key), expected.get(key)
        if isinstance(value, dict) and isinstance(wanted, dict):
            nested = differences(value, wanted, f"{prefix}{key}.")
            parts += [nested] if nested else []
        elif value != wanted:
            parts.append(f"{prefix}{key}: found {value!r}, expected {wanted!r}")
    return "; ".join(parts)


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file, in hex. FileNotFoundError names a file that does not exist."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
