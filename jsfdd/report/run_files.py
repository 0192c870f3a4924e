"""Read and check a finished run's files for the report.

A missing or damaged file is an error that names it, because a page with a gap would look like a result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jsfdd.base.files import read_json
from jsfdd.scoring.table import ScoreTable, read_scores, read_token_scores
from jsfdd.selection.sfdd import Selection, read_selection
from jsfdd.training.journal import METRICS, read_metrics

_REMEDY = "finish the run with `jsfdd run` (it continues where it stopped), or give another directory"
_SUMMARY_KEYS = ("versions", "hardware", "target", "data", "seconds", "arms", "differences")
_CONFIG_KEYS = (
    "arms", "batch_size", "held_out_share", "log_every", "max_length", "max_new_tokens", "mix", "num_draft_tokens",
    "retain_ratio", "seed", "temperature", "tree_nodes", "within",
)  # fmt: skip
_ROW_KEYS = (
    "arm", "samples", "tokens", "counted_tokens", "train_seconds", "steps", "tau", "tau_low", "tau_high", "tau_macro",
    "speedup", "speedup_low", "speedup_high", "cost_seconds", "cost_ratio", "memory_cost_ratio", "held_out",
)  # fmt: skip
_REPORT_KEYS = (
    "tau", "tau_low", "tau_high", "alpha", "alpha_low", "alpha_high", "accept_counts", "tokens_per_second",
    "baseline_tokens_per_second", "n_prompts", "same_text_share", "compile_seconds", "per_source", "examples",
)  # fmt: skip
_GROUP_KEYS = ("name", "size", "sources", "kept", "arm", "kept_examples", "dropped_examples")
_TEXT_KEYS = ("id", "source", "pieces", "flatness")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One draft of a run.

    Attributes:
      name: "full", or the metric that selected its samples.
      row: the arm's row in summary.json.
      selection: the samples that the arm keeps; those held out are not trained on.
      kept: ids of the selection.
      training, held_out: lines of metrics.jsonl, by kind, in order of steps.
      report: the evaluation, from report.json.
    """

    name: str
    row: dict
    selection: Selection
    kept: frozenset[str]
    training: list[dict]
    held_out: list[dict]
    report: dict


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """Everything that a report shows.

    Attributes:
      config: the run's options, from config.json.
      summary: summary.json.
      scores: the scores of all samples; NaN for a sample without a counted token.
      token_flatness, token_entropy: float32 over the counted tokens of all samples.
      texts: example samples: {"id", "source", "pieces": [T] str, "flatness": [T] float or None}. A piece's flatness is that
        of the distribution that predicted it, None where the score does not count.
      groups: what was kept and dropped of every source or cluster, with examples (`commands/groups.py`).
      arms: in the order of the config.
    """

    config: dict
    summary: dict
    scores: ScoreTable
    token_flatness: np.ndarray
    token_entropy: np.ndarray
    texts: list[dict]
    groups: list[dict]
    arms: list[Arm]


def read_run(run: Path) -> RunFiles:
    """Read the directory of a finished `jsfdd run`.

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      ValueError: a file is damaged or lacks a field; the message names both.
    """
    run = Path(run)
    config = _read(run / "config.json", _CONFIG_KEYS)
    summary = _read(run / "summary.json", _SUMMARY_KEYS)
    rows = {_with_keys(row, _ROW_KEYS, run / "summary.json")["arm"]: row for row in summary["arms"]}
    tokens = read_token_scores(_existing(run / "token_scores.parquet")).values()
    return RunFiles(
        config=config,
        summary=summary,
        scores=read_scores(_existing(run / "scores.parquet")),
        token_flatness=np.concatenate([row.flatness[row.counted] for row in tokens]),
        token_entropy=np.concatenate([row.entropy[row.counted] for row in tokens]),
        texts=_texts(run / "texts.json"),
        groups=[_with_keys(group, _GROUP_KEYS, run / "groups.json") for group in _read(run / "groups.json")],
        arms=[_arm(run, name, rows) for name in config["arms"]],
    )


def _arm(run: Path, name: str, rows: dict[str, dict]) -> Arm:
    if name not in rows:
        raise ValueError(f"{run / 'summary.json'}: no arm {name}, which config.json has; {_REMEDY}")
    directory = run / "arms" / name
    selection = read_selection(_existing(directory / "selection.json"))
    _existing(directory / METRICS)
    lines = read_metrics(directory)
    return Arm(
        name=name,
        row=rows[name],
        selection=selection,
        kept=frozenset(selection.ids),
        training=[line for line in lines if "loss" in line],
        held_out=[line for line in lines if "held_out" in line],
        report=_read(directory / "report.json", _REPORT_KEYS),
    )


def _texts(path: Path) -> list[dict]:
    texts = [_with_keys(text, _TEXT_KEYS, path) for text in _read(path)]
    for text in texts:
        pieces, values = len(text["pieces"]), len(text["flatness"])
        if pieces != values:
            raise ValueError(f"{path}: sample {text['id']}: {pieces} pieces but {values} flatness values; {_REMEDY}")
    return texts


def _read(path: Path, keys: Iterable[str] = ()):
    return _with_keys(read_json(_existing(path)), keys, path)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {_REMEDY}")
    return path


def _with_keys(record, keys: Iterable[str], path: Path):
    missing = [key for key in keys if key not in record]
    if missing:
        raise ValueError(f"{path}: no field {', '.join(missing)}; {_REMEDY}")
    return record
