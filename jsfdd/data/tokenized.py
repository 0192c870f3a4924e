"""Turn chat files into a table of samples as a stream, so that memory does not grow with the number of chats.

This process reads the rows and drops duplicates. If there are many chats, other processes render and tokenize them. The result
does not depend on the number of processes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jsfdd.base.records import Sample
from jsfdd.data.chat import Chat, ReadCounts, stream_chats
from jsfdd.data.counts import FileCounts, check_too_many_skipped, counts_of, total
from jsfdd.data.samples import SampleTable, SampleWriter
from jsfdd.data.skipped import MEANINGS, BadRow, nothing_left
from jsfdd.data.spans import MaskSpan
from jsfdd.data.template import ChatTokenizer, Tally, TokenizeSummary, tokenize_chunk

_OF_ANSWER = re.compile(r"/\d+$")  # behind a conversation's id, of an answer that is a sample of its own
_CHUNK = 256  # conversations that are tokenized together
_ALONE = 16  # chunks before other processes start, which takes some seconds
_AHEAD = 3  # chunks that may wait for each process


class TokenizedChats(NamedTuple):
    """The result of `read_samples`.

    Attributes:
      samples: in the order of the files and of their rows.
      summary: counts of the conversations.
      files: counts of each file's rows.
      notes: sentences about ignored keys, and about content that the template dropped.
    """

    samples: SampleTable
    summary: TokenizeSummary
    files: list[FileCounts]
    notes: list[str]


def read_samples(
    names: Sequence[str | Path],
    tokenizer,
    max_length: int,
    mask_spans: Collection[MaskSpan] = (),
    *,
    vocab_size: int | None = None,
    split_answers: bool = False,
    strict: bool = False,
    max_skipped: float | None = None,
    processes: int = 1,
) -> TokenizedChats:
    """Reads and tokenizes chats.

    Args:
      names: files, directories, patterns or datasets (`data.rows`).
      tokenizer, max_length, mask_spans, vocab_size, split_answers: as `data.template.ChatTokenizer` takes them.
      strict: whether the first row that cannot be learned from is an error.
      max_skipped: the share of all rows above which skipped rows are an error; None for 5%, but never a handful.
      processes: so many tokenize at the most. Above 1, Python starts new ones, which import the main module: a script that
        asks for them needs its `if __name__ == "__main__"`.

    Raises FileNotFoundError for a missing file, and ValueError for what cannot be read, for too many skipped rows, or if
    nothing is left.
    """
    counts, tally, writer = ReadCounts(), Tally(), SampleWriter()
    like_answers: dict[str, str] = {}  # id -> file of whole conversations whose id may be that of another's answer
    settings = {"vocab_size": vocab_size, "split_answers": split_answers}
    tokenize = ChatTokenizer(tokenizer, max_length, mask_spans, **settings)
    chunks = _chunks(stream_chats(names, counts, strict=strict))
    others = _Others(lambda: (tokenizer, max_length, tuple(mask_spans), settings), processes)
    for chunk, made in others.map(tokenize, chunks):
        ids, sources = [], []
        for number, outcome, cut in made.outcomes:
            chat = chunk[number]
            if isinstance(outcome, BadRow):
                if strict and outcome.reason != "no_counted":
                    raise outcome
            else:
                if split_answers and outcome is None and _OF_ANSWER.search(chat.id):
                    like_answers[chat.id] = chat.file
                outcome = chat.id if outcome is None else outcome
                ids.append(outcome)
                sources.append(chat.source)
            tally.add(chat.id, outcome, cut, chat.file)
        writer.extend(ids, sources, made.lengths, made.tokens, made.masks)
    summary = tally.summary(others.left_out)
    files = counts_of(counts, tally)
    first = counts.skipped.first | summary.first
    check_too_many_skipped(files, first, max_skipped)
    samples = writer.finish()
    _check_ids(samples, like_answers)
    if not len(samples):
        everything = total(files)
        raise ValueError(nothing_left(everything.read, everything.skipped, first))
    notes = [f"skipped as {MEANINGS[reason]}, the first: {text}" for reason, text in first.items()]
    if tally.lost:
        notes.append(f"{tally.lost:,} answers have no token within the maximal length and are no samples")
    notes += [*counts.notes(), *filter(None, [summary.left_out_words()])]
    return TokenizedChats(samples, summary, files, notes)


def _check_ids(samples: SampleTable, like_answers: dict[str, str]) -> None:
    """Raise ValueError if the id of a conversation is that of an answer too, which --split-answers named."""
    uses = Counter(sample.id for sample in samples if sample.id in like_answers) if like_answers else {}
    for name in like_answers:
        if uses[name] > 1:
            raise ValueError(
                f"{like_answers[name]}: id {name!r} is also that of an answer of conversation {_OF_ANSWER.sub('', name)!r}, "
                "which --split-answers splits; give one of them another id"
            )


def usable_processes() -> int:
    """How many processes this process may keep busy."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(chats: Iterable[Chat]) -> Iterator[list[Chat]]:
    chats = iter(chats)
    while chunk := list(itertools.islice(chats, _CHUNK)):
        yield chunk


