"""What one step towards SmolLM2's own distributions is worth, from those of a partly trained draft. See README.md."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, Float
from scipy.stats import rankdata

from jsfdd.base.records import Sample
from jsfdd.data.batches import bucket_lengths, pad_rows
from jsfdd.data.chat import read_chats
from jsfdd.data.template import tokenize_chats
from jsfdd.evaluation.intervals import interval
from jsfdd.models.draft import EagleLayer
from jsfdd.models.target import embed_tokens, head_logits, hidden_states
from jsfdd.report.panel import INK, MUTED, STYLE
from jsfdd.scoring.flatness import effective_choices, token_scores
from jsfdd.weights.draft import load_draft
from jsfdd.weights.target import Target, load_target

from .record import record, recorded
from .step import budgeted_step, gain

HERE = Path(__file__).parent
SMOKE = os.environ.get("SMOKE") == "1"
BUDGETS = (0.001, 0.01, 0.1, 0.5, 2.0)  # nats
RATES = (0.1, 1.0, 10.0)  # η of z_q += η(p − q)
ROWS, BATCH = 64, 4
RESAMPLES, GROUPS = (20, 2) if SMOKE else (500, 10)
# Bins of log p/q. All that the step does to an event depends on p/q alone, so events of one ratio may be added up; an
# edge at 0 keeps ‖p − q‖₁ exact.
EDGES = np.linspace(-20, 20, 401)
# What each metric says of a token, signed so that more means more uncertain or further off: the end that selection keeps.
OF_TARGET = {"flatness": 1, "entropy": 1, "top1": -1, "margin": -1, "energy": 1, "nll": 1}
OF_DRAFT = {"draft entropy": 1, "‖p−q‖₁": 1, "KL(p‖q)": 1, "1/√Σp²/q": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="of the draft, in results.jsonl and the picture")
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--on-policy", type=Path, nargs="+", required=True, help="chats that the target wrote itself")
    parser.add_argument("--off-policy", type=Path, nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=1 if SMOKE else 12, help="chats of each source, by their ids' hashes")
    parser.add_argument("--tokens", type=int, default=16 if SMOKE else 60, help="of each chat, its first counted ones")
    parser.add_argument("--work", type=Path, required=True, help="where distances are kept, so that plots cost nothing")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, files in (("on-policy", options.on_policy), ("off-policy", options.off_policy)):
        path = options.work / f"{name}.npz"
        if not path.exists():
            measure(options, files, path)
        with np.load(path) as columns:
            results[name] = summarise(dict(columns))
    if not SMOKE:
        record(options.name, results)
        draw(
            {
                (name, text): figures
                for name, part in recorded().items()
                if "on-policy" in part
                for text, figures in part.items()
            }
        )


def measure(options: argparse.Namespace, files: Sequence[Path], path: Path) -> None:
    """One .npz of columns, a row a token: where it is, what p and q are like, and what each step gains."""
    target = load_target("smollm2")
    config, params, _ = load_draft(options.draft)
    samples = choose(read_chats(files), target, options.samples)
    columns = defaultdict(list)
    for begin in range(0, len(samples), BATCH):
        for number, p_hidden, q_hidden, following in read_tokens(target, config, params, samples, begin, options.tokens):
            columns["sample"].append(np.full(len(following), number))
            columns["hidden"].append(p_hidden)
            columns["draft_hidden"].append(q_hidden)
            columns["following"].append(following)
    columns = {name: np.concatenate(parts) for name, parts in columns.items()}
    hidden, draft_hidden, following = (columns.pop(name) for name in ("hidden", "draft_hidden", "following"))
    total, blocks = len(following), []
    compare = jax.jit(partial(compare_block, target.config))
    for begin in range(0, total, ROWS):
        rows = np.minimum(np.arange(begin, begin + ROWS), total - 1)
        compared = compare(target.params, hidden[rows], draft_hidden[rows], following[rows])
        blocks.append({name: np.asarray(values)[: total - begin] for name, values in compared.items()})
        print(f"{min(begin + ROWS, total)}/{total} tokens", end="\r", flush=True)
    columns |= {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    p, q = columns.pop("p_bins").astype(float), columns.pop("q_bins").astype(float)
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log(p), np.log(q)
    for theta in BUDGETS:
        columns[f"θ = {theta:g}"] = gain(p, q, budgeted_step(log_p, log_q, theta))
    some = np.linspace(0, total - 1, 2 if SMOKE else 24).astype(int)
    exact = [whole_vocabulary_gain(target, hidden[i], draft_hidden[i], 0.1) for i in some]
    difference = np.abs(np.array(exact) / columns["θ = 0.1"][some] - 1).max()
    columns["bins_against_vocabulary"] = np.array([difference])
    columns["sources"] = np.array([sample.source for sample in samples])
    np.savez(path, **columns)


def choose(chats, target: Target, count: int) -> list[Sample]:
    """The first `count` chats of each source by their ids' hashes, cut at 256 tokens."""
    of_source = defaultdict(list)
    for chat in sorted(chats, key=lambda chat: hashlib.sha256(chat.id.encode()).hexdigest()):
        of_source[chat.source].append(chat)
    chosen = [chat for chats_of_source in of_source.values() for chat in chats_of_source[:count]]
    return tokenize_chats(chosen, target.tokenizer, 256)[0]


