"""What each command says when it is done: a line of words, and what `--json` prints for scripts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from jsfdd.commands.configs import (
    EvaluateConfig,
    ExportConfig,
    RespondConfig,
    RunConfig,
    ScoreConfig,
    SelectConfig,
    TrainConfig,
)
from jsfdd.commands.hidden_stage import FOLDER
from jsfdd.commands.respond import Responses
from jsfdd.data.counts import FileCounts
from jsfdd.evaluation.evaluate import compare
from jsfdd.report.table import describe_difference, print_evaluation
from jsfdd.scoring.table import ScoreTable
from jsfdd.selection.sfdd import Selection
from jsfdd.training.train import TrainResult


class Result(NamedTuple):
    """A finished command.

    Attributes:
      values: JSON-ready; "command" and the paths of what was written among them.
      words: the same in short, for a person.
    """

    values: dict
    words: str


def show(result: Result, as_json: bool) -> None:
    """Print a result on stdout."""
    print(json.dumps(result.values, default=str, ensure_ascii=False, allow_nan=False) if as_json else result.words)


def of_respond(config: RespondConfig, responses: Responses) -> Result:
    counts = responses.counts()
    words = f"{counts['conversations']:,} conversations, {counts['answers']:,} answers of {counts['tokens']:,} tokens"
    if counts["truncated_answers"]:
        words += f", {counts['truncated_answers']:,} of them cut at --max-new-tokens {config.max_new_tokens}"
    early = {
        "after such an answer": counts["ended_after_truncated"],
        "for their length": counts["ended_too_long"],
        "at what the chat template refuses": counts["ended_refused"],
    }
    ended = ", ".join(f"{count:,} {reason}" for reason, count in early.items() if count)
    words += f"; ended early: {ended}" if ended else ""
    words += "" if responses.tau is None else f"; τ {responses.tau:.2f}"
    values = {"command": "respond"} | counts | {"tau": responses.tau, "chats": config.out}
    return Result(values | {"files": counts_to_json(responses.files)}, f"{words}: {config.out}")


def of_score(config: ScoreConfig, table: ScoreTable, files: list[FileCounts]) -> Result:
    path = config.out / "scores.parquet"
    values = {"command": "score", "samples": len(table.ids), "scores": path, "files": counts_to_json(files)}
    words = f"{len(table.ids)} samples scored: {path}"
    if config.keep_features:
        values["features"] = config.out / FOLDER
        words += f"; hidden states kept for {' '.join(config.keep_features)}: {values['features']}"
    return Result(values, words)


def of_select(config: SelectConfig, selection: Selection) -> Result:
    path, kept, dropped = config.out / "selection.json", len(selection.ids), len(selection.dropped)
    values = {
        "command": "select",
        "metric": selection.metric,
        "retain_ratio": selection.retain_ratio,
        "within": selection.within,
        "thresholds": selection.thresholds,
        "kept": kept,
        "without_counted_token": dropped,
        "selection": path,
    }
    return Result(values, f"{kept} samples kept ({dropped} without a counted token): {path}")


def of_train(config: TrainConfig, result: TrainResult, files: list[FileCounts]) -> Result:
    names = ("steps", "samples", "tokens", "seconds", "held_out")
    values = {"command": "train"} | {name: getattr(result, name) for name in names}
    values |= {"draft": config.out, "files": counts_to_json(files)}
    return Result(values, f"{result.steps} steps on {result.samples} samples in {result.seconds:.0f} s: {config.out}")


def of_evaluate(config: EvaluateConfig, reports: dict[str, dict]) -> Result:
    """Of each draft's report the figures alone; prompts and examples are in its file."""
    differences = compare(reports, config.seed)
    drafts = {
        name: {key: value for key, value in report.items() if isinstance(value, int | float) or value is None}
        | {key: report[key] for key in ("alpha", "accept_counts", "combined", "drafts") if key in report}
        for name, report in reports.items()
    }
    # A figure cut off is worse than a line that wraps.
    out = Console(highlight=False, soft_wrap=True, width=max(Console().width, 100))
    with out.capture() as captured:
        print_evaluation(reports, differences, out)
    values = {"command": "evaluate", "drafts": drafts, "differences": differences, "out": config.out}
    return Result(values, f"{captured.get()}{config.out}")


def of_export(config: ExportConfig) -> Result:
    values = {"command": "export", "flavour": config.flavour, "draft": config.out}
    values["files"] = sorted(file.name for file in config.out.iterdir())
    return Result(values, f"{config.flavour} draft: {config.out}")


def of_run(config: RunConfig, summary: dict) -> Result:
    paths = {"summary": config.out / "summary.json", "report": config.out / "report.html"}
    names = ("arms", "differences", "data", "seconds")
    return Result({"command": "run"} | {name: summary[name] for name in names} | paths, _run_words(summary, paths["report"]))


def counts_to_json(files: list[FileCounts]) -> list[dict]:
    """The counts of `data.summary`, JSON-ready."""
    return [dataclasses.asdict(counts) for counts in files]


def _run_words(summary: dict, report: Path) -> str:
    """The table of the arms, and how they differ."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("arm", "samples", "tokens", "train s", "τ [95%]", "speedup [95%]"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for row in summary["arms"]:
        table.add_row(
            row["arm"],
            str(row["samples"]),
            str(row["counted_tokens"]),
            f"{row['train_seconds']:.0f}",
            f"{row['tau']:.3f} [{row['tau_low']:.3f}, {row['tau_high']:.3f}]",
            f"{row['speedup']:.2f} [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]",
        )
    out = Console(highlight=False, soft_wrap=True)
    with out.capture() as captured:
        out.print(table)
        for difference in summary["differences"]:
            out.print(describe_difference(difference))
    return f"{captured.get()}report: {report}"
