"""What grows with the number of rows: reading chats, scores on disk, selection, the best k so far, a store that samples leave.

Each measurement is a process of its own, so its memory is its own: seconds by the clock and of CPU time (that of its tokenizing
processes too), and the resident bytes it adds at its peak.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.results import read_results, write_results
from jsfdd.base.records import Sample
from jsfdd.data.tokenized import read_samples, usable_processes
from jsfdd.hidden.best_k import BestK
from jsfdd.hidden.writer import HiddenWriter, moderate_shard_bytes
from jsfdd.scoring.metrics import column_names
from jsfdd.scoring.table import ScoreTable, read_scores, write_scores
from jsfdd.selection.mixture import mixture
from jsfdd.selection.sfdd import read_selection, select, write_selection
from jsfdd.weights.target import describe_target

LARGEST = {
    "read and tokenize": 10**6,
    "drop": 10**6,
    "mixture": 10**6,
    "best k": 10**6,
    "select in 10 sources": 10**7,
    "select in as many sources": 10**6,
}
WORDS = ("water", "the", "river", "a", "runs", "under", "bridge", "seven", "and", "slowly", "light", "of", "evening", "stone")


def table_of(rows: int, sources: int = 10) -> ScoreTable:
    rng = np.random.default_rng(0)
    return ScoreTable(
        ids=tuple(f"chats.jsonl:{i}" for i in range(rows)),
        sources=tuple(f"source {i % sources}" for i in range(rows)),
        num_tokens=np.full(rows, 100, np.int32),
        metrics={name: rng.random(rows) for name in column_names()},
        identity={},
    )


def prepare_chats(rows: int, folder: Path) -> None:
    """Chats of a question and an answer of 10 to 89 words."""
    rng = np.random.default_rng(0)
    with (folder / "chats.jsonl").open("w") as file:
        for i, length in enumerate(rng.integers(10, 90, rows).tolist()):
            text = " ".join(WORDS[word] for word in rng.integers(0, len(WORDS), length))
            messages = [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{text}."}]
            file.write(json.dumps({"messages": messages}) + "\n")


def read_and_tokenize(_: int, folder: Path) -> dict:
    """What `jsfdd score` does first, with SmolLM2's tokenizer, on all cores."""
    tokenizer = describe_target("smollm2").tokenizer
    chats = read_samples([folder / "chats.jsonl"], tokenizer, 2048, processes=usable_processes())
    return {"tokens": int(chats.samples.lengths.sum())}


def select_command(rows: int, folder: Path) -> None:
    """What `jsfdd select` does."""
    select_from(folder, "all")


def select_from(folder: Path, groups) -> None:
    write_selection(folder / "selection.json", select(read_scores(folder / "scores.parquet"), 0.5, within=groups))


def prepare_scores(rows: int, folder: Path, sources: int = 10) -> None:
    write_scores(folder / "scores.parquet", table_of(rows, sources))


def prepare_selection(rows: int, folder: Path) -> None:
    write_selection(folder / "selection.json", select(table_of(rows), 0.5))


def best_k(rows: int, _: Path) -> None:
    best = BestK("flatness", rows // 2)
    for i, score in enumerate(np.random.default_rng(0).random(rows).tolist()):
        best.offer(str(i), score)


def drop(rows: int, folder: Path) -> None:
    """A pass that keeps half: every sample is appended, and from the middle on one is dropped for each."""
    hidden = np.ones((4, 8), np.float32)
    with HiddenWriter(folder / "store", 8, "float32", {}, moderate_shard_bytes(rows * 64)) as writer:
        for i in range(rows):
            writer.add(str(i), hidden)
            if i >= rows // 2:
                writer.drop([str(i - rows // 2)])


def mix(rows: int, _: Path) -> None:
    tokens, mask = np.zeros(4, np.int32), np.ones(4, bool)
    samples = [Sample(str(i), f"source {i % 100}", tokens, mask) for i in range(rows)]
    mixture(samples, {f"source {i}": 1.0 for i in range(100)}, "samples", None, 0)


MEASURED: dict[str, tuple[Callable | None, Callable]] = {
    "read and tokenize": (prepare_chats, read_and_tokenize),
    "write scores": (None, prepare_scores),
    "select": (prepare_scores, select_command),
    "select in 10 sources": (prepare_scores, lambda rows, folder: select_from(folder, "source")),
    "select in as many sources": (
        lambda rows, folder: prepare_scores(rows, folder, sources=rows),
        lambda rows, folder: select_from(folder, "source"),
    ),
    "read selection": (prepare_selection, lambda rows, folder: read_selection(folder / "selection.json")),
    "best k": (None, best_k),
    "drop": (None, drop),
    "mixture": (None, mix),
}


def _prepare(name: str, rows: int, folder: Path) -> None:
    MEASURED[name][0](rows, folder)


def _measure(name: str, rows: int, folder: Path, answer) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    spent = _cpu_seconds()
    more = MEASURED[name][1](rows, folder) or {}
    seconds, spent = time.perf_counter() - start, _cpu_seconds() - spent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value = {"seconds": round(seconds, 3), "cpu_seconds": round(spent, 3), "megabytes": round((peak - before) / 1024)}
    answer.send(value | more)


def _cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(name: str, rows: int) -> dict:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        if MEASURED[name][0] is not None:
            process = context.Process(target=_prepare, args=(name, rows, Path(folder)))
            process.start()
            process.join()
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_measure, args=(name, rows, Path(folder), sender))
        process.start()
        sender.close()
        value = receiver.recv()
        process.join()
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, required=True)
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    results: dict = read_results(options.results).get("scale", {}) if options.results else {}
    for name in options.only:
        for rows in options.rows:
            if rows <= LARGEST.get(name, rows):
                results.setdefault(name, {})[str(rows)] = measure(name, rows)
                print(name, rows, results[name][str(rows)], flush=True)
                if options.results:
                    write_results(options.results, {"scale": results})


if __name__ == "__main__":
    main()
