"""results.json, a part for each script."""

from __future__ import annotations

import json
from pathlib import Path

_PATH = Path(__file__).parent / "results.json"


def recorded() -> dict[str, dict]:
    """All parts so far."""
    return json.loads(_PATH.read_text(encoding="utf-8")) if _PATH.exists() else {}


def record(part: str, values: dict) -> None:
    """Replace one part of results.json, all numbers with four digits."""
    rounded = json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.4g}"))
    parts = (recorded() | {part: rounded}).items()
    lines = [f"{json.dumps(name)}: {json.dumps(found, ensure_ascii=False)}" for name, found in parts]
    _PATH.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