class _Made(NamedTuple):
    """What the conversations of a chunk became. Samples one by one would take as long to pass on as to make.

    Attributes:
      outcomes: of each sample, or of what is none, the conversation's number in the chunk; the sample's id, None if that is the
        conversation's, or why there is none; and whether it was cut.
      lengths: tokens of each sample.
      tokens, masks: of all samples, one after the other.
    """

    outcomes: list[tuple[int, str | BadRow | None, bool]]
    lengths: list[int]
    tokens: Int[np.ndarray, " T"]
    masks: Bool[np.ndarray, " T"]


def _make(tokenize: ChatTokenizer, chunk: list[Chat]) -> _Made:
    outcomes, samples, numbers = [], [], {chat.id: number for number, chat in enumerate(chunk)}
    for chat_id, outcome, cut in tokenize_chunk(tokenize, chunk):
        if isinstance(outcome, Sample):
            samples.append(outcome)
            outcome = None if outcome.id == chat_id else outcome.id
        outcomes.append((numbers[chat_id], outcome, cut))
    tokens = np.concatenate([np.zeros(0, np.int32), *(sample.tokens for sample in samples)])
    masks = np.concatenate([np.zeros(0, bool), *(sample.assistant_mask for sample in samples)])
    return _Made(outcomes, [len(sample.tokens) for sample in samples], tokens, masks)


class _Others:
    """Processes that tokenize chunks; none before there is enough to do.

    Attributes:
      left_out: as `ChatTokenizer.left_out`, over all processes.
    """

    def __init__(self, settings: Callable[[], tuple], processes: int):
        self.settings, self.processes = settings, processes
        self.left_out: dict[str, int] = {}

    def map(self, tokenize: ChatTokenizer, chunks: Iterator[list[Chat]]) -> Iterator[tuple[list[Chat], _Made]]:
        """(chunk, what became of it) in order."""
        for chunk in itertools.islice(chunks, _ALONE) if self.processes > 1 else chunks:
            yield chunk, _make(tokenize, chunk)
        self._count(tokenize.left_out)
        first = next(chunks, None)
        if first is not None:
            yield from self._elsewhere(itertools.chain([first], chunks))

    def _elsewhere(self, chunks: Iterator[list[Chat]]) -> Iterator[tuple[list[Chat], _Made]]:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of JAX's threads
        pool = ProcessPoolExecutor(self.processes, context, _begin, self.settings())
        waiting: deque = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_tokenize, chunk)))
                if len(waiting) > _AHEAD * self.processes:
                    yield self._result(*waiting.popleft())
            while waiting:
                yield self._result(*waiting.popleft())
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that tokenized chats was killed, as systems do that run out of memory; close other programs or use "
                "fewer cores (taskset -c 0-3 jsfdd …)"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    def _result(self, chunk: list[Chat], future) -> tuple[list[Chat], _Made]:
        made, left_out = future.result()
        self._count(left_out)
        return chunk, made

    def _count(self, left_out: dict[str, int]) -> None:
        for what, count in left_out.items():
            self.left_out[what] = self.left_out.get(what, 0) + count


# --- In the other processes ----------------------------------------------------------------------------------------

_tokenizer: ChatTokenizer | None = None


def _begin(tokenizer, max_length: int, mask_spans: tuple, settings: dict) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says what an interrupt means
    threading.Thread(target=_end_with_the_first, daemon=True, name="watch the first process").start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process already
    _tokenizer = ChatTokenizer(tokenizer, max_length, mask_spans, **settings)


def _end_with_the_first() -> None:
    """A process that is killed cannot end its pool, whose processes would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _tokenize(chunk: list[Chat]) -> tuple[_Made, dict[str, int]]:
    assert _tokenizer is not None
    before = dict(_tokenizer.left_out)
    made = _make(_tokenizer, chunk)
    return made, {kind: count - before[kind] for kind, count in _tokenizer.left_out.items()}
