"""What `score.py` found, in numbers and a picture. See README.md.

    python analyse.py --on-data CHATS.jsonl --on SCORED --off DIR [--excerpts]

DIR is from `score.py`, all six metrics of every token; SCORED from `jsfdd score --per-token`, two of them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import rankdata

from experiments.results import write_results
from jsfdd.base.records import TokenScores
from jsfdd.data.chat import read_chats
from jsfdd.data.template import tokenize_chats
from jsfdd.report.panel import MUTED, STYLE
from jsfdd.scoring.flatness import effective_choices
from jsfdd.scoring.table import read_scores, read_token_scores
from jsfdd.weights.target import load_target

HERE = Path(__file__).parent
SMOKE = os.environ.get("SMOKE") == "1"
RESAMPLES, TOKEN_RESAMPLES = (20, 5) if SMOKE else (300, 60)
VOCAB = 49152
METRICS = TokenScores._fields
FIVE = {  # the mixture of the small trial, under the names that the files and the on-policy pool give its sources
    "sharegpt", "gsm8k", "gpteacher_codegen", "gpteacher_roleplay", "flan_cot/aqua",
    "chat_sharegpt", "math_gsm8k", "code_instruct", "instruct_roleplay", "math_aqua",
}  # fmt: skip
ENDS = 0.05


class Scored(NamedTuple):
    """Chats and their counted tokens.

    Attributes:
      sources, counted, truncated: [N]; counted tokens of each, and whether it was cut.
      means: float[N, 6], each chat's METRICS as `jsfdd score` aggregates them: means, and ppl = exp of the mean nll.
      tokens: of each chat.
      sample: int[n], the chat of each counted token; ascending.
      position: int[n], t.
      scores: float[n, k], the first k of METRICS.
    """

    sources: np.ndarray
    counted: np.ndarray
    truncated: np.ndarray
    means: np.ndarray
    tokens: list[np.ndarray]
    sample: np.ndarray
    position: np.ndarray
    scores: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on-data", type=Path, required=True)
    parser.add_argument("--on", type=Path, required=True)
    parser.add_argument("--off", type=Path, required=True)
    parser.add_argument("--excerpts", action="store_true", help="print the flattest and the least flat on-policy answers")
    options = parser.parse_args()
    tokenizer = load_target("smollm2").tokenizer
    by_kind = {"on-policy": from_scores(options.on, options.on_data, tokenizer), "off-policy": from_rounds(options.off)}
    results = {name: describe_samples(scored) | describe_tokens(scored, tokenizer) for name, scored in by_kind.items()}
    print(json.dumps(results, indent=1, ensure_ascii=False))
    if options.excerpts:
        show_ends(by_kind["on-policy"], tokenizer)
    if not SMOKE:
        write_results(HERE / "results.jsonl", rounded(results))
        draw(by_kind)


def from_rounds(directory: Path) -> Scored:
    """All rounds that `score.py` left in a directory, as one."""
    parts, first = [], 0
    for path in sorted(directory.glob("round-???.npz")):
        with np.load(path) as file:
            part = dict(file)
        part["tokens"] = np.split(part["tokens"], np.cumsum(part["lengths"])[:-1])
        part["sample"] = part["sample"] + first
        first += len(part["ids"])
        parts.append(part)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "tokens"}
    counted = np.bincount(joined["sample"])
    scores = joined["scores"].astype(float)
    means = np.stack([np.bincount(joined["sample"], column) / counted for column in scores.T], 1)
    means[:, -1] = np.exp(means[:, -1])
    tokens = [row for part in parts for row in part["tokens"]]
    return Scored(joined["sources"], counted, joined["truncated"], means, tokens, joined["sample"], joined["position"], scores)


def from_scores(directory: Path, data: Path, tokenizer) -> Scored:
    """What `jsfdd score --per-token` wrote of the chats in `data`."""
    table = read_scores(directory / "scores.parquet")
    rows = read_token_scores(directory / "token_scores.parquet")
    samples, summary = tokenize_chats(read_chats([data]), tokenizer, table.identity["max_length"])
    tokens = {sample.id: sample.tokens for sample in samples}
    places = [np.flatnonzero(rows[name].counted) for name in table.ids]
    scores = [np.stack([rows[name].flatness[at], rows[name].entropy[at]], 1) for name, at in zip(table.ids, places)]
    return Scored(
        sources=np.array(table.sources),
        counted=table.num_tokens,
        truncated=np.isin(table.ids, summary.truncated),
        means=np.stack([table[name] for name in (*METRICS[:5], "ppl")], 1),
        tokens=[tokens[name] for name in table.ids],
        sample=np.repeat(np.arange(len(table.ids)), table.num_tokens),
        position=np.concatenate(places),
        scores=np.concatenate(scores).astype(float),
    )


def describe_tokens(scored: Scored, tokenizer) -> dict:
    """What results.jsonl says of one set's tokens."""
    flatness = scored.scores[:, 0]
    choices = effective_choices(flatness, VOCAB)
    place = scored.position - first_positions(scored)[scored.sample]
    columns = np.column_stack([scored.scores, place, scored.counted[scored.sample]])
    names = (*METRICS[: scored.scores.shape[1]], "place in the chat", "counted tokens")
    flattest = np.sort(flatness)[-len(flatness) // 10 :]
    source = scored.sources[scored.sample]
    return {
        "cut": float(scored.truncated.mean()),
        "tokens read": sum(len(row) for row in scored.tokens),
        "token flatness": quantiles(flatness),
        "token choices exp(H2)": quantiles(choices) | {"mean": float(choices.mean())},
        "share of tokens with fewer choices than": {f"{c:g}": float(np.mean(choices < c)) for c in (1.01, 1.1, 1.5, 2, 5, 10)},
        "share of all flatness in the flattest tenth of tokens": float(flattest.sum() / flatness.sum()),
        "tokens, flatness with": correlations(scored, names, lambda chats: columns[rows_of(scored, chats)], TOKEN_RESAMPLES),
        "share of the variance of token flatness between sources": with_interval(
            scored, lambda chats: eta(flatness[rows_of(scored, chats)], source[rows_of(scored, chats)]), TOKEN_RESAMPLES
        ),
        "share of the variance of token flatness between samples": eta(flatness, scored.sample),
        "what chance gives it": (len(scored.sources) - 1) / (len(flatness) - 1),
        "tokens at the ends, by what follows": ends_by_kind(scored, flatness, tokenizer),
    }


def describe_samples(scored: Scored) -> dict:
    """What results.jsonl says of one set's chats as wholes."""
    means, sources = scored.means, scored.sources
    names = (*METRICS[:5], "ppl", "counted tokens")
    columns = np.column_stack([means, scored.counted])
    five = np.array([source in FIVE for source in sources])
    half = keeps(means[:, 0])
    return {
        "chats": len(sources),
        "tokens counted": int(scored.counted.sum()),
        "sample flatness": quantiles(means[:, 0]),
        "sample flatness by source": {
            str(s): {"chats": int(np.sum(sources == s))}
            | quantiles(means[sources == s, 0])
            | {"choices of the median": float(effective_choices(np.median(means[sources == s, 0]), VOCAB))}
            | {"kept": float(half[sources == s].mean())}
            for s in np.unique(sources)
        },
        "samples, flatness with": correlations(scored, names, lambda chats: columns[chats], RESAMPLES),
        "samples within a source, flatness with": within_source(scored, names, columns),
        "share of the variance of sample metrics between sources": {
            name: with_interval(scored, lambda chats, j=j: eta(columns[chats, j], sources[chats]), RESAMPLES)
            for j, name in enumerate(names)
        },
        "the same of flatness, five sources of the small trial": with_interval(
            scored, lambda chats: eta(means[chats, 0][five[chats]], sources[chats][five[chats]]), RESAMPLES
        ),
        "flattest half": {
            "its share of the counted tokens": float(scored.counted[half].sum() / scored.counted.sum()),
            "in the half of the highest entropy too": float(np.mean(keeps(means[:, 1])[half])),
            "in the flattest half of its own source too": float(np.mean(stratified(means[:, 0], sources)[half])),
        },
        "samples at the ends, by source": ends_by_source(means[:, 0], sources),
    }


def first_positions(scored: Scored) -> np.ndarray:
    """Where each chat's first counted token is."""
    return scored.position[np.unique(scored.sample, return_index=True)[1]]


def keeps(values: np.ndarray) -> np.ndarray:
    """bool: the upper half."""
    kept = np.zeros(len(values), bool)
    kept[np.argsort(-values, kind="stable")[: round(len(values) / 2)]] = True
    return kept


def stratified(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """bool: the upper half of each group."""
    kept = np.zeros(len(values), bool)
    for group in np.unique(groups):
        kept[groups == group] = keeps(values[groups == group])
    return kept


def eta(values: np.ndarray, groups: np.ndarray) -> float:
    """η²: the part of the variance that lies between group means."""
    _, group = np.unique(groups, return_inverse=True)
    means = (np.bincount(group, values) / np.bincount(group))[group]
    return float(means.var() / values.var())


def with_interval(scored: Scored, statistic: Callable, resamples: int) -> list:
    """[value, low, high] of statistic(chats); chats are drawn anew within each source."""
    random = np.random.default_rng(0)
    of_source = [np.flatnonzero(scored.sources == source) for source in np.unique(scored.sources)]
    drawn = [
        statistic(np.concatenate([random.choice(chats_of_source, len(chats_of_source)) for chats_of_source in of_source]))
        for _ in range(resamples)
    ]
    bounds = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
    return np.stack([statistic(np.arange(len(scored.sources))), *bounds], -1).tolist()


def rows_of(scored: Scored, chats: np.ndarray) -> np.ndarray:
    """The counted tokens of these chats, one after the other."""
    ends = np.cumsum(scored.counted)
    return np.concatenate([np.arange(end - count, end) for end, count in zip(ends[chats], scored.counted[chats])])


def correlations(scored: Scored, names: tuple[str, ...], columns: Callable, resamples: int) -> dict:
    """Of flatness, the first column, with every other one."""

    def spearman_and_pearson(chats):
        values = columns(chats)
        return np.stack([np.corrcoef(rankdata(values, axis=0), rowvar=False)[0, 1:], np.corrcoef(values, rowvar=False)[0, 1:]])

    intervals = with_interval(scored, spearman_and_pearson, resamples)
    return {kind: dict(zip(names[1:], rows)) for kind, rows in zip(("spearman", "pearson"), intervals)}


def within_source(scored: Scored, names: tuple[str, ...], columns: np.ndarray) -> dict:
    """Mean over the sources of Spearman within each."""

    def statistic(chats):
        groups = [chats[scored.sources[chats] == source] for source in np.unique(scored.sources)]
        return np.mean([np.corrcoef(rankdata(columns[g], axis=0), rowvar=False)[0, 1:] for g in groups], axis=0)

    return dict(zip(names[1:], with_interval(scored, statistic, RESAMPLES)))


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Five of them."""
    return dict(zip(("5%", "25%", "50%", "75%", "95%"), np.percentile(values, [5, 25, 50, 75, 95]).tolist()))


def kind_of(text: str) -> str:
    """What a token's text is in its word."""
    if text.startswith("<|"):
        return "end of turn"
    if "\n" in text:
        return "line break"
    bare = text.strip()
    if any(character.isdigit() for character in bare):
        return "digit"
    if not any(character.isalpha() for character in bare):
        return "punctuation or space"
    return "starts a word" if text.startswith(" ") else "continues a word or starts a line"


def ends_by_kind(scored: Scored, flatness: np.ndarray, tokenizer) -> dict:
    """Shares of kinds of the *following* token, whose distribution is scored: of all, the flattest and the least flat."""
    following = np.array([scored.tokens[chat][place + 1] for chat, place in zip(scored.sample, scored.position)])
    kind_of_token = {token: kind_of(tokenizer.decode([token])) for token in np.unique(following).tolist()}
    kinds = np.array([kind_of_token[token] for token in following.tolist()])
    low, high = np.quantile(flatness, [ENDS, 1 - ENDS])
    places = {"all": flatness > -1, "flattest 5%": flatness >= high, "least flat 5%": flatness <= low}
    return {name: {kind: float(np.mean(kinds[rows] == kind)) for kind in sorted(set(kinds))} for name, rows in places.items()}


def ends_by_source(flatness: np.ndarray, sources: np.ndarray) -> dict:
    """How many of the flattest and the least flat 5% of chats are of which source."""
    count = max(round(ENDS * len(flatness)), 1)
    order = np.argsort(flatness, kind="stable")
    return {
        name: {str(s): int(np.sum(sources[rows] == s)) for s in np.unique(sources[rows])}
        for name, rows in (("flattest 5%", order[-count:]), ("least flat 5%", order[:count]))
    }


def show_ends(scored: Scored, tokenizer) -> None:
    """How the answers at the ends begin: to read, and only of text that the target wrote."""
    flatness = scored.means[:, 0]
    order, first = np.argsort(flatness), first_positions(scored)
    for rows, name in ((order[::-1][:15], "flattest"), (order[:15], "least flat")):
        for chat in rows:
            text = tokenizer.decode(scored.tokens[chat][first[chat] :])
            choices = effective_choices(flatness[chat], VOCAB)
            print(f"{name} {scored.sources[chat]} {flatness[chat]:.4f} ({choices:.1f} choices): {text[:220]!r}")


def rounded(values: dict) -> dict:
    """The same with four digits a number."""
    return json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.4g}"))


def draw(by_kind: dict[str, Scored]) -> None:
    """flatness.png: tokens, chats by source, and flatness against entropy."""
    colours = {"on-policy": "#0072B2", "off-policy": "#D55E00"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(11, 7.6))
        edges = np.geomspace(1, 3000, 49)
        for name, scored in by_kind.items():
            choices = effective_choices(scored.scores[:, 0], VOCAB)
            weights = np.full(len(choices), 100 / len(choices))
            look = dict(histtype="step", color=colours[name], linewidth=1.6, label=name)
            axes[0, 0].hist(np.clip(choices, 1, None), edges, weights=weights, **look)
            axes[0, 0].axvline(np.median(choices), color=colours[name], linewidth=1, linestyle=(0, (2, 2)))
        ax = axes[0, 0]
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xticks(ticks := (1, 2, 5, 10, 100, 1000), [f"{tick:,}" for tick in ticks])
        ax.set_yticks(ticks := (0.01, 0.1, 1, 10), [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_xlabel("effective number of choices, exp(H₂)")
        ax.set_ylabel("% of tokens")
        ax.set_title("tokens (dashed: medians)")
        ax.legend(frameon=False)
        for ax, (name, scored) in zip((axes[0, 1], axes[1, 1]), by_kind.items()):
            flatness = scored.means[:, 0]
            sources = sorted(set(scored.sources.tolist()), key=lambda s: np.median(flatness[scored.sources == s]))
            boxes = ax.boxplot(
                [flatness[scored.sources == s] for s in sources], orientation="horizontal", widths=0.6, whis=(5, 95),
                sym="", patch_artist=True, tick_labels=[s.replace("flan_cot/", "").replace("gpteacher_", "") for s in sources],
            )  # fmt: skip
            for box, line in zip(boxes["boxes"], boxes["medians"]):
                box.set(facecolor=colours[name], alpha=0.35, linewidth=0)
                line.set(color=colours[name], linewidth=2)
            ax.axvline(np.median(flatness), color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
            ax.set_xlabel("sample flatness (box: half of the chats, line: 90%)")
            ax.set_title(f"chats, {name} (dashed: cut at one half)")
            ax.set_xlim(left=0)
        ax = axes[1, 0]
        for name, scored in by_kind.items():
            ax.plot(scored.means[:, 0], scored.means[:, 1], ".", color=colours[name], markersize=4, alpha=0.6, label=name)
        ax.set_xlabel("sample flatness")
        ax.set_ylabel("mean entropy, nats")
        ax.set_title("chats: flatness against entropy")
        ax.legend(frameon=False)
        for ax in axes.flat:
            ax.grid()
        figure.savefig(HERE / "flatness.png", dpi=80)


if __name__ == "__main__":
    main()