def read_tokens(target: Target, config, params: dict, samples: Sequence[Sample], begin: int, limit: int):
    """(sample number, h [n, D], the draft's guess of h [n, D], token after each [n]) of the samples of one batch."""
    batch = samples[begin : begin + BATCH]
    shape = BATCH, bucket_lengths(max(len(sample.tokens) for sample in samples))[-1]
    tokens = jnp.asarray(pad_rows([sample.tokens for sample in batch], shape))
    hidden, guessed = map(np.asarray, _hidden_and_guess(target.config, config, target.params, params, tokens))
    for row, sample in enumerate(batch):
        # The draft's output at t − 1 stands for h_t; the first position has none.
        places = np.flatnonzero(sample.counted & (np.arange(len(sample.tokens)) > 0))[:limit]
        yield begin + row, hidden[row, places], guessed[row, places - 1], sample.tokens[places + 1]


@partial(jax.jit, static_argnums=(0, 1))
def _hidden_and_guess(target_config, config, target_params, params, tokens):
    hidden = hidden_states(target_config, target_params, tokens)
    embedding = embed_tokens(target_config, target_params, jnp.roll(tokens, -1, axis=1))
    return hidden, EagleLayer(config).apply({"params": params}, embedding, hidden)


def compare_block(config, params: dict, hidden: Float[Array, "n D"], guessed: Float[Array, "n D"], following) -> dict:
    """Columns of n tokens, and p and q added up by bins of log p/q."""
    z_p, z_q = head_logits(config, params, hidden), head_logits(config, params, guessed)
    log_p, log_q = jax.nn.log_softmax(z_p), jax.nn.log_softmax(z_q)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    columns = dict(token_scores(z_p, following)._asdict())
    columns["draft entropy"] = token_scores(z_q, following).entropy
    columns["‖p−q‖₁"] = distance = jnp.sum(jnp.abs(p - q), axis=1)
    columns["KL(p‖q)"] = jnp.sum(p * (log_p - log_q), axis=1)
    columns["1/√Σp²/q"] = jnp.exp(-0.5 * jax.nn.logsumexp(2 * log_p - log_q, axis=1))
    columns["agree"] = jnp.argmax(z_p, axis=1) == jnp.argmax(z_q, axis=1)
    for rate in RATES:
        columns[f"η = {rate:g}"] = distance - jnp.sum(jnp.abs(p - jax.nn.softmax(z_q + rate * (p - q))), axis=1)
    bins = jnp.clip(jnp.digitize(log_p - log_q, EDGES) - 1, 0, len(EDGES) - 2)
    add_up = jax.vmap(partial(jax.ops.segment_sum, num_segments=len(EDGES) - 1))
    return columns | {"p_bins": add_up(p, bins), "q_bins": add_up(q, bins)}


