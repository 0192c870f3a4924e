"""A finished run's files, read and checked once, for the report.

Everything the report shows comes from here, so a missing or unreadable file is an error that names it: a page with a
silent gap would look like a result.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from jsfdd.config import RunConfig
from jsfdd.training.log import read_lines

_REMEDY = "finish the run with `jsfdd run` (it continues where it stopped), or give another --run"
_SUMMARY_KEYS = ("versions", "hardware", "target", "data", "seconds", "arms", "differences")
_ROW_KEYS = (
    "arm", "samples", "tokens", "counted_tokens", "train_seconds", "steps", "tau", "tau_low", "tau_high", "tau_macro",
    "speedup", "speedup_low", "speedup_high", "held_out",
)  # fmt: skip
_REPORT_KEYS = (
    "tau", "tau_low", "tau_high", "alpha", "alpha_low", "alpha_high", "accept_counts", "tokens_per_second",
    "baseline_tokens_per_second", "n_prompts", "same_text_share", "compile_seconds", "per_source", "examples",
)  # fmt: skip
_TEXT_KEYS = ("id", "source", "pieces", "flatness")
_SCORE_COLUMNS = ("id", "source", "num_tokens", "flatness", "entropy")
_TOKEN_COLUMNS = ("id", "counted", "flatness", "entropy")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One draft of a run.

    Attributes:
      name: "full", or the metric that selected its samples.
      row: its row of summary.json.
      selection: its selection.json.
      kept: ids of the samples it was trained on.
      training, held_out: lines of metrics.jsonl, by kind, in order of steps.
      report: its report.json, the evaluation.
    """

    name: str
    row: dict
    selection: dict
    kept: frozenset[str]
    training: list[dict]
    held_out: list[dict]
    report: dict


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """All that a report shows.

    Attributes:
      config: the run's options.
      summary: summary.json.
      scores: column -> array[N], one entry a sample; flatness and entropy (nats) are NaN where num_tokens is 0.
      token_flatness, token_entropy: float32 over the counted tokens of all samples.
      texts: example samples: {"id", "source", "pieces": [T] str, "flatness": [T] float or None}.
      arms: in the order of the config.
    """

    config: RunConfig
    summary: dict
    scores: dict[str, np.ndarray]
    token_flatness: np.ndarray
    token_entropy: np.ndarray
    texts: list[dict]
    arms: list[Arm]


def read_run(run: Path) -> RunFiles:
    """Read the directory of a finished `jsfdd run`.

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      ValueError: a file is damaged or lacks a field or column; the message names both.
    """
    run = Path(run)
    config = RunConfig.from_json(_json(run / "config.json"))
    summary = _record(_json(run / "summary.json"), _SUMMARY_KEYS, run / "summary.json")
    rows = {_record(row, _ROW_KEYS, run / "summary.json")["arm"]: row for row in summary["arms"]}
    scores = {name: column.to_numpy() for name, column in _columns(run / "scores.parquet", _SCORE_COLUMNS).items()}
    tokens = _columns(run / "token_scores.parquet", _TOKEN_COLUMNS)
    counted = tokens["counted"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    flatness, entropy = (tokens[name].combine_chunks().flatten().to_numpy() for name in ("flatness", "entropy"))
    if not len(counted) == len(flatness) == len(entropy):
        raise ValueError(f"{run / 'token_scores.parquet'}: columns counted, flatness and entropy differ in length; {_REMEDY}")
    return RunFiles(
        config=config,
        summary=summary,
        scores=scores,
        token_flatness=flatness[counted],
        token_entropy=entropy[counted],
        texts=_texts(run / "texts.json"),
        arms=[_arm(run, name, rows) for name in config.arms],
    )


def _arm(run: Path, name: str, rows: dict[str, dict]) -> Arm:
    if name not in rows:
        raise ValueError(f"{run / 'summary.json'}: arm {name} of config.json is missing; {_REMEDY}")
    directory = run / "arms" / name
    selection = _record(_json(directory / "selection.json"), ("ids",), directory / "selection.json")
    lines = read_lines(_existing(directory / "metrics.jsonl"))
    report = _record(_json(directory / "report.json"), _REPORT_KEYS, directory / "report.json")
    return Arm(
        name=name,
        row=rows[name],
        selection=selection,
        kept=frozenset(selection["ids"]),
        training=[line for line in lines if "loss" in line],
        held_out=[line for line in lines if "held_out" in line],
        report=report,
    )


def _texts(path: Path) -> list[dict]:
    texts = [_record(text, _TEXT_KEYS, path) for text in _json(path)]
    for text in texts:
        if len(text["pieces"]) != len(text["flatness"]):
            raise ValueError(
                f"{path}: sample {text['id']}: {len(text['pieces'])} pieces but {len(text['flatness'])} flatness values; "
                f"{_REMEDY}"
            )
    return texts


def _json(path: Path):
    try:
        return json.loads(_existing(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); {_REMEDY}") from None


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {_REMEDY}")
    return path


def _columns(path: Path, names: Iterable[str]) -> dict[str, pyarrow.ChunkedArray]:
    try:
        table = pyarrow.parquet.read_table(_existing(path))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole Parquet file ({error}); {_REMEDY}") from None
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; {_REMEDY}")
    return {name: table[name] for name in names}


def _record(record: dict, keys: Iterable[str], path: Path) -> dict:
    missing = [key for key in keys if key not in record]
    if missing:
        raise ValueError(f"{path}: no field {', '.join(missing)}; {_REMEDY}")
    return record
