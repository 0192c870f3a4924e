"""The flatness of every answer's first tokens and of the whole, and every prompt's states.

    python -m experiments.029_racing.tokens --answers ANSWERS.jsonl --scores scores.parquet --hidden hidden/ --out tokens.npz

From what `jsfdd respond --keep-hidden full` wrote. Only the target's head runs, on the stored states of the first tokens.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jsfdd.data.tokenized import read_samples
from jsfdd.hidden.store import HiddenStore
from jsfdd.models.target import head_logits
from jsfdd.scoring.flatness import token_flatness
from jsfdd.scoring.prompt_state import directions
from jsfdd.scoring.table import read_scores
from jsfdd.weights.target import load_target

ROWS = 256
FIRST = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--scores", type=Path, nargs="+", required=True)
    parser.add_argument("--hidden", type=Path, required=True)
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    target = load_target(args.target, layers=False)
    store = HiddenStore.open(args.hidden, None)
    tables = [read_scores(path) for path in args.scores]
    whole = {name: value for table in tables for name, value in zip(table.ids, table["flatness"])}
    read = read_samples([args.answers], target.tokenizer, 2048, vocab_size=target.config.vocab_size)
    samples = [sample for sample in read.samples if sample.counted.any() and sample.id in store and sample.id in whole]
    flat = jax.jit(lambda hidden: token_flatness(head_logits(target.config, target.params, hidden)))
    flatness, lengths, last, mean = [], [], [], []
    pending = np.zeros((0, target.config.hidden_size), np.float32)

    def run(rows: np.ndarray) -> np.ndarray:
        """Score whole blocks, the last one padded."""
        blocks = np.pad(rows, ((0, -len(rows) % ROWS), (0, 0))).reshape(-1, ROWS, rows.shape[1])
        return np.concatenate([np.asarray(flat(jnp.asarray(block))) for block in blocks])[: len(rows)]

    for number, sample in enumerate(samples):
        states = np.asarray(store[sample.id], np.float32)
        first = int(np.argmax(sample.counted))
        counted = states[sample.counted]
        lengths.append(len(counted))
        counted = counted[:FIRST]
        last.append(states[first - 1])
        mean.append(states[:first].mean(axis=0) @ directions(states.shape[1]))
        pending = np.concatenate([pending, counted])
        if len(pending) > 32 * ROWS or number + 1 == len(samples):
            flatness.append(run(pending))
            pending = pending[:0]
            print(f"{number + 1} of {len(samples)} answers, {sum(lengths):,} tokens", flush=True)
    np.savez(
        args.out,
        ids=np.array([sample.id for sample in samples]),
        sources=np.array([sample.source for sample in samples]),
        lengths=np.array(lengths),
        first=np.concatenate(flatness),  # of up to FIRST tokens an answer
        whole=np.array([whole[sample.id] for sample in samples]),
        last=np.array(last, np.float32),
        mean=np.array(mean, np.float32),
    )


if __name__ == "__main__":
    main()
