"""Results as rows, one JSON object a line: {"at": ["arms", "full", "T=0"], "value": {…}}. Short values stay whole.

A diff of such a file shows which figure changed, and `grep '"flatness 50%"'` finds an arm.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

WIDTH = 800  # characters of a row beyond which its dictionary is split


def write_results(path: Path, results: dict, width: int = WIDTH) -> None:
    """Write a nested dictionary, keys as strings."""
    lines = [json.dumps({"at": at, "value": value}, ensure_ascii=False) for at, value in _rows([], results, width)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_results(path: Path) -> dict:
    """The nested dictionary that `write_results` wrote; empty if there is no file yet."""
    results: dict = {}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else ():
        row = json.loads(line)
        part = results
        for key in row["at"][:-1]:
            part = part.setdefault(key, {})
        part[row["at"][-1]] = row["value"]
    return results


def _rows(at: list[str], value: object, width: int) -> Iterator[tuple[list[str], object]]:
    if not at or isinstance(value, dict) and value and len(json.dumps(value, ensure_ascii=False)) > width:
        for key, part in value.items():
            yield from _rows([*at, str(key)], part, width)
    else:
        yield at, value
