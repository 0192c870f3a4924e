"""Keeps what the target computed while it answered, so that neither scoring nor training reads the answers again.

    DIR/hidden/               hidden states of the conversations that may still be selected (`hidden/store.py`)
    DIR/part-00000.parquet    scores of the conversations; in these files a row's source is the digest of its tokens

A conversation is kept as training will read it: rendered by the chat template with its answer, and tokenized. Where that is
token for token what the target read and wrote, its states and scores are those of the decoding. Other conversations are left to
a pass of their own (`scoring/score.py`): those with several answers, of which each was decoded by itself, and those
whose text is rendered or tokenized in another way than it was decoded.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jsfdd.base.files import plain
from jsfdd.base.records import Sample, TokenScores
from jsfdd.data.batches import pad_rows
from jsfdd.data.chat import Chat
from jsfdd.data.messages import Message
from jsfdd.data.questions import Questions
from jsfdd.data.render import RefusedByTemplate, render
from jsfdd.data.template import ChatTokenizer, tokenize_chunk
from jsfdd.decoding.conversation_log import Answer
from jsfdd.decoding.conversations import PromptGroup, message_of
from jsfdd.decoding.recorded import Recorded
from jsfdd.hidden.capture import HiddenKeeper
from jsfdd.scoring.parts import Parts
from jsfdd.scoring.score import summarise
from jsfdd.scoring.table import ScoreTable, join, read_scores

_QUESTION, _ANSWER = "jsfddquestion", "jsfddanswer"


class AnswerKeeper:
    """Takes in decoded batches one by one; what it has is on disk after `save`.

    Args:
      directory: of the parts.
      keeper: stores the hidden states.
      tokenize: as training will tokenize the answers.
      tail: from `tail_of`, as the batches were recorded with it.
      identity: JSON-ready: what the answers depend on.
    """

    def __init__(self, directory: Path, keeper: HiddenKeeper, tokenize: ChatTokenizer, tail: tuple[int, ...], identity: dict):
        self._keeper, self._tokenize, self._tail, self._identity = keeper, tokenize, tail, plain(identity)
        self._parts = Parts(directory, self._identity, seconds=float("inf"))
        keeper.resume(self._parts.tables)
        self._known = {name for part in self._parts.tables for name in part.ids}

    def add(self, questions: Sequence[Questions], group: PromptGroup, answers: Sequence[Answer], out: Recorded) -> None:
        """Take in a batch: row b of `out` answers `group.prompts[b]`, a turn of questions[b]."""
        kept: list[Sample] = []
        rows: list[int] = []
        for b, (item, answer) in enumerate(zip(questions, answers, strict=True)):
            if item.id in self._known:
                continue  # a kill came between its scores and the log of the answers
            sample = self._sample(item, answer, group.prompts[b], out.tokens[b, : out.lengths[b]])
            if sample is not None:
                kept.append(sample)
                rows.append(b)
        if not kept:
            return
        hidden = [_states(out, b, len(group.prompts[b]), len(sample.tokens)) for b, sample in zip(rows, kept)]
        begin = [(len(group.prompts[b]), int(out.lengths[b]) - 1) for b in rows]
        shape = len(kept), max(len(sample.tokens) for sample in kept)
        scores = TokenScores(
            *[pad_rows([np.pad(s[b, :n], (p, 0)) for b, (p, n) in zip(rows, begin)], shape) for s in out.scores]
        )
        table = summarise(kept, scores, out.prompts[rows], False, self._identity)
        self._keeper.keep(kept, table, hidden)
        self._parts.add(_with_digests(table, kept))

    def save(self) -> None:
        """Put everything on disk, the states before the scores: a resumed run drops states without scores."""
        self._keeper.save()
        self._parts.save()

    def _sample(self, item: Questions, answer: Answer, prompt: Sequence[int], written: np.ndarray) -> Sample | None:
        """The conversation as training reads it, if that is what was decoded."""
        if len(item.turns) > 1:
            return None
        chat = Chat(item.id, item.source, (*item.turns[0], message_of(answer)), item.id, tools=item.tools)
        _, sample, _ = next(iter(tokenize_chunk(self._tokenize, [chat])))
        if not isinstance(sample, Sample):
            return None
        ended = self._tail and written[-1] == self._tail[0]
        whole = [*prompt, *written, *self._tail[1 if ended else 0 :]]
        if sample.tokens.tolist() != whole[: self._tokenize.max_length]:
            return None
        # All that counts must have been scored: the answer but its last token.
        counted = np.flatnonzero(sample.counted)
        return sample if counted[0] >= len(prompt) and counted[-1] <= len(prompt) + len(written) - 2 else None


def tail_of(tokenizer) -> tuple[int, ...]:
    """The tokens that the chat template writes after an answer that ends a conversation; none if it refuses a plain one."""
    messages = [Message(role="user", content=_QUESTION), Message(role="assistant", content=_ANSWER)]
    try:
        text = render(tokenizer, messages)
    except RefusedByTemplate:
        return ()
    return tuple(tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]) if _ANSWER in text else ()


def tokens_digest(sample: Sample) -> str:
    """SHA-256 of a sample's tokens and mask."""
    tokens, mask = np.ascontiguousarray(sample.tokens, np.int32), np.ascontiguousarray(sample.assistant_mask, bool)
    return hashlib.sha256(tokens.tobytes() + mask.tobytes()).hexdigest()


def _states(out: Recorded, b: int, prompt: int, tokens: int) -> Float[np.ndarray, "T S"]:
    """Of a whole conversation: its prompt, its answer, and what the template writes after it."""
    parts = out.prompt_hidden[b, :prompt], out.hidden[b, : out.lengths[b] - 1], out.tail_hidden[b]
    return np.concatenate(parts)[:tokens]


def _with_digests(table: ScoreTable, samples: Sequence[Sample]) -> ScoreTable:
    return dataclasses.replace(table, sources=tuple(map(tokens_digest, samples)))


def read_kept(directory: Path, samples: Sequence[Sample]) -> ScoreTable | None:
    """What was kept of these samples, whose tokens it must be, in their order and with their sources; None if nothing was."""
    tables = [read_scores(path, prompt_states=True) for path in sorted(directory.glob("part-*.parquet"))]
    if not tables:
        return None
    digests = {name: digest for table in tables for name, digest in zip(table.ids, table.sources)}
    known = [sample for sample in samples if digests.get(sample.id) == tokens_digest(sample)]
    if not known:
        return None
    table = join(tables, [sample.id for sample in known])
    return dataclasses.replace(table, sources=tuple(sample.source for sample in known))
