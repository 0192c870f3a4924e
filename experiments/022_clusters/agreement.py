"""How much clusters of prompts owe to the state they are made of: whole or projected, mean or last."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jsfdd.hidden.store import HiddenStore
from jsfdd.scoring.prompt_state import directions
from jsfdd.scoring.table import read_scores, read_token_scores
from jsfdd.selection.clusters import cluster_prompts

COUNT, SEEDS = 20, range(5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="of experiments/pool: hidden/ and token_scores.parquet")
    work = parser.parse_args().work
    store, table = HiddenStore.open(work / "hidden", None), read_scores(work / "scores.parquet")
    counted = {name: row.counted for name, row in read_token_scores(work / "token_scores.parquet").items()}
    rows = sorted((i for i, name in enumerate(table.ids) if counted[name].any()), key=lambda i: table.ids[i])
    flat, sources = table["flatness"][rows], [table.sources[row] for row in rows]
    mean, last = [], []
    width = state_width(store)
    for row in rows:
        name = table.ids[row]
        prompt = np.asarray(store[name][: int(np.argmax(counted[name])), -width:], np.float32)
        mean.append(prompt.mean(axis=0))
        last.append(prompt[-1])
    mean, last = np.stack(mean), np.stack(last)
    projected = mean @ directions(width)
    print(
        f"{len(rows)} chats of {len(set(sources))} sources; correlation of the cosines of two prompts' mean states, whole and"
    )
    print(f"projected: {np.corrcoef(cosines(mean), cosines(projected))[0, 1]:.3f}")
    kinds = {"mean": mean, "mean, projected": projected, "last": last}
    halves = {kind: [half(cluster_prompts(states, seed, COUNT), flat) for seed in SEEDS] for kind, states in kinds.items()}
    for a, b in itertools.combinations_with_replacement(kinds, 2):
        pairs = [(x, y) for i, x in enumerate(halves[a]) for j, y in enumerate(halves[b]) if i != j]
        print(f"flattest halves in common, of two seeds, {a} and {b}: {np.mean([len(x & y) / len(x) for x, y in pairs]):.1%}")
    for count in (1, 5, 10, 20, 40, 80):
        clusters = [cluster_prompts(projected, seed, count) for seed in SEEDS]
        common = [len(half(c, flat) & h) / len(h) for c in clusters for h in halves["mean, projected"]]
        print(
            f"{count} clusters explain {np.mean([explained(c, flat) for c in clusters]):.2f} of the variance of flatness;",
            end=" ",
        )
        print(f"{np.mean(common):.1%} of the flattest halves in common with 20 clusters")


def state_width(store: HiddenStore) -> int:
    """The width of the final state, the last of the parts of a store's rows."""
    return store[next(iter(store))].shape[1] // (len(store.layers) + 1)


def cosines(states: np.ndarray) -> np.ndarray:
    """Of every two rows, centred."""
    centred = states - states.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    return (centred @ centred.T)[np.triu_indices(len(states), 1)]


def half(clusters: Sequence[int], scores: np.ndarray) -> set[int]:
    """The rows of the higher half of each cluster."""
    members = [np.flatnonzero(clusters == number) for number in set(clusters)]
    return {row for rows in members for row in rows[np.argsort(-scores[rows])][: (len(rows) + 1) // 2]}


def explained(clusters: Sequence[int], scores: np.ndarray) -> float:
    """The share of the variance of the scores that lies between the clusters."""
    means = np.array([scores[clusters == number].mean() for number in range(max(clusters) + 1)])[clusters]
    return 1 - ((scores - means) ** 2).sum() / ((scores - scores.mean()) ** 2).sum()


if __name__ == "__main__":
    main()
