"""A run as its files are at this moment, while another process writes them (`report/live_page.py` shows it).

    live = read_live(Path("demo-run"))      # of `jsfdd run`, `jsfdd demo` or `jsfdd train`
    live.trainings[0].loss, live.trainings[0].seconds_left

A training writes a line to metrics.jsonl and one to timings.jsonl every few steps. A last line that is still being written is
left out, and a training without a line has not begun.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jsfdd.base.files import read_json
from jsfdd.base.numbers import duration, whole
from jsfdd.training.journal import METRICS, TIMINGS

_STAGES = {"load": "loading the target", "score": "scoring", "hidden": "hidden states", "soft_targets": "soft targets"}
_RECENT = 5  # lines of timings.jsonl that rates are of
_REMEDY = "give the --out of `jsfdd run`, `jsfdd demo` or `jsfdd train`"


@dataclasses.dataclass(frozen=True)
class Training:
    """One draft in training; None for a figure that has not been noted yet.

    Attributes:
      name: the arm, or the directory's name.
      step, steps: taken, and of the whole run.
      loss: of the last line.
      held_out: expected acceptance at the end of the last epoch.
      tau, best_tau: of the last probe and of the best; only `jsfdd train --probe-prompts` probes.
      tokens_per_second: over the last lines.
      seconds_left: at the pace of the last lines, without compiling.
      curve, held_out_curve, tau_curve: (steps, values) of the loss, and of the others.
    """

    name: str
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    held_out: float | None = None
    tau: float | None = None
    best_tau: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    curve: tuple[list[int], list[float]] = ((), ())
    held_out_curve: tuple[list[int], list[float]] = ((), ())
    tau_curve: tuple[list[int], list[float]] = ((), ())

    @property
    def finished(self) -> bool:
        return self.steps is not None and self.step == self.steps


class Live(NamedTuple):
    """A run at this moment.

    Attributes:
      name: the directory's name.
      is_run: whether it is of `jsfdd run`, with stages and a report, or of `jsfdd train`.
      finished: whether all is done.
      doing: what it does now, in words.
      seconds: stage -> seconds, of the stages that are done.
      trainings: in the order in which they train.
    """

    name: str
    is_run: bool
    finished: bool
    doing: str
    seconds: dict[str, float]
    trainings: list[Training]

    def to_json(self) -> dict:
        """The figures, without the curves; None for what is no number any more, as the loss of a training that diverged."""
        figures = ("name", "step", "steps", "loss", "held_out", "tau", "best_tau", "tokens_per_second", "seconds_left")
        rows = [{name: _finite(getattr(training, name)) for name in figures} for training in self.trainings]
        return {**self._asdict(), "trainings": rows}


def check_run(run: Path) -> None:
    """Raise FileNotFoundError, NotADirectoryError or ValueError unless a command has begun a run in this directory."""
    if not run.exists():
        raise FileNotFoundError(f"{run}: no such directory; {_REMEDY}")
    if not run.is_dir():
        raise NotADirectoryError(f"{run}: not a directory; {_REMEDY}")
    if not any((run / name).exists() for name in ("run.json", METRICS, "checkpoints")):
        raise ValueError(f"{run}: no run in it, for it has no run.json, {METRICS} or checkpoints/; {_REMEDY}")


def read_live(run: Path) -> Live:
    """Read the run's files as they are. Errors as in `check_run`; ValueError: a file is damaged."""
    check_run(run)
    name = run.resolve().name
    if not (run / "run.json").exists():
        training = read_training(run, name)
        return Live(name, False, training.finished, _training_words([training]), {}, [training])
    trainings = [read_training(run / "arms" / arm, arm) for arm in _arms(run / "config.json")]
    seconds = read_json(run / "seconds.json", dict) if (run / "seconds.json").exists() else {}
    seconds = {stage: _number(seconds, run / "seconds.json", stage) for stage in seconds}
    finished = (run / "summary.json").exists()
    begun = [training for training in trainings if training.step]
    waiting = [words for stage, words in _STAGES.items() if stage not in seconds]
    if finished:
        doing = "finished"
    elif begun and not all(training.finished for training in trainings):
        doing = _training_words(begun)
    elif begun:
        doing = "evaluating"
    else:
        doing = waiting[0] if waiting else "about to train"
    return Live(name, True, finished, doing, seconds, trainings)


