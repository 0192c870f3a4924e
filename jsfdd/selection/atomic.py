"""Files that are either whole or not there: written aside, brought to the disk, renamed."""

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
        stream.flush()
        os.fsync(stream.fileno())
    publish(aside, path)


def publish(aside: Path, path: Path) -> None:
    """Give the finished file `aside` its name, and bring the name to the disk as well."""
    aside.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def differences(found: dict, expected: dict) -> str:
    """What differs between two identities, for an error: "key: found …, expected …; …", empty if nothing does."""
    missing = "nothing"
    keys = sorted(key for key in found.keys() | expected.keys() if found.get(key, missing) != expected.get(key, missing))
    return "; ".join(f"{key}: found {found.get(key, missing)!r}, expected {expected.get(key, missing)!r}" for key in keys)
