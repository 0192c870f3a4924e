"""`jsfdd select`: keep the most valuable share of the scored samples, as selection.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from jsfdd.commands.options import ProcessOptions, SelectionOptions
from jsfdd.commands.outcome import Outcome, many, planned
from jsfdd.scoring.metrics import MetricName

if TYPE_CHECKING:
    from jsfdd.selection.sfdd import Selection

EXAMPLES = """
jsfdd select --scores scored/scores.parquet --retain-ratio 0.5 --out scored
jsfdd select --scores scored/scores.parquet --metric random --seed 1 --out chance --json
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Keep the most valuable share of the scored samples."""

    selection: SelectionOptions = SelectionOptions()
    processes: ProcessOptions = ProcessOptions()
    scores: Path
    """scores.parquet from `jsfdd score`."""
    metric: MetricName = "flatness"
    """The score that ranks the samples. For every metric, the samples on which the target is least certain are kept."""
    out: Path
    """Directory for selection.json."""
    seed: int = 0
    """Seed of every random choice of the command."""


def prepare(config: SelectConfig) -> Selection:
    from jsfdd.scoring.table import read_scores
    from jsfdd.selection import sfdd

    wanted = config.selection
    table = read_scores(config.scores, prompt_states=wanted.within == "cluster")
    return sfdd.select(table, wanted.retain_ratio, metric=config.metric, within=wanted.within, seed=config.seed)


def run(config: SelectConfig, selection: Selection) -> Outcome:
    select(config, selection)
    path, kept, dropped = config.out / "selection.json", len(selection.ids), len(selection.dropped)
    ranked = sum(selection.sizes.values())
    values = {
        "command": "select",
        "metric": selection.metric,
        "retain_ratio": selection.retain_ratio,
        "within": selection.within,
        "thresholds": selection.thresholds,
        "kept": kept,
        "ranked": ranked,
        "without_counted_token": dropped,
        "selection": path,
    }
    return Outcome(values, f"{kept:,} of {many(ranked, 'sample')} kept ({dropped:,} more without a counted token): {path}")


def describe(config: SelectConfig, selection: Selection) -> Outcome:
    kept, ranked, dropped = len(selection.ids), sum(selection.sizes.values()), len(selection.dropped)
    values = {"kept": kept, "ranked": ranked, "without_counted_token": dropped, "thresholds": selection.thresholds}
    words = [f"keep {kept:,} of {many(ranked, 'sample')}; {dropped:,} more without a counted token"]
    return planned("select", values, words, config.out, ["selection.json"])


def select(config: SelectConfig, selection: Selection | None = None) -> Selection:
    """Write selection.json and return the selection."""
    from jsfdd.base.lock import sole_writer
    from jsfdd.base.processes import is_primary, wait_for_all
    from jsfdd.selection import sfdd

    selection = selection or prepare(config)
    config.out.mkdir(parents=True, exist_ok=True)
    with sole_writer(config.out):
        if is_primary():
            sfdd.write_selection(config.out / "selection.json", selection)
        wait_for_all("selection written")
    return selection
