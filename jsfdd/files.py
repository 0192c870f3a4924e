"""Files that are there whole or not at all: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A path to write to in place of `path`; on leaving, its file takes the place of `path` in one step.

    If the block raises, or the process dies, `path` is what it was before.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield aside
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


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
