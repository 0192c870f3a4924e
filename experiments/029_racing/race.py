"""How well do an answer's first tokens, or its prompt alone, say whether the whole answer will be flat?

    python -m experiments.029_racing.race tokens.npz results.jsonl

The answers are kept in halves within clusters of like prompts, as `jsfdd select --within cluster` keeps them. A rule ranks them
when it decides; what it keeps is finished, the rest stopped. Predictions that are learned come from other folds.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from experiments.results import write_results
from jsfdd.selection.clusters import cluster_prompts

TOKENS = (8, 16, 32)
FOLDS = 5
PENALTIES = (1.0, 10.0, 100.0, 1000.0)  # times the mean square of a column
KEPT = 0.5
FIRST = 32  # tokens of an answer that tokens.py scored


def ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray, float]:
    """(centre, weights, intercept) of a ridge regression."""
    centre, level = x.mean(axis=0), y.mean()
    x = x - centre
    gram = x.T @ x
    gram += penalty * np.trace(gram) / len(gram) / len(x) * np.eye(len(gram))
    return centre, np.linalg.solve(gram, x.T @ (y - level)), level


def out_of_fold(x: np.ndarray, y: np.ndarray, folds: np.ndarray, penalties=PENALTIES) -> np.ndarray:
    """Predictions of y, for every row by a ridge of the other folds; its penalty is chosen among those folds, too."""
    predicted = np.zeros(len(y))
    for fold in range(FOLDS):
        rest = folds != fold
        inner = (folds + 1) % FOLDS == fold  # one of the others
        errors = []
        for penalty in penalties:
            centre, weights, level = ridge(x[rest & ~inner], y[rest & ~inner], penalty)
            errors.append(np.mean((((x[inner] - centre) @ weights + level) - y[inner]) ** 2))
        centre, weights, level = ridge(x[rest], y[rest], penalties[int(np.argmin(errors))])
        predicted[~rest] = (x[~rest] - centre) @ weights + level
    return predicted


def kept_within(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """bool[N]: the half of largest score of every group."""
    kept = np.zeros(len(scores), bool)
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        order = rows[np.argsort(-scores[rows], kind="stable")]
        kept[order[: max(1, round(KEPT * len(rows)))]] = True
    return kept


def within(groups: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's correlation within the groups of 10 rows or more, weighted by their rows."""
    rows = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    rows = [r for r in rows if len(r) >= 10]
    return float(np.average([spearmanr(x[r], y[r])[0] for r in rows], weights=[len(r) for r in rows]))


def main() -> None:
    data = np.load(sys.argv[1])
    lengths, sources = data["lengths"], data["sources"]
    starts = np.concatenate([[0], np.cumsum(np.minimum(lengths, FIRST))])
    begins, whole = [data["first"][a:b] for a, b in zip(starts, starts[1:])], data["whole"]
    clusters = cluster_prompts(data["mean"], seed=0)
    folds = np.random.default_rng(0).permutation(len(whole)) % FOLDS
    prompt = out_of_fold(data["last"].astype(np.float64), whole, folds)
    rules = {("the prompt alone", 0): prompt}
    for m in TOKENS:
        begin = np.array([first[:m].mean() for first in begins])
        rules["first tokens", m] = begin
        both = np.stack([begin, prompt, begin * prompt], axis=1)
        both = (both - both.mean(axis=0)) / np.maximum(both.std(axis=0), 1e-9)
        rules["both", m] = out_of_fold(both, whole, folds, (0.0, 0.1, 1.0))
    ideal = kept_within(whole, clusters)
    best, chance = whole[ideal].mean(), whole.mean()
    rows = {}
    for (name, m), scores in rules.items():
        kept = kept_within(scores, clusters)
        saved = np.maximum(lengths - m, 0)[~kept].sum() / lengths.sum()
        regret = best - whole[kept].mean()
        rows[f"{name}, {m} tokens"] = {
            "spearman": float(spearmanr(scores, whole)[0]),
            "within_source": within(sources, scores, whole),
            "within_cluster": within(clusters, scores, whole),
            "overlap": float((kept & ideal).sum() / ideal.sum()),
            "regret": float(regret),
            "regret_share": float(regret / (best - chance)),
            "tokens_saved": float(saved),
            "gain_per_token": float((whole[kept].mean() - chance) / (1 - saved)),
        }
    result = {
        "answers": len(whole),
        "sources": {str(name): int((sources == name).sum()) for name in np.unique(sources)},
        "clusters": int(clusters.max()) + 1,
        "mean_tokens": float(lengths.mean()),
        "flatness": {"all": float(chance), "flattest_half_of_clusters": float(best), "sd": float(whole.std())},
        "rules": rows,
    }
    write_results(Path(sys.argv[2]), result)
    for name, row in rows.items():
        figures = (
            row[key] for key in ("spearman", "within_source", "within_cluster", "overlap", "regret_share", "tokens_saved")
        )
        print(f"{name:30} {' '.join(f'{figure:.2f}' for figure in figures)} {row['gain_per_token']:.4f}")


if __name__ == "__main__":
    main()
