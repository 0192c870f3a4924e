"""results.jsonl, a part for each script."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.results import read_results, write_results

_PATH = Path(__file__).parent / "results.jsonl"


def recorded() -> dict[str, dict]:
    """All parts so far."""
    return read_results(_PATH)


def record(part: str, values: dict) -> None:
    """Replace one part of results.jsonl, all numbers with four digits."""
    rounded = json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.4g}"))
    write_results(_PATH, recorded() | {part: rounded})
