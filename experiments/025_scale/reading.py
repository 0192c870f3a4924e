"""How fast chats are read and tokenized, beside the tokenizer's library alone on the same texts in the same run.

python -m experiments.025_scale.reading CHATS.jsonl [--rows 8192] [--processes 2]

First the CPU time of each part, in one process; no chat comes twice, so that no word is known from the round before. With
--processes, then the clock's time of the whole with so many tokenizing processes, without their start, and that of the library
with as many threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

from experiments.results import read_results, write_results
from jsfdd.data import tokenized
from jsfdd.data.chat import ReadCounts, stream_chats
from jsfdd.data.skipped import BadRow
from jsfdd.data.template import ChatTokenizer
from jsfdd.weights.target import describe_target

CHUNK, LONGEST = 256, 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chats", type=Path)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    value, texts = parts(options.chats, options.rows)
    if options.processes:
        os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"] = "true", str(options.processes)
        value |= {"processes": options.processes, "tokens_per_second": together(options.chats, options.processes)}
        value["library_tokens_per_second"] = library(texts, time.perf_counter)
    print(json.dumps({options.chats.name: value}))
    if options.results:
        write_results(options.results, read_results(options.results) | {options.chats.name: value})


def parts(path: Path, rows: int) -> tuple[dict, list[str]]:
    """CPU microseconds a chat of each part, and the texts that the template wrote."""
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable):
        start = time.process_time()
        result = function()
        spent[name] = spent.get(name, 0.0) + time.process_time() - start
        return result

    tokenize = ChatTokenizer(describe_target("smollm2").tokenizer, LONGEST)
    stream, count, tokens, texts = stream_chats([path], ReadCounts()), 0, 0, []
    while count < rows and (chunk := timed("read", lambda: list(itertools.islice(stream, CHUNK)))):
        timed("send", lambda chunk=chunk: passed_on(chunk))
        made = timed("render, find, tokenize", lambda chunk=chunk: tokenized._make(tokenize, chunk))
        timed("send back", lambda made=made: passed_on(made))
        count, tokens = count + len(chunk), tokens + len(made.tokens)
        texts += written(tokenize, chunk)
    alone = library(texts, time.process_time)
    value = {"chats": count, "tokens_a_chat": round(tokens / count)}
    value |= {f"microseconds: {name}": round(seconds / count * 1e6) for name, seconds in spent.items()}
    return value | {"tokens_per_cpu_second": round(tokens / sum(spent.values())), "library_tokens_per_cpu_second": alone}, texts


def written(tokenize: ChatTokenizer, chats: Sequence) -> Iterator[str]:
    """The texts of those that can be learned from."""
    for chat in chats:
        try:
            yield from (rendered.text for rendered in tokenize.render(chat))
        except BadRow:
            continue


def library(texts: Sequence[str], clock: Callable[[], float]) -> int:
    """Tokens a second of the tokenizer's library alone, which finds offsets too."""
    encode = ChatTokenizer(describe_target("smollm2").tokenizer, LONGEST).backend.encode_batch
    seconds, tokens = 0.0, 0
    for begin in range(0, len(texts), CHUNK):
        start = clock()
        encodings = encode(texts[begin : begin + CHUNK], add_special_tokens=False)
        seconds += clock() - start
        tokens += sum(map(len, encodings))
    return round(tokens / seconds)


def together(path: Path, processes: int) -> int:
    """Tokens a second of everything, from when all processes have sent something."""
    tokenized._ALONE, seen, whole = 0, [], tokenized._Others.map

    def observed(*arguments) -> Iterator:
        for chunk, made in whole(*arguments):
            seen.append((time.perf_counter(), len(made.tokens)))
            yield chunk, made

    tokenized._Others.map = observed
    tokenized.read_samples([path], describe_target("smollm2").tokenizer, LONGEST, max_skipped=1.0, processes=processes)
    (begin, _), *rest = seen[2 * processes :]
    return round(sum(tokens for _, tokens in rest) / (rest[-1][0] - begin))


def passed_on(value):
    """What another process would get: what this one has made, there and back, and nothing from a file."""
    return ForkingPickler.loads(ForkingPickler.dumps(value))


if __name__ == "__main__":
    main()
