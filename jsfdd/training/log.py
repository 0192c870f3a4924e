"""metrics.jsonl and timings.jsonl: what happened at which step; a resumed run's file is the uninterrupted run's.

    {"step": 20, "epoch": 0, "loss": …, "hidden_loss": …, "token_loss": …, …}      the steps since the line before
    {"step": 58, "epoch": 0, "held_out": {…}}                                      the end of an epoch
    {"step": 60, "epoch": 1, "probe": {"tau": …, …}}                               a real decode of a few prompts

Wall-clock seconds can never repeat, so they have a file of their own. A run that continues at step s first drops the
lines after step s: those steps will be run, and written, again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from jsfdd.config import TrainingOptions
from jsfdd.files import written_whole
from jsfdd.training.loss import LossSums

_REMEDY = "delete this run's directory and train again"


def mean_figures(batches: Sequence[LossSums], options: TrainingOptions) -> dict[str, float]:
    """Means per counted token over several batches' sums (host scalars); all 0 if no token counts.

    `loss` weighs `hidden_loss` (SmoothL1) and `token_loss` (cross entropy, nats) as training does; `kl` is token_loss
    less the target's own entropy; `agreement` and `acceptance` are shares in [0, 1].
    """

    def total(values) -> float:
        return math.fsum(float(value) for value in values)

    count = max(total(sums.tokens.counted for sums in batches), 1.0)
    hidden_loss = total(sums.hidden_loss for sums in batches) / count
    token_loss = total(sums.tokens.cross_entropy for sums in batches) / count
    return {
        "loss": options.hidden_weight * hidden_loss + options.token_weight * token_loss,
        "hidden_loss": hidden_loss,
        "token_loss": token_loss,
        "kl": token_loss - total(sums.tokens.target_entropy for sums in batches) / count,
        "agreement": total(sums.tokens.agreement for sums in batches) / count,
        "acceptance": total(sums.tokens.acceptance for sums in batches) / count,
    }


def append_line(path: Path, line: dict) -> None:
    """Append one line and bring it to the disk: a checkpoint that follows must find it there."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def drop_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that a crash cut short; atomic. No file is an empty one."""
    if not path.exists():
        return
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    lines = [line for line in _parse(whole, path) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with written_whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def read_lines(path: Path) -> list[dict]:
    """The lines of a log; ValueError names the line that is not one."""
    return _parse(path.read_text(encoding="utf-8"), path)


def _parse(text: str, path: Path) -> list[dict]:
    lines = []
    for number, row in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(row)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}); {_REMEDY}") from None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"{path}:{number}: a line without a step; {_REMEDY}")
        lines.append(line)
    return lines
