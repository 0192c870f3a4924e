"""`write_report`: write a run as one HTML page, for a screen, a phone or paper.

The page is self-contained: it loads no script, font or picture. It claims no more than was measured: every figure has its n
and its interval, and if the paired interval of two drafts contains 0, the page says "no difference seen".
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.stats

from jsfdd.base.files import written_whole
from jsfdd.base.numbers import decimals, percent, signed, whole
from jsfdd.data.skipped import MEANINGS
from jsfdd.evaluation.intervals import RESAMPLES
from jsfdd.evaluation.step_cost import step_cost_words
from jsfdd.report import plots
from jsfdd.report.pages import render_template
from jsfdd.report.panel import arm_style, source_groups
from jsfdd.report.run_files import Arm, RunFiles, read_run
from jsfdd.scoring.metrics import METRICS

_MAX_PIECES = 360  # of an example text: about a screen
_MAX_IDS = 8


def write_report(run: Path, out: Path | None = None) -> Path:
    """Draw the page of a finished run and return its path: `out`, or report.html in the run's directory.

    The same run gives the same page, byte for byte. The page is written atomically.

    Raises:
      FileNotFoundError, ValueError: a file of the run is missing, damaged or lacks a field; the message names it.
    """
    run = Path(run)
    out = Path(out) if out else run / "report.html"
    page = report_page(run).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out, len(page)) as aside:
        aside.write_bytes(page)
    return out


def report_page(run: Path) -> str:
    """The HTML of a finished run's page. Errors as in `write_report`."""
    files = read_run(run)
    finished = datetime.datetime.fromtimestamp((run / "summary.json").stat().st_mtime, datetime.UTC)
    return render(files, date=f"{finished.day} {finished:%B %Y}")


def render(files: RunFiles, date: str) -> str:
    """Render the page's HTML; `date` is shown unchanged."""
    return render_template(
        "report.html",
        title=f"Drafts for {Path(files.summary['target']['name']).name}",
        date=date,
        config=files.config,
        summary=files.summary,
        arms=files.arms,
        arm_legend=[(arm.name, *arm_style(arm.name)[::2]) for arm in files.arms],
        metrics={arm.name: METRICS[arm.name] for arm in files.arms if arm.name in METRICS},
        n_prompts=files.arms[0].report["n_prompts"],
        resamples=RESAMPLES,
        options=_options(files),
        **_result(files),
        **_flatness(files),
        **_selection(files),
        **_training(files),
        **_acceptance(files),
        **_timings(files),
    )


# --- Sections: each returns the variables that the template uses -----------------------------------------------------


def _result(files: RunFiles) -> dict:
    differences = sorted(map(_oriented, files.summary["differences"]), key=lambda d: (_rank(d["a"]), -_rank(d["b"])))
    taus, speedups = ([plots.arm_dot(a, a.row, name) for a in files.arms] for name in ("tau", "speedup"))
    panels = [plots.intervals("τ by arm", taus, 1, "tokens per verification", decimals)]
    differences_seen = [d for d in differences if d["low"] is not None]
    if differences_seen:
        dots = [plots.Dot(f"{d['a']} − {d['b']}", d["tau_difference"], d["low"], d["high"]) for d in differences_seen]
        panels.append(plots.intervals("Paired differences of τ", dots, 0, "tokens per verification", signed))
    panels.append(plots.intervals("Speedup by arm", speedups, 1, "× autoregressive tokens per second", decimals))
    panels.append(plots.cost_and_gain("τ for what it cost", files.arms))
    first = files.arms[0].row
    return {
        "result_panels": panels,
        "verdicts": [verdict(difference) for difference in differences],
        "costs": costs(files.arms),
        "step_cost": step_cost_words(first["tau"], first["cost_ratio"], first["memory_cost_ratio"] or 1.0),
        "n_batches": math.ceil(files.arms[0].report["n_prompts"] / files.config["batch_size"]),
    }


def _flatness(files: RunFiles) -> dict:
    scored = files.scores.num_tokens > 0
    flatness, entropy = files.scores["flatness"][scored], files.scores["entropy"][scored]
    groups, colours = source_groups(np.array(files.scores.sources, object)[scored])
    size = files.summary["target"]["vocab_size"]
    selections = [a.selection for a in files.arms if a.name == "flatness"]
    thresholds = [s.thresholds["all"] for s in selections if s.within == "all"]  # none if each source has its own threshold
    return {
        "flatness_panels": [
            plots.source_histogram("Sample flatness", flatness, groups, colours, size, *thresholds),
            plots.flatness_against_entropy("Flatness and entropy, samples", flatness, entropy, groups, colours, size),
        ],
        "token_panels": [
            plots.token_histogram("Token flatness", files.token_flatness, size),
            plots.entropy_density("Flatness and entropy, tokens", files.token_flatness, files.token_entropy, size),
        ],
        "source_legend": [(name, colour, "●") for name, colour in colours.items()],
        "n_scored": int(scored.sum()),
        "n_unscored": int((~scored).sum()),
        "n_counted": len(files.token_flatness),
        "spearman_samples": rank_correlation(flatness, entropy),
        "spearman_tokens": rank_correlation(files.token_flatness, files.token_entropy),
        "certain_share": float(np.mean(size * files.token_flatness.astype(float) ** 2 < 2)),
    }