def read_training(directory: Path, name: str) -> Training:
    """A training as far as its logs go."""
    path = directory / METRICS
    metrics, timings = _whole_lines(path), _whole_lines(directory / TIMINGS)
    if not timings:
        return Training(name)

    def curve(*keys: str) -> tuple[list[int], list[float]]:
        lines = [line for line in metrics if keys[0] in line]
        return [line["step"] for line in lines], [_number(line, path, *keys) for line in lines]

    losses, accepted, taus = curve("loss"), curve("held_out", "acceptance"), curve("probe", "tau")
    step, steps = timings[-1]["step"], timings[-1].get("steps")
    return Training(
        name,
        step,
        steps,
        loss=_last(losses),
        held_out=_last(accepted),
        tau=_last(taus),
        best_tau=max(taus[1], default=None),
        tokens_per_second=timings[-1].get("tokens_per_second"),
        seconds_left=None if steps is None else seconds_left(timings, steps),
        curve=losses,
        held_out_curve=curve("held_out", "loss"),
        tau_curve=taus,
    )


def seconds_left(timings: Sequence[dict], steps: int) -> float:
    """How long a training still takes, at the pace of its last lines.

    Example:
      >>> seconds_left([{"step": 10, "seconds": 9.0, "compiling": 4.0}, {"step": 20, "seconds": 5.0}], 60)
      20.0
    """
    recent = timings[-_RECENT:]
    before = timings[-_RECENT - 1]["step"] if len(timings) > _RECENT else 0
    worked = sum(line["seconds"] - line.get("compiling", 0.0) for line in recent)
    return worked / max(recent[-1]["step"] - before, 1) * (steps - recent[-1]["step"])


def _whole_lines(path: Path) -> list[dict]:
    """The lines of a log that are written to their end; none without the file."""
    if not path.exists():
        return []
    whole_part = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]
    try:
        lines = [json.loads(line) for line in whole_part.splitlines()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: a line that is not JSON ({error}); the run wrote no such line") from None
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not isinstance(line, dict):
            raise ValueError(f"{where}: {line!r:.40} is not an object; the run wrote no such line")
        for key in ("step", "seconds") if path.name == TIMINGS else ("step",):
            _number(line, where, key)
        for key in line.keys() & {"compiling", "tokens_per_second"}:
            _number(line, where, key)
        for key in line.keys() & {"step", "steps"}:
            if not isinstance(line[key], int):
                raise ValueError(f"{where}: {key} is {line[key]!r:.40}, not a whole number; the run wrote no such line")
    return lines


def _number(record: dict, where: Path | str, *keys: str) -> float:
    """The number at `keys` of an object; ValueError names the file and the keys if there is none."""
    value = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(
            f"{where}: {'.'.join(keys)} is {value!r:.40}, not a number; another version wrote it, or it is damaged"
        )
    return value


def _arms(path: Path) -> list[str]:
    """The arms of a run's config.json; none before it is there."""
    if not path.exists():
        return []
    arms = read_json(path, dict).get("arms")
    if not isinstance(arms, list) or not all(isinstance(arm, str) for arm in arms):
        raise ValueError(f"{path}: arms is {arms!r:.40}, not a list of names; another version wrote it, or it is damaged")
    return arms


def _last(curve: tuple[Sequence[int], Sequence[float]]) -> float | None:
    return curve[1][-1] if curve[1] else None


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _training_words(trainings: Sequence[Training]) -> str:
    training = next((training for training in trainings if not training.finished), trainings[-1])
    if training.finished:
        return "finished"
    if not training.step:
        return "before its first figures: loading, storing soft targets or compiling"
    left = "" if training.seconds_left is None else f", {duration(training.seconds_left)} left"
    total = "" if training.steps is None else f" of {whole(training.steps)}"
    return f"training {training.name}: step {whole(training.step)}{total}{left}"
