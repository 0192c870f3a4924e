"""The outcome of a command: values for `--json`, words for a person, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jsfdd.base.disk import free_bytes
from jsfdd.base.text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from jsfdd.data.counts import FileCounts


class Outcome(NamedTuple):
    """The outcome of a command.

    Attributes:
      values: JSON-ready, including "command" and the paths of written files.
      words: a summary for a person.
      exit_code: the process's exit code.
    """

    values: dict
    words: str
    exit_code: int = 0


def show(outcome: Outcome, as_json: bool) -> None:
    """Print an outcome on stdout."""
    if as_json:
        print(json.dumps(outcome.values, default=str, ensure_ascii=False, allow_nan=False))
    elif outcome.words:
        print(outcome.words)


def planned(
    command: str, values: dict, words: Sequence[str], out: Path, files: Sequence[str], continues: Path | None = None
) -> Outcome:
    """Make the outcome of a dry run that would write files. If `continues` exists, an earlier call was interrupted.

    Values whose names end in "_bytes" are what would be stored: if the disk has less, the words say so.

    Raises:
      NotADirectoryError: `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: not a directory; choose another --out")
    started = continues is not None and continues.exists()
    paths = [f"{out / file}{'/' if file.endswith('/') else ''}" for file in files]
    begin = "continue in" if started else "write to"
    wanted, free = _stored_bytes(values), free_bytes(out)
    values = values | {"continues": started, "would_write": paths, "wanted_bytes": wanted, "free_bytes": free}
    warning = [] if wanted <= free else [too_little_disk(out, wanted, free)]
    return described(command, values, [*words, f"{begin} {out}: {', '.join(files)}", *warning])


def too_little_disk(path: Path, wanted: float, free: float) -> str:
    """A warning that what is to be written will not fit."""
    return f"warning: about {wanted / 1e6:,.1f} MB are wanted in {path}, and the disk has {free / 1e6:,.1f} MB free; make room"


def _stored_bytes(values: dict) -> int:
    nested = sum(_stored_bytes(value) for value in values.values() if isinstance(value, dict))
    return nested + sum(value for name, value in values.items() if name.endswith("_bytes"))


def described(command: str, values: dict, words: Sequence[str]) -> Outcome:
    """Make the outcome of a dry run that would write no file."""
    lines = [f"dry run of {command}: nothing was computed or written", *map(printable, words)]
    return Outcome({"command": command, "dry_run": True} | values, "\n  ".join(lines))


def rendered(draw: Callable[[Console], None], **settings) -> str:
    """Capture what `draw` prints on a console, as text."""
    from rich.console import Console

    out = Console(highlight=False, **settings)
    with out.capture() as captured:
        draw(out)
    return captured.get()


def counts_to_json(files: Sequence[FileCounts]) -> list[dict]:
    """The counts of input files, JSON-ready."""
    return [counts.to_json() for counts in files]


def many(count: int, noun: str, ending: str = "s") -> str:
    """ "1 row", "2 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else ending}"