def _selection(files: RunFiles) -> dict:
    scored = files.scores.num_tokens > 0
    lengths = files.scores.num_tokens[scored]
    kept = {arm.name: np.array([name in arm.kept for name in files.scores.ids])[scored] for arm in files.arms}
    groups, colours = source_groups(np.array(files.scores.sources, object)[scored])
    counts = [int(np.sum(groups == name)) for name in colours]
    shares = {arm: [float(np.mean(rows[groups == name])) for name in colours] for arm, rows in kept.items()}
    panels = [plots.kept_shares("Kept, by source", list(colours), counts, shares)]
    notes = []
    for arm, rows in kept.items():
        if not rows.all():
            panels.append(plots.length_histogram(f"Lengths, {arm}", lengths[rows], lengths[~rows], arm))
            notes.append(
                f"{arm}: kept samples (filled) have a median of {whole(np.median(lengths[rows]))} counted tokens, "
                f"dropped ones (outline) {whole(np.median(lengths[~rows]))}."
            )
    deciles = np.quantile(files.token_flatness, np.arange(1, 10) / 10)
    return {
        "selection_panels": panels,
        "length_notes": notes,
        "selection_sentences": _selection_sentences(files),
        "deciles": deciles,
        "texts": [_example(text, files.arms, deciles) for text in files.texts],
        "groups": files.groups,
    }


def _example(text: dict, arms: Sequence[Arm], deciles: np.ndarray) -> dict:
    """A text for the heat map: its pieces, each with the tenth in which its flatness lies, or None."""
    levels = [None if f is None else int(np.searchsorted(deciles, f)) for f in text["flatness"]]
    counted = [f for f in text["flatness"] if f is not None]
    return {
        "id": text["id"],
        "source": text["source"],
        "sample_flatness": float(np.mean(counted)) if counted else None,
        "arms": [(arm.name, text["id"] in arm.kept) for arm in arms],
        "tokens": list(zip(text["pieces"], levels, strict=True))[:_MAX_PIECES],
        "omitted": max(0, len(text["pieces"]) - _MAX_PIECES),
    }


def _training(files: RunFiles) -> dict:
    def training(name):
        return {a.name: ([x["step"] for x in a.training], [x[name] for x in a.training]) for a in files.arms}

    def held_out(name):
        logs = {a.name: a.held_out for a in files.arms if a.held_out}
        return {arm: ([x["step"] for x in log], [x["held_out"][name] for x in log]) for arm, log in logs.items()}

    caption = "Loss: mean over the counted tokens of {} steps{}."
    if not held_out("loss"):
        return {
            "training_panels": [plots.curves("Loss", training("loss"))],
            "training_caption": caption.format(files.config["log_every"], "; no samples were held out"),
        }
    share = percent(files.config["held_out_share"])
    dashed = f"; dashed: after each epoch, on the held-out {share} of samples"
    return {
        "training_panels": [
            plots.curves("Loss", training("loss"), dashed=held_out("loss")),
            plots.curves("Held-out agreement, %", held_out("agreement"), is_share=True),
            plots.curves("Expected acceptance, %", held_out("acceptance"), is_share=True),
        ],
        "training_caption": caption.format(files.config["log_every"], dashed)
        + " Agreement: share of held-out counted tokens where the draft’s likeliest token is the target’s. Expected"
        " acceptance: Σ min(p, q) on the same tokens, at temperature 1. Arms with fewer samples take fewer steps.",
    }


def _acceptance(files: RunFiles) -> dict:
    return {
        "acceptance_panels": [
            plots.alpha_by_depth("α by depth, %", files.arms),
            plots.accepted_lengths("Accepted draft tokens", files.arms),
            plots.tau_by_source("τ by source", files.arms),
        ],
        "n_verifications": _listed([f"{whole(sum(arm.report['accept_counts']))} ({arm.name})" for arm in files.arms]),
        "same_text_caption": same_text_caption(files.config["temperature"], files.config["tree_nodes"]),
        "examples": files.arms[0].report["examples"],
    }


