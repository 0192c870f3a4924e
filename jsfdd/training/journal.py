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

from jsfdd.base.files import written_whole
from jsfdd.training.loss import LossSums, StepSums

_REMEDY = "delete this run's directory and train again"


def mean_figures(batches: Sequence[LossSums]) -> dict[str, float | list[float]]:
    """Means per counted token over several batches' sums (host scalars); all 0 if no token counts.

    `loss` is what is minimised, over all draft steps. The others are of the first step: `hidden_loss` (SmoothL1) and
    `token_loss` (the distance, with HASS's top-k loss); where the target's distributions were at hand also `agreement`
    and `acceptance`, shares in [0, 1], with `kl` (nats) or, of a draft vocabulary, its `coverage`; of the target's likeliest
    tokens `agreement`, or that `coverage`. Of several draft steps `agreement_by_step` and `acceptance_by_step` are lists, each
    step's over the tokens that it counts.
    """
    count = max(_total(sums.counted for sums in batches), 1.0)
    by_step = [_step_figures([sums.steps[n] for sums in batches]) for n in range(len(batches[0].steps) if batches else 0)]
    if not by_step:
        return {}
    figures = {"loss": _total(sums.total for sums in batches) / count, **by_step[0]}
    if len(by_step) > 1:
        names = [name for name in ("agreement", "acceptance") if name in figures]
        figures |= {f"{name}_by_step": [each[name] for each in by_step] for name in names}
    return figures


def _step_figures(sums: Sequence[StepSums]) -> dict[str, float]:
    count = max(_total(each.tokens.counted for each in sums), 1.0)

    def mean(name: str) -> float:
        return _total(getattr(each.tokens, name) for each in sums) / count

    figures = {"hidden_loss": _total(each.hidden_loss for each in sums) / count, "token_loss": mean("distance")}
    known = sums[0].tokens
    if known.cross_entropy is not None:
        figures["kl"] = mean("cross_entropy") - mean("target_entropy")
    names = ("agreement", "acceptance", "coverage")
    return figures | {name: mean(name) for name in names if getattr(known, name) is not None}


def _total(values) -> float:
    return math.fsum(float(value) for value in values)


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