def whole_vocabulary_gain(target: Target, hidden: np.ndarray, guessed: np.ndarray, theta: float) -> float:
    """ΔL1 of one token, no bins: the slow twin."""
    logits = [head_logits(target.config, target.params, jnp.asarray(h)[None]) for h in (hidden, guessed)]
    log_p, log_q = (np.asarray(jax.nn.log_softmax(z), np.float64) for z in logits)
    log_p, log_q = (x - np.log(np.exp(x).sum()) for x in (log_p, log_q))
    return float(gain(np.exp(log_p), np.exp(log_q), budgeted_step(log_p, log_q, theta))[0])


def summarise(columns: dict[str, np.ndarray]) -> dict:
    """Rank correlations, what the upper half holds, and ΔL1 by tenths of flatness; 95% intervals over chats."""
    gains = [f"θ = {theta:g}" for theta in BUDGETS] + [f"η = {rate:g}" for rate in RATES]
    metrics = OF_TARGET | OF_DRAFT
    x = np.stack([sign * columns[name].astype(float) for name, sign in metrics.items()], 1)
    y = np.stack([columns[name] for name in gains], 1)
    sample, sources = columns["sample"], columns["sources"]
    of_chat = [np.flatnonzero(sample == number) for number in range(len(sources))]
    random = np.random.default_rng(0)
    draws = [np.concatenate([of_chat[i] for i in random.integers(0, len(sources), len(sources))]) for _ in range(RESAMPLES)]
    everything = np.arange(len(sample))
    means = np.stack([np.concatenate([x[rows], y[rows]], 1).mean(0) for rows in of_chat])
    chat_draws = random.integers(0, len(sources), (RESAMPLES, len(sources)))
    figures = {
        "chats": len(sources),
        "tokens": len(sample),
        "sources": sorted(set(sources.tolist())),
        "top-1 agreement": float(columns["agree"].mean()),
        "mean ‖p−q‖₁": float(columns["‖p−q‖₁"].mean()),
        "median KL(p‖q)": float(np.median(columns["KL(p‖q)"])),
        "share with KL(p‖q) within the budget": {f"{t:g}": float(np.mean(columns["KL(p‖q)"] <= t)) for t in BUDGETS},
        "largest relative difference of bins from the whole vocabulary": float(columns["bins_against_vocabulary"][0]),
        "mean gain": dict(zip(gains, y.mean(0).tolist())),
        "spearman of tokens": table(spearman, x, y, everything, draws, metrics, gains),
        "spearman of tokens within a source": table(
            partial(spearman_within, groups=sources[sample]), x, y, everything, draws[: RESAMPLES // 5], metrics, gains
        ),
        "each source": {
            source: one_source(columns, x, y, np.flatnonzero(sources[sample] == source), metrics, gains)
            for source in sorted(set(sources.tolist()))
        },
        "gain of the upper half / gain of all": table(upper_half, x, y, everything, draws, metrics, gains),
        "spearman of chats": table(
            spearman, means[:, : x.shape[1]], means[:, x.shape[1] :], np.arange(len(sources)), chat_draws, metrics, gains
        ),
    }
    edges = np.quantile(columns["flatness"], np.linspace(0, 1, GROUPS + 1)[1:-1])
    tenth = np.digitize(columns["flatness"], edges)
    curves = np.stack([group_means(y, tenth, rows) for rows in [everything, *draws]])
    figures["by tenth of flatness"] = {
        "choices": [float(effective_choices(np.median(columns["flatness"][tenth == k]), 49152)) for k in range(GROUPS)],
        "distance": [float(columns["‖p−q‖₁"][tenth == k].mean()) for k in range(GROUPS)],
        "kl": [float(columns["KL(p‖q)"][tenth == k].mean()) for k in range(GROUPS)],
    } | {name: [[float(curves[0, k, j]), *interval(curves[1:, k, j])] for k in range(GROUPS)] for j, name in enumerate(gains)}
    return figures


def table(statistic, x, y, everything, draws, metrics, gains) -> dict[str, dict[str, list[float]]]:
    """gain -> metric -> [value, low, high] of a statistic(x, y, rows) -> [metrics, gains]."""
    value, resampled = statistic(x, y, everything), np.stack([statistic(x, y, rows) for rows in draws])
    return {
        name: {m: [float(value[i, j]), *interval(resampled[:, i, j])] for i, m in enumerate(metrics)}
        for j, name in enumerate(gains)
    }


def one_source(columns, x, y, rows, metrics, gains) -> dict:
    """How far the draft is on one source, and gain -> metric -> Spearman there."""
    ranks = spearman(x, y, rows)
    return {
        "tokens": len(rows),
        "top-1 agreement": float(columns["agree"][rows].mean()),
        "acceptance": float(1 - columns["‖p−q‖₁"][rows].mean() / 2),
        "spearman": {name: dict(zip(metrics, ranks[:, j].tolist())) for j, name in enumerate(gains)},
    }


def spearman(x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Of every column of x with every column of y."""
    ranks = np.concatenate([rankdata(x[rows], axis=0), rankdata(y[rows], axis=0)], 1)
    return np.corrcoef(ranks, rowvar=False)[: x.shape[1], x.shape[1] :]


def spearman_within(x: np.ndarray, y: np.ndarray, rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Its mean over groups, a token a vote."""
    present, sizes = np.unique(groups[rows], return_counts=True)
    parts = [spearman(x, y, rows[groups[rows] == group]) for group in present]
    return np.average(parts, axis=0, weights=sizes)


def upper_half(x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean gain of the half of the tokens that a metric keeps, over the mean of all."""
    x, y = x[rows], y[rows]
    kept = np.argsort(-x, axis=0, kind="stable")[: len(rows) // 2]
    return np.stack([y[kept[:, i]].mean(0) / y.mean(0) for i in range(x.shape[1])])


def group_means(y: np.ndarray, group: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean of every column of y in every group, [GROUPS, columns]."""
    return np.stack([y[rows[group[rows] == k]].mean(0) for k in range(GROUPS)])


def draw(results: dict[tuple[str, str], dict]) -> None:
    """real.png: for each draft and kind of text ΔL1 by tenths of flatness, and how well each metric ranks it."""
    colours = {"θ = 0.01": "#88CCEE", "θ = 0.1": "#0072B2", "θ = 2": "#223388", "η = 1": "#D55E00"}
    names = {name: f"−{name}" if sign < 0 else name for name, sign in (OF_TARGET | OF_DRAFT).items()}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, len(results), figsize=(4 * len(results), 7.6), sharey="row", squeeze=False)
        for (upper, lower), ((draft, text), figures) in zip(axes.T, results.items()):
            curve = figures["by tenth of flatness"]
            for name, colour in colours.items():
                mean, low, high = np.array(curve[name], float).T / figures["mean gain"][name]
                upper.plot(curve["choices"], mean, "o-", color=colour, label=name, markersize=4)
                upper.fill_between(curve["choices"], low, high, color=colour, alpha=0.15, linewidth=0)
            upper.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
            upper.set_xscale("log")
            upper.set_xticks(*tick_labels((1, 2, 5, 10, 20, 50, 100), curve["choices"][-1]))
            upper.minorticks_off()
            upper.set_ylim(bottom=0)
            upper.set_title(f"{draft}, {text}")
            upper.set_xlabel("effective number of choices, exp(H₂)")
            for offset, (name, colour) in zip((-0.3, -0.1, 0.1, 0.3), colours.items()):
                value, low, high = np.array([figures["spearman of tokens"][name][m] for m in names], float).T
                y = np.arange(len(names)) + offset
                lower.barh(y, value, 0.18, color=colour, linewidth=0)
                lower.hlines(y, low, high, color=INK, linewidth=0.8)
            lower.set_yticks(range(len(names)), list(names.values()))
            lower.axvline(0, color=MUTED, linewidth=1)
            lower.set_xlim(-1, 1)
            lower.set_xlabel("Spearman with ΔL1, tokens")
        axes[0, 0].set_ylabel("ΔL1 by tenths of flatness / mean of all")
        axes[0, 0].legend(frameon=False)
        axes[1, 0].invert_yaxis()
        for ax in axes.flat:
            ax.grid()
        figure.savefig(HERE / "real.png", dpi=70)


def tick_labels(ticks: Sequence[int], largest: float) -> tuple[list[int], list[str]]:
    """Those up to a little beyond `most`, and their labels: the style draws no mathematics."""
    used = [tick for tick in ticks if tick <= 1.2 * largest]
    return used, [f"{tick:g}" for tick in used]


if __name__ == "__main__":
    main()
