"""Chats as questions, for a target that answers turn by turn in the assistant's place.

A turn is everything before an answer: the user's message, and a system message before it. The chat's own answers are ignored,
and so is what makes sense only after them:
  - an assistant's message that answers nobody (an opening greeting, a second one in a row);
  - everything from a tool's message on: it returns what a call asked for that the target did not make.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from jsfdd.data.chat import Chat, content_digest
from jsfdd.data.messages import Message
from jsfdd.data.render import RefusedByTemplate, render_prompt
from jsfdd.data.skipped import MEANINGS
from jsfdd.data.template import special_text_of

_ANY_ANSWER = Message(role="assistant", content="x")
_REASONS = ("no_question", "duplicates", "special_text", "refused", "unknown_token", "too_long")


class Questions(NamedTuple):
    """One conversation to be held with a target.

    Attributes:
      number: the chat's number, from which the sampling keys of its answers are made.
      id, source: the chat's.
      turns: the messages before each answer; at least one turn.
      tools: definitions of the tools that the target may call.
    """

    number: int
    id: str
    source: str
    turns: tuple[tuple[Message, ...], ...]
    tools: tuple[dict, ...] = ()


class QuestionSummary(NamedTuple):
    """The chats that are not asked.

    Attributes:
      skipped: ids by reason: no_question (without a message of the user's), duplicates (with the questions of an earlier
        one), special_text (a message holds the text of a special token, so no reader would take the conversation),
        refused (the chat template rejects it), unknown_token (a token lies beyond the embedding), too_long (its first
        prompt with an answer exceeds the limit).
      first: of each reason that there is, where the first one is.
      by_file: how many there are by file and reason.
    """

    skipped: dict[str, tuple[str, ...]]
    first: dict[str, str]
    by_file: dict[tuple[str, str], int]


class QuestionTable(Sequence[Questions]):
    """A sequence of questions on disk: of each, memory holds where it begins. The file vanishes with the process."""

    def __init__(self):
        self._file = tempfile.TemporaryFile()
        self._starts = array("q", [0])

    def append(self, questions: Questions) -> None:
        data = json.dumps(questions).encode()
        self._file.seek(self._starts[-1])
        self._file.write(data)
        self._starts.append(self._starts[-1] + len(data))

    @property
    def num_bytes(self) -> int:
        """Of all as JSON."""
        return self._starts[-1]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # as in a list: negative numbers count from the end, IndexError beyond it
        self._file.seek(self._starts[index])
        number, name, source, turns, tools = json.loads(self._file.read(self._starts[index + 1] - self._starts[index]))
        return Questions(number, name, source, tuple(map(tuple, turns)), tuple(tools))


def questions_of(
    chats: Iterable[Chat], tokenizer, *, longest_prompt: int, first_turn_only: bool = False, vocab_size: int | None = None
) -> tuple[QuestionTable, QuestionSummary]:
    """Turn chats into questions, in the order of the chats.

    Args:
      tokenizer: the target's, with its chat template.
      longest_prompt: tokens that a prompt may have.
      first_turn_only: ask only the first turn.
      vocab_size: rows of the target's embedding, if they are known.

    Raises ValueError if nothing is left to ask, or the tokenizer has no chat template.
    """
    special_text = special_text_of(tokenizer)
    skipped: dict[str, list[str]] = {name: [] for name in _REASONS}
    first: dict[str, str] = {}
    by_file: Counter[tuple[str, str]] = Counter()
    table, digests = QuestionTable(), set()
    for number, chat in enumerate(chats):
        turns = _turns(chat.messages)[: 1 if first_turn_only else None]
        messages = [message for turn in turns for message in turn]
        digest = content_digest(messages, chat.tools)
        reason = None
        if not turns:
            reason = "no_question"
        elif digest in digests:
            reason = "duplicates"
        elif any(
            map(special_text.search, [json.dumps(chat.tools), *(text for message in messages for text in _texts(message))])
        ):
            reason = "special_text"
        elif (prompt := _first_prompt(turns, tokenizer, chat.tools)) is None:
            reason = "refused"
        elif vocab_size is not None and max(prompt) >= vocab_size:
            reason = "unknown_token"
        elif len(prompt) > longest_prompt:
            reason = "too_long"
        if reason is None:
            table.append(Questions(number, chat.id, chat.source, turns, chat.tools))
        else:
            skipped[reason].append(chat.id)
            by_file[chat.file, reason] += 1
            first.setdefault(reason, f"{chat.place}: the conversation {chat.id!r}")
        digests.add(digest)
    if not table:
        counts = ", ".join(f"{len(ids)} {MEANINGS[name]}" for name, ids in skipped.items() if ids)
        raise ValueError(
            f"no conversation is left to answer ({counts}; prompts of up to {longest_prompt} tokens); give other chats, raise "
            "--max-length or lower --max-new-tokens"
        )
    return table, QuestionSummary({name: tuple(ids) for name, ids in skipped.items()}, first, by_file)


def prompt_of(
    tokenizer, turns: Sequence[Sequence[Message]], answers: Sequence[Message], tools: Sequence[dict] = ()
) -> list[int]:
    """Token ids of the conversation so far: the turns up to the one after the answers given.

    Raises RefusedByTemplate.
    """
    messages = [message for turn, answer in zip(turns, answers) for message in (*turn, answer)]
    return render_prompt(tokenizer, [*messages, *turns[len(answers)]], tools)


def selected(ids: Set[str], questions: Iterable[Questions], path: Path) -> QuestionTable:
    """The questions of these ids, in the order of the chats. ValueError names `path` and those that are not among them."""
    table, present = QuestionTable(), set()
    for item in questions:
        if item.id in ids:
            table.append(item)
            present.add(item.id)
    if missing := sorted(ids - present):
        few = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise ValueError(f"{path}: it keeps {len(missing)} that these chats do not ask: {few}; give the chats that were scored")
    return table


def _turns(messages: Sequence[Message]) -> tuple[tuple[Message, ...], ...]:
    turns, said = [], []
    for message in itertools.takewhile(lambda message: message["role"] != "tool", messages):
        if message["role"] != "assistant":
            said.append(message)
        elif _asks(said):
            turns.append(tuple(said))
            said = []
    return (*turns, tuple(said)) if _asks(said) else tuple(turns)


def _texts(message: Message) -> list[str]:
    return [message[key] for key in ("content", "name") if key in message]


def _asks(said: Sequence[Message]) -> bool:
    return any(message["role"] == "user" for message in said)


def _first_prompt(turns: Sequence[Sequence[Message]], tokenizer, tools: Sequence[dict]) -> list[int] | None:
    """The first prompt; None if the template refuses it or, with any answers, the last one."""
    try:
        prompt_of(tokenizer, turns, [_ANY_ANSWER] * (len(turns) - 1), tools)
        return prompt_of(tokenizer, turns, [], tools)
    except RefusedByTemplate:
        return None
