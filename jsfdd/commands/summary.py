"""The results of a run of several arms: summary.json, the report's example texts, and the table on the terminal."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsfdd.base.numbers import decimals, interval
from jsfdd.commands.outcome import counts_to_json, rendered

if TYPE_CHECKING:
    from jsfdd.base.records import Sample
    from jsfdd.commands.inputs import Loaded
    from jsfdd.scoring.table import ScoreTable
    from jsfdd.selection.sfdd import Selection
    from jsfdd.training.train import TrainResult

_FIGURES = (
    "tau", "tau_low", "tau_high", "tau_macro", "speedup", "speedup_low", "speedup_high", "cost_ratio", "memory_cost_ratio",
)  # fmt: skip


def summarise(
    loaded: Loaded,
    kept: Mapping[str, Sequence[Sample]],
    held_out: Sequence[Sample],
    trained: Mapping[str, TrainResult],
    reports: Mapping[str, dict],
    seconds: Mapping[str, float],
    differences: list[dict],
) -> dict:
    """Make the content of summary.json. Tokens of an arm are those of its training samples, counted once per sample. Seconds
    are without compiling, which `seconds` has by itself."""
    from jsfdd.base.hardware import describe_hardware
    from jsfdd.data.batches import make_batches, padding_share
    from jsfdd.data.counts import total

    lengths = [len(sample.tokens) for sample in loaded.samples]
    rows = [
        {
            "arm": arm,
            "samples": len(kept[arm]),
            "tokens": sum(len(sample.tokens) for sample in kept[arm]),
            "counted_tokens": sum(int(sample.counted.sum()) for sample in kept[arm]),
            "train_seconds": result.seconds,
            "cost_seconds": cost_seconds(arm, loaded.samples, kept, held_out, result.seconds, seconds),
            "steps": result.steps,
            "held_out": result.held_out,
        }
        | {name: reports[arm][name] for name in _FIGURES}
        for arm, result in trained.items()
    ]
    versions = {name: importlib.metadata.version(name) for name in ("jsfdd", "jax", "flax", "optax", "transformers")}
    plans = make_batches(lengths, loaded.shapes)
    return {
        "versions": versions,
        "hardware": describe_hardware(),
        "target": {
            "name": loaded.target.name,
            "fingerprint": loaded.target.fingerprint,
            "vocab_size": loaded.target.config.vocab_size,
        },
        "data": loaded.summary.to_json()
        | {
            "duplicates": total(loaded.files).skipped.get("duplicates", 0),
            "files": counts_to_json(loaded.files),
            "tokens": sum(lengths),
            "counted_tokens": sum(int(sample.counted.sum()) for sample in loaded.samples),
            "padding_share": padding_share(plans, lengths),
        },
        "seconds": dict(seconds)
        | {"compiling": seconds["compiling"] + sum(result.compile_seconds for result in trained.values())},
        "arms": rows,
        "differences": differences,
    }


def cost_seconds(
    arm: str,
    samples: Sequence[Sample],
    kept: Mapping[str, Sequence[Sample]],
    held_out: Sequence[Sample],
    training: float,
    seconds: Mapping[str, float],
) -> dict[str, float]:
    """What an arm by itself would have cost, from conversations to draft, of what the run measured for all arms together.

    Every arm reads its conversations once; an arm that is chosen by scores has read all of them. `random` needs no scores: its
    part of the pass is that of its own tokens. Of the soft targets an arm has the part of its own counted tokens.
    """
    everything = {sample.id: sample for side in kept.values() for sample in side}.values()
    read = sum(len(sample.tokens) for sample in (*kept[arm], *held_out)) / sum(len(sample.tokens) for sample in samples)
    counted, all_counted = (sum(int(sample.counted.sum()) for sample in side) for side in (kept[arm], everything))
    parts = {
        "pass": seconds["score"] * (read if arm == "random" else 1.0) + seconds["hidden"],
        "soft_targets": seconds.get("soft_targets", 0.0) * counted / all_counted,
        "training": training,
    }
    return parts | {"total": sum(parts.values())}


def example_texts(loaded: Loaded, table: ScoreTable, selections: Mapping[str, Selection]) -> list[dict]:
    """The two flattest samples, two at the threshold and the two least flat, token by token.

    A token is shown with the flatness of the distribution that predicted it. The index rule stores that one position earlier.
    """
    order = [i for i in sorted(range(len(table.ids)), key=lambda i: -table["flatness"][i]) if table.num_tokens[i] > 0]
    middle = len(selections["flatness"].ids) if "flatness" in selections else len(order) // 2
    chosen = dict.fromkeys([*order[:2], *order[max(middle - 1, 0) : middle + 1], *order[-2:]])
    by_id = {sample.id: sample for sample in loaded.samples}
    texts = []
    for i in chosen:
        sample = by_id[table.ids[i]]
        per_token = table.tokens[i].flatness
        flatness = [None, *(float(f) if c else None for f, c in zip(per_token[:-1], sample.counted[:-1]))]
        pieces = [loaded.target.tokenizer.decode([token]) for token in sample.tokens]
        texts.append({"id": sample.id, "source": sample.source, "pieces": pieces, "flatness": flatness})
    return texts


def summary_words(summary: dict, report: Path) -> str:
    """The table of the arms and their differences, as text."""
    from rich import box
    from rich.table import Table

    from jsfdd.evaluation.step_cost import step_cost_words
    from jsfdd.report.table import describe_difference

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("arm", "samples", "train s", "cost s", "τ [95%]", "speedup [95%]"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for row in summary["arms"]:
        table.add_row(
            row["arm"],
            str(row["samples"]),
            f"{row['train_seconds']:.0f}",
            f"{row['cost_seconds']['total']:.0f}",
            f"{decimals(row['tau'], 3)} {interval(row['tau_low'], row['tau_high'], 3)}".rstrip(),
            f"{decimals(row['speedup'])} {interval(row['speedup_low'], row['speedup_high'])}".rstrip(),
        )

    first = summary["arms"][0]
    words = step_cost_words(first["tau"], first["cost_ratio"], first["memory_cost_ratio"])

    def draw(out):
        out.print(table)
        out.print("cost: from conversations to draft (the target's pass, soft targets, training), without compiling")
        for difference in summary["differences"]:
            out.print(describe_difference(difference))
        if words:
            out.print(words)

    return f"{rendered(draw, soft_wrap=True)}report: {report}"
