"""The log of a run. A resumed run's metrics.jsonl equals the uninterrupted run's, byte for byte.

    {"step": 20, "epoch": 0, "loss": …, "hidden_loss": …, "token_loss": …, …}      the steps since the line before
    {"step": 58, "epoch": 0, "held_out": {…}}                                      the end of an epoch
    {"step": 60, "epoch": 1, "probe": {"tau": …, …}}                               a real decode of a few prompts

metrics.sha256.json, written before each checkpoint, has the checksum of all lines up to its step: a log that was changed
since is not read as the run's.

Wall-clock seconds differ between runs, so they go to another file, timings.jsonl. A run that continues at step s first drops
the lines after step s, because it will run and log those steps again.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path

from jsfdd.base.files import append_line, read_json, write_json, written_whole
from jsfdd.base.processes import is_primary, wait_for_all
from jsfdd.training.tensorboard import open_board

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
CHECKSUM = "metrics.sha256.json"
_LONGEST = 1e12  # seconds
_REMEDY = "delete this run's directory and train again"


class Journal:
    """A run's metrics.jsonl and timings.jsonl and, where asked, TensorBoard's files. Use it in a `with`.

    Several processes each have one; process 0 writes.

    Args:
      out: the run's directory.
      start: the step at which the run goes on.
      tensorboard: whether to write TensorBoard's files, into `out`/tensorboard.

    Attributes:
      best_tau: of all probes so far, 0 before the first.
      worse_probes: how many there were since the best.
    """

    def __init__(self, out: Path, start: int, tensorboard: bool = False):
        self._out, self._start, self._with_board = out, start, tensorboard and is_primary()
        self._stack, self._board = ExitStack(), None
        if is_primary():
            if start:
                check_metrics(out)
                # Before the later lines go: a kill in between must not leave a checksum of lines that are gone.
                self.seal(start)
            else:
                (out / CHECKSUM).unlink(missing_ok=True)
            for name in (METRICS, TIMINGS):
                _drop_after(out / name, start)
        wait_for_all("later lines dropped")
        earlier = read_lines(out / METRICS) if (out / METRICS).exists() else []
        self.best_tau, self.worse_probes = 0.0, 0
        for line in earlier:
            self._look_at_probe(line)

    def __enter__(self) -> Journal:
        if self._with_board:
            self._board = self._stack.enter_context(open_board(self._out / "tensorboard", self._start))
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def note(self, line: dict) -> None:
        """Add a line to metrics.jsonl."""
        self._look_at_probe(line)
        _append(self._out / METRICS, line)
        if self._board is not None:
            self._board(line)

    def seal(self, step: int) -> None:
        """Write the checksum of the lines so far, of which `step` is the last; before the checkpoint of that step."""
        if is_primary():
            write_json(self._out / CHECKSUM, {"step": step, "sha256": _checksum(self._out / METRICS, step)})

    def _look_at_probe(self, line: dict) -> None:
        if "probe" in line:
            better = line["probe"]["tau"] > self.best_tau
            self.best_tau, self.worse_probes = max(self.best_tau, line["probe"]["tau"]), 0 if better else self.worse_probes + 1

    def note_timing(self, line: dict) -> None:
        """Add a line to timings.jsonl."""
        _append(self._out / TIMINGS, line)


def read_lines(path: Path) -> list[dict]:
    """The lines of a log; ValueError names the line that is not one."""
    return _parse(_text(path), path)


def read_metrics(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl. ValueError: a line is none, or they are not those that the run wrote."""
    check_metrics(out)
    return read_lines(out / METRICS)


def check_metrics(out: Path) -> None:
    """ValueError unless metrics.jsonl has the lines that stood there at the last checkpoint."""
    if not (out / CHECKSUM).exists():
        return  # of a run without a checkpoint, or of an earlier version
    noted = read_json(out / CHECKSUM, dict, remedy=_REMEDY)
    if set(noted) != {"step", "sha256"} or not isinstance(noted["step"], int):
        raise ValueError(f"{out / CHECKSUM}: not a step and a checksum; {_REMEDY}")
    if _checksum(out / METRICS, noted["step"]) != noted["sha256"]:
        raise ValueError(f"{out / METRICS}: not the lines that the run wrote up to step {noted['step']}; {_REMEDY}")


def _checksum(path: Path, step: int) -> str:
    """SHA-256 of the lines up to a step."""
    return hashlib.sha256(_lines_until(path, step).encode()).hexdigest()


def _lines_until(path: Path, step: int) -> str:
    """The complete lines up to a step, as text; none without a file. A kill may have cut the last line short."""
    if not path.exists():
        return ""
    whole, _, _ = _text(path).rpartition("\n")
    return "".join(json.dumps(line) + "\n" for line in _parse(whole, path) if line["step"] <= step)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); {_REMEDY}") from None


def _append(path: Path, line: dict) -> None:
    """Append one line, which is on disk before the checkpoint that follows."""
    if is_primary():
        append_line(path, line)


def _drop_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that a crash cut short, atomically. The file may be missing."""
    if not path.exists():
        return
    data = _lines_until(path, step).encode()
    with written_whole(path, len(data)) as aside:
        aside.write_bytes(data)


def _parse(text: str, path: Path) -> list[dict]:
    lines = []
    for number, row in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(row)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            raise ValueError(f"{path}:{number}: not JSON ({error}); {_REMEDY}") from None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"{path}:{number}: a line without a step; {_REMEDY}")
        if path.name == TIMINGS and not _is_duration(line.get("seconds")):
            raise ValueError(f"{path}:{number}: a line without seconds; {_REMEDY}")
        lines.append(line)
    return lines


def _is_duration(value) -> bool:
    return isinstance(value, int | float) and 0 <= value < _LONGEST