def _timings(files: RunFiles) -> dict:
    stages = [(name.replace("_", " "), seconds) for name, seconds in files.summary["seconds"].items()]
    stages += [(f"train, {arm.name}", arm.row["train_seconds"]) for arm in files.arms]
    total, longest = sum(s for _, s in stages), max(s for _, s in stages)
    return {"timings": [(name, s, s / total, s / longest) for name, s in stages], "total_seconds": total}


def _options(files: RunFiles) -> list[tuple[str, str]]:
    options = [(f"--{name.replace('_', '-')}", value) for name, value in files.config.items()]
    options += [(f"hardware: {name}", value) for name, value in files.summary["hardware"].items()]
    options += [(f"version: {name}", value) for name, value in files.summary["versions"].items()]
    return [(name, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for name, v in options]


# --- Sentences -------------------------------------------------------------------------------------------------------


def verdict(difference: dict) -> str:
    """The sentence that a paired τ difference supports: "no difference seen" unless its interval excludes 0."""
    a, b, low, high = (difference[key] for key in ("a", "b", "low", "high"))
    if low is None:
        return f"{a} and {b} cannot be compared: nothing was verified on the same prompts."
    measured = f"τ {signed(difference['tau_difference'])} (paired 95% interval {signed(low)} to {signed(high)})."
    if low > 0:
        return f"The {a} draft accepts more than the {b} draft: {measured}"
    if high < 0:
        return f"The {a} draft accepts less than the {b} draft: {measured}"
    return f"No difference seen between the {a} draft and the {b} draft: {measured}"


def same_text_caption(temperature: float, tree_nodes: int) -> str:
    """Explain the share of equal texts. With trees, the text equals plain decoding's at every temperature."""
    exact = temperature == 0 or tree_nodes > 0
    expected = (
        "as all should be but for logits that tie within rounding"
        if exact
        else ("a sampled chain has the same distribution, not the same text")
    )
    return f"Same text: share of prompts whose answer is the autoregressive one token for token; {expected}."


def costs(arms: Sequence[Arm]) -> list[str]:
    """Sentences that compare each arm's cost with `full`'s; empty without `full` or without another arm."""
    rows = {arm.name: arm.row for arm in arms}
    full = rows.pop("full", None)
    if full is None or not rows:
        return []
    return [
        f"The {name} arm trained on {percent(row['samples'] / full['samples'])} of the samples that full did, "
        f"{percent(row['counted_tokens'] / full['counted_tokens'])} of the counted tokens; it took "
        f"{percent(row['train_seconds'] / full['train_seconds'])} of its training time, and "
        f"{percent(row['cost_seconds']['total'] / full['cost_seconds']['total'])} of its cost from conversations to draft."
        for name, row in rows.items()
    ]


def _selection_sentences(files: RunFiles) -> list[str]:
    data, config = files.summary["data"], files.config
    share = config["held_out_share"]
    parts = [f"{whole(len(arm.kept))} in {arm.name}" for arm in files.arms]
    sentences = [f"Of {whole(data['kept'])} scored samples the arms kept {_listed(parts)}."]
    if config["within"] != "all":
        kind = {"source": "source", "cluster": "cluster of like prompts"}[config["within"]]
        sentences.append(f"They were ranked within each {kind}, of which {percent(config['retain_ratio'])} was kept.")
    if config["mix"]:
        parts = [f"{whole(arm.row['samples'])} in {arm.name}" for arm in files.arms]
        sentences.append(f"Of these a mixture was trained on ({' '.join(config['mix'])}): {_listed(parts)}.")
    if share:
        sentences.append(f"About {percent(share)} of them are held out: no arm trains on these.")
    for field, reason in MEANINGS.items():
        if isinstance(ids := data.get(field), list) and ids:
            listed = ", ".join(ids[:_MAX_IDS]) + (", …" if len(ids) > _MAX_IDS else "")
            sentences.append(f"Skipped before scoring: {whole(len(ids))} {reason} ({listed}).")
    sentences.append(
        f"Cut at {whole(config['max_length'])} tokens: {whole(len(data['truncated']))}. "
        f"Of all that the target read, {percent(data['padding_share'])} was padding."
    )
    return sentences


def _oriented(difference: dict) -> dict:
    """The same difference, with the arm that interests a reader first."""
    if _rank(difference["a"]) <= _rank(difference["b"]):
        return difference
    turned = {"a": difference["b"], "b": difference["a"]}
    if difference["low"] is None:
        return difference | turned
    return turned | {"tau_difference": -difference["tau_difference"], "low": -difference["high"], "high": -difference["low"]}


def _rank(arm: str) -> int:
    """Metrics come first, then `random`, then `full`, against which both are compared."""
    return {"random": 1, "full": 2}.get(arm, 0)


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; NaN if one side is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan  # scipy would warn
    return float(scipy.stats.spearmanr(a, b).statistic)
