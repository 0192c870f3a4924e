"""CPU microseconds a chat for each part of reading, in one process, beside those of the tokenizer alone.

python -m experiments.025_scale.reading CHATS.jsonl [--rows 1024]
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

from jsfdd.data import tokenized
from jsfdd.data.chat import ReadCounts, stream_chats
from jsfdd.data.template import ChatTokenizer
from jsfdd.weights.target import describe_target

CHUNK, ROUNDS = 256, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chats", type=Path)
    parser.add_argument("--rows", type=int, default=1024)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenize = ChatTokenizer(describe_target("smollm2").tokenizer, 2048)
    encode = tokenize.backend.encode_batch
    best: dict[str, float] = {}

    def timed(name: str, function: Callable):
        start = time.process_time()
        result = function()
        best[name] = min(best.get(name, 1e9), (time.process_time() - start) / options.rows * 1e6)
        return result

    for _ in range(ROUNDS):
        chats = timed("read", lambda: list(itertools.islice(stream_chats([options.chats], ReadCounts()), options.rows)))
        chunks = [chats[begin : begin + CHUNK] for begin in range(0, len(chats), CHUNK)]
        timed("send", lambda chunks=chunks: passed_on(chunks))
        made = timed("render, find, tokenize", lambda chunks=chunks: [tokenized._make(tokenize, chunk) for chunk in chunks])
        timed("send back", lambda made=made: passed_on(made))
        texts = [[tokenize.render(chat)[0].text for chat in chunk] for chunk in chunks]
        encoded = timed("tokenizer", lambda texts=texts: [encode(part, add_special_tokens=False) for part in texts])
    tokens = sum(len(encoding) for part in encoded for encoding in part) / options.rows
    alone = best.pop("tokenizer")
    print({name: round(value) for name, value in best.items()}, f"tokenizer alone {alone:.0f}; {tokens:.0f} tokens a chat")
    print(f"{tokens / sum(best.values()):.3f} M tokens/s a core; the tokenizer alone {tokens / alone:.3f}")


def passed_on(chunks: Sequence) -> list:
    """Chunks as another process would get them: what this one has made, there and back, and nothing from a file."""
    return [ForkingPickler.loads(ForkingPickler.dumps(chunk)) for chunk in chunks]


if __name__ == "__main__":
    main()
