"""Files that are there whole or not at all, and identities that say what a file belongs to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A path to write to in place of `path`; on leaving, its file takes the place of `path` in one step.

    If the block raises, or the process dies, `path` is what it was before; a dead process may leave `path`.tmp, which
    the next write replaces.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        yield aside
        sync(aside)  # the data before the name: a rename must not overtake it
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file's data, or a directory's names, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value) -> None:
    """A value as readable JSON, whole or not at all."""
    with written_whole(path) as aside:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path):
    """What `write_json` wrote. ValueError names a damaged file."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged JSON ({error}); delete the file and run the stage again") from error


def plain(value):
    """What JSON makes of a value: tuples become lists, keys strings. Identities are compared in this form."""
    return json.loads(json.dumps(value))


def differences(found: dict, expected: dict, prefix: str = "") -> str:
    """What differs between two JSON-ready identities, for an error: "key: found …, expected …; …"; empty if nothing."""
    parts = []
    for key in sorted(found.keys() | expected.keys()):
        ours, theirs = expected.get(key), found.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            nested = differences(theirs, ours, f"{prefix}{key}.")
            parts += [nested] if nested else []
        elif ours != theirs:
            parts.append(f"{prefix}{key}: found {theirs!r}, expected {ours!r}")
    return "; ".join(parts)


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex. FileNotFoundError names a file that is not there."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
