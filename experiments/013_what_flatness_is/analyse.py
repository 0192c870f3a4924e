"""What `score.py` found, in numbers and a picture. See README.md.

    python analyse.py --on DIR --off DIR [--on-scores scores.parquet] [--excerpts]
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

from jsfdd.evaluation.intervals import interval
from jsfdd.evaluation.panel import MUTED, STYLE
from jsfdd.records import TokenScores
from jsfdd.selection.flatness import effective_choices
from jsfdd.selection.table import read_scores
from jsfdd.weights.load import load_target

HERE = Path(__file__).parent
SMOKE = os.environ.get("SMOKE") == "1"
RESAMPLES = 20 if SMOKE else 1000
VOCAB = 49152
METRICS = TokenScores._fields
FIVE = {  # the mixture of the small trial, under the names that the files and the on-policy pool give its sources
    "sharegpt", "gsm8k", "gpteacher_codegen", "gpteacher_roleplay", "flan_cot/aqua",
    "chat_sharegpt", "math_gsm8k", "code_instruct", "instruct_roleplay", "math_aqua",
}  # fmt: skip
ENDS = 0.05


class Scored(NamedTuple):
    """Chats and their counted tokens, of all rounds of a directory.

    Attributes:
      ids, sources, lengths, truncated: [N].
      tokens: of each chat.
      sample: int[n], the chat of each counted token; ascending.
      position: int[n], t.
      scores: float[n, 6], METRICS.
    """

    ids: np.ndarray
    sources: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    tokens: list[np.ndarray]
    sample: np.ndarray
    position: np.ndarray
    scores: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", type=Path, required=True)
    parser.add_argument("--off", type=Path, required=True)
    parser.add_argument("--on-scores", type=Path, help="scores.parquet of all on-policy chats, as `jsfdd score` wrote it")
    parser.add_argument("--excerpts", action="store_true", help="print the flattest and the least flat on-policy answers")
    options = parser.parse_args()
    tokenizer = load_target("smollm2").tokenizer
    both = {"on-policy": read(options.on), "off-policy": read(options.off)}
    results = {
        name: describe_samples(scored, np.bincount(scored.sample)) | describe_tokens(scored, tokenizer)
        for name, scored in both.items()
    }
    if options.on_scores:
        results["on-policy, all chats"] = describe_samples(*from_scores(options.on_scores))
    print(json.dumps(results, indent=1, ensure_ascii=False))
    if options.excerpts:
        show_ends(both["on-policy"], tokenizer)
    if not SMOKE:
        lines = [f"{json.dumps(name)}: {json.dumps(found, ensure_ascii=False)}" for name, found in rounded(results).items()]
        (HERE / "results.json").write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
        draw(both)


def read(directory: Path) -> Scored:
    """All rounds of a directory as one."""
    parts, first = [], 0
    for path in sorted(directory.glob("round-???.npz")):
        with np.load(path) as found:
            part = dict(found)
        ends = np.cumsum(part["lengths"])[:-1]
        part["tokens"] = np.split(part["tokens"], ends)
        part["sample"] = part["sample"] + first
        first += len(part["ids"])
        parts.append(part)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in Scored._fields if name != "tokens"}
    return Scored(tokens=[row for part in parts for row in part["tokens"]], **joined)


def describe_tokens(scored: Scored, tokenizer) -> dict:
    """What results.json says of one set of chats and its tokens."""
    flatness = scored.scores[:, 0].astype(float)
    choices = effective_choices(flatness, VOCAB)
    counted = np.bincount(scored.sample)
    place = scored.position - first_positions(scored)[scored.sample]
    columns = np.column_stack([scored.scores, place, counted[scored.sample]]).astype(float)
    names = (*METRICS, "place in the chat", "counted tokens")
    flattest = np.sort(flatness)[-len(flatness) // 10 :]
    return {
        "cut": float(scored.truncated.mean()),
        "tokens read": int(scored.lengths.sum()),
        "token flatness": quantiles(flatness),
        "token choices exp(H2)": quantiles(choices) | {"mean": float(choices.mean())},
        "share of tokens with fewer choices than": {f"{c:g}": float(np.mean(choices < c)) for c in (1.01, 1.1, 1.5, 2, 5, 10)},
        "share of all flatness in the flattest tenth of tokens": float(flattest.sum() / flatness.sum()),
        "tokens, flatness with": correlations(scored, names, lambda _, rows: columns[rows]),
        "share of the variance of token flatness between sources": with_interval(
            scored, lambda _, rows: eta(flatness[rows], scored.sources[scored.sample[rows]])
        ),
        "share of the variance of token flatness between samples": eta(flatness, scored.sample),
        "what chance gives it": (len(scored.ids) - 1) / (len(flatness) - 1),
        "tokens at the ends, by what follows": ends_by_kind(scored, flatness, tokenizer),
    }


def describe_samples(scored: Scored, counted: np.ndarray) -> dict:
    """What results.json says of one set of chats as wholes; `counted` [N] tokens each."""
    means, sources = sample_means(scored), scored.sources
    names = (*METRICS[:5], "ppl", "counted tokens")
    columns = np.column_stack([means, counted])
    five = np.array([source in FIVE for source in sources])
    half = keeps(means[:, 0])
    return {
        "chats": len(scored.ids),
        "tokens counted": int(counted.sum()),
        "sample flatness": quantiles(means[:, 0]),
        "sample flatness by source": {
            str(s): {"chats": int(np.sum(sources == s))}
            | quantiles(means[sources == s, 0])
            | {"choices of the median": float(effective_choices(np.median(means[sources == s, 0]), VOCAB))}
            | {"kept": float(half[sources == s].mean())}
            for s in np.unique(sources)
        },
        "samples, flatness with": correlations(scored, names, lambda chats, _: columns[chats]),
        "samples within a source, flatness with": within_source(scored, names, columns),
        "share of the variance of sample metrics between sources": {
            name: with_interval(scored, lambda chats, _, j=j: eta(columns[chats, j], sources[chats]))
            for j, name in enumerate(names)
        },
        "the same of flatness, five sources of the small trial": with_interval(
            scored, lambda chats, _: eta(means[chats, 0][five[chats]], sources[chats][five[chats]])
        ),
        "flattest half": {
            "its share of the counted tokens": float(counted[half].sum() / counted.sum()),
            "in the half of the highest entropy too": float(np.mean(keeps(means[:, 1])[half])),
            "in the flattest half of its own source too": float(np.mean(stratified(means[:, 0], sources)[half])),
        },
        "samples at the ends, by source": ends_by_source(means[:, 0], sources),
    }


def from_scores(path: Path) -> tuple[Scored, np.ndarray]:
    """A scores.parquet as if each chat had one token, of its means; and the counted tokens of each."""
    table = read_scores(path)
    columns = [getattr(table, name) for name in METRICS[:5]] + [np.log(table.ppl)]
    number, none = len(table.ids), np.zeros(len(table.ids), int)
    scored = Scored(
        np.array(table.ids), np.array(table.sources), table.num_tokens, none, [], np.arange(number), none, np.stack(columns, 1)
    )
    return scored, table.num_tokens


def sample_means(scored: Scored) -> np.ndarray:
    """[N, 6]: each chat's metrics, as `jsfdd score` aggregates them: means, and ppl = exp of the mean nll."""
    counts = np.bincount(scored.sample)
    means = np.stack([np.bincount(scored.sample, column) / counts for column in scored.scores.T.astype(float)], 1)
    means[:, METRICS.index("nll")] = np.exp(means[:, METRICS.index("nll")])
    return means


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


