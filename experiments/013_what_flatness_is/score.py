"""Every metric of every counted token of a nested sample of chats, in rounds that a later call continues. See README.md.

    python score.py --data FILES… --samples 40 --out DIR

Of each source it takes the first chats in the order of their ids' hashes, so that a larger sample holds a smaller one.
DIR/round-000.npz and so on hold, for 20 chats of each source:

    ids, sources, lengths, truncated   [N]     length in tokens, prompt and template included, after the cut
    tokens                             [ΣT]    of all chats in turn
    sample, position                   [n]     of each counted token: its chat in this file, and t
    scores                             [n, 6]  flatness, entropy, top1, margin, energy, nll (`TokenScores`)
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections import defaultdict
from pathlib import Path

import numpy as np

from jsfdd.base.mesh import make_mesh
from jsfdd.base.records import Sample, TokenScores
from jsfdd.data.batches import choose_shapes, make_batches
from jsfdd.data.chat import Chat, read_chats
from jsfdd.data.template import tokenize_chats
from jsfdd.models.sharding import place_params
from jsfdd.scoring.passes import run_batches
from jsfdd.scoring.score import make_score_step
from jsfdd.weights.target import load_target

ROUND = 20
BATCH_TOKENS = 2048


def main() -> None:
    smoke = os.environ.get("SMOKE") == "1"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=3 if smoke else 40, help="of each source, at most")
    parser.add_argument("--max-length", type=int, default=128 if smoke else 384)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    target, mesh = load_target("smollm2"), make_mesh(model=1)
    rounds = chats_in_rounds(read_chats(options.data), options.samples)
    chosen, truncated = [], set()
    for chats in rounds:
        samples, summary = tokenize_chats(chats, target.tokenizer, options.max_length)
        chosen.append(samples)
        truncated.update(summary.truncated)
    shapes = choose_shapes([len(sample.tokens) for samples in chosen for sample in samples], BATCH_TOKENS)
    step, params = make_score_step(target.config, mesh), place_params(target.params, mesh)
    for number, samples in enumerate(chosen):
        path = options.out / f"round-{number:03d}.npz"
        if path.exists():
            continue
        plans = make_batches([len(sample.tokens) for sample in samples], shapes)
        scores: dict[str, TokenScores] = {}
        label = f"round {number + 1}/{len(chosen)}"
        for batch, (values_of_batch, _) in run_batches(step, params, samples, plans, mesh, label=label):
            scores |= {sample.id: TokenScores(*[values[b] for values in values_of_batch]) for b, sample in enumerate(batch)}
        write_round(path, samples, scores, truncated)


def chats_in_rounds(chats: list[Chat], samples: int) -> list[list[Chat]]:
    """The first `samples` chats of each source by their ids' hashes, ROUND of each source a round."""
    of_source = defaultdict(list)
    for chat in sorted(chats, key=lambda chat: hashlib.sha256(chat.id.encode()).hexdigest()):
        of_source[chat.source].append(chat)
    return [
        [chat for chats_of_source in of_source.values() for chat in chats_of_source[begin : min(begin + ROUND, samples)]]
        for begin in range(0, samples, ROUND)
    ]


def write_round(path: Path, samples: list[Sample], scores: dict[str, TokenScores], truncated: set[str]) -> None:
    """One file of the module's docstring, whole or not at all."""
    places = [np.flatnonzero(sample.counted) for sample in samples]
    aside = path.with_suffix(".part.npz")
    np.savez(
        aside,
        ids=[sample.id for sample in samples],
        sources=[sample.source for sample in samples],
        lengths=[len(sample.tokens) for sample in samples],
        truncated=[sample.id in truncated for sample in samples],
        tokens=np.concatenate([sample.tokens for sample in samples]),
        sample=np.repeat(np.arange(len(samples)), [len(place) for place in places]),
        position=np.concatenate(places),
        scores=np.concatenate([np.stack(scores[sample.id], -1)[place] for sample, place in zip(samples, places)]),
    )
    aside.rename(path)


if __name__ == "__main__":
    main()
