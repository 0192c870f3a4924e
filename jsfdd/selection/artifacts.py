"""What every file of this room keeps to: it is whole or not there, and it says what it belongs to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`path` with what `write(stream)` puts into it, replacing a file of that name.

    A crash leaves the old file or none, and perhaps `path` + ".tmp", which the next write replaces.
    """
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as stream:
        write(stream)
        sync(stream)
    publish(aside, path)


def sync(stream: BinaryIO) -> None:
    """Bring what was written to the disk itself: a rename must not overtake it."""
    stream.flush()
    os.fsync(stream.fileno())


def publish(aside: Path, path: Path) -> None:
    """Give the finished and synced file `aside` its name, and bring the name to the disk as well."""
    aside.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


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