def with_interval(scored: Scored, statistic: Callable, resamples: int = RESAMPLES) -> list:
    """[value, low, high] of statistic(chats, token rows); chats are drawn anew within each source."""
    random = np.random.default_rng(0)
    starts = np.searchsorted(scored.sample, np.arange(len(scored.ids) + 1))
    of_source = [np.flatnonzero(scored.sources == source) for source in np.unique(scored.sources)]

    def rows_of(chats):
        return np.concatenate([np.arange(starts[chat], starts[chat + 1]) for chat in chats])

    drawn = []
    for _ in range(resamples):
        chats = np.concatenate([random.choice(found, len(found)) for found in of_source])
        drawn.append(statistic(chats, rows_of(chats)))
    everything = np.arange(len(scored.ids))
    value = np.asarray(statistic(everything, rows_of(everything)))
    bounds = np.percentile(drawn, [2.5, 97.5], axis=0)
    return np.stack([value, *bounds], -1).tolist()


def correlations(scored: Scored, names: tuple[str, ...], columns: Callable) -> dict:
    """Of flatness, the first column, with every other one."""

    def both(chats, rows):
        values = columns(chats, rows)
        return np.stack([np.corrcoef(rankdata(values, axis=0), rowvar=False)[0, 1:], np.corrcoef(values, rowvar=False)[0, 1:]])

    found = with_interval(scored, both, RESAMPLES // 5)
    return {kind: dict(zip(names[1:], rows)) for kind, rows in zip(("spearman", "pearson"), found)}


def within_source(scored: Scored, names: tuple[str, ...], columns: np.ndarray) -> dict:
    """Mean over the sources of Spearman within each."""

    def statistic(chats, rows):
        groups = [chats[scored.sources[chats] == source] for source in np.unique(scored.sources)]
        return np.mean([np.corrcoef(rankdata(columns[g], axis=0), rowvar=False)[0, 1:] for g in groups], axis=0)

    return dict(zip(names[1:], with_interval(scored, statistic, RESAMPLES // 5)))


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
    flatness = sample_means(scored)[:, 0]
    order, first = np.argsort(flatness), first_positions(scored)
    for rows, name in ((order[::-1][:15], "flattest"), (order[:15], "least flat")):
        for chat in rows:
            text = tokenizer.decode(scored.tokens[chat][first[chat] :])
            choices = effective_choices(flatness[chat], VOCAB)
            print(f"{name} {scored.sources[chat]} {flatness[chat]:.4f} ({choices:.1f} choices): {text[:220]!r}")


def rounded(values: dict) -> dict:
    """The same with four digits a number."""
    return json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.4g}"))


def draw(both: dict[str, Scored]) -> None:
    """flatness.png: tokens, chats by source, and flatness against entropy."""
    colours = {"on-policy": "#0072B2", "off-policy": "#D55E00"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(11, 7.6))
        edges = np.geomspace(1, 3000, 49)
        for name, scored in both.items():
            choices = effective_choices(scored.scores[:, 0].astype(float), VOCAB)
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
        for ax, (name, scored) in zip((axes[0, 1], axes[1, 1]), both.items()):
            flatness = sample_means(scored)[:, 0]
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
            ax.set_title(f"chats by source, {name} (dashed: the cut at one half)")
            ax.set_xlim(left=0)
        ax = axes[1, 0]
        for name, scored in both.items():
            means = sample_means(scored)
            ax.plot(means[:, 0], means[:, 1], ".", color=colours[name], markersize=4, alpha=0.6, label=name)
        ax.set_xlabel("sample flatness")
        ax.set_ylabel("mean entropy, nats")
        ax.set_title("chats: flatness against entropy")
        ax.legend(frameon=False)
        for ax in axes.flat:
            ax.grid()
        figure.savefig(HERE / "flatness.png", dpi=80)


if __name__ == "__main__":
    main()
