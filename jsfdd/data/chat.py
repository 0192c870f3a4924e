"""Read chats and prompts: every row becomes a `Chat` or a `Prompt`, or is skipped and counted if it cannot be learned from.

`data.rows` finds the files of a name, `data.formats` reads them, and `data.forms` interprets chat rows. A prompt row has
{"turns": ["…", …]}, or any form of a chat, whose answers are ignored. "id" and "source" are always optional.

A conversation with the same messages as an earlier one, in whichever file, is a duplicate: it is left out and counted,
whatever its id. One with the id of another is named after file and line instead, and counted; two prompts with one id are an
error, because results are compared by them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from jsfdd.base.records import Prompt
from jsfdd.data.forms import COLUMNS, Conversation, conversation_of, unread
from jsfdd.data.messages import Message
from jsfdd.data.rows import Row, read_rows
from jsfdd.data.skipped import BadRow, SkippedRows


@dataclasses.dataclass(frozen=True)
class Chat:
    """One conversation; with at least one assistant turn unless it was read to be answered.

    Attributes:
      id: unique over the files read together.
      source: the row's "source", or its file's name.
      messages: the turns in order; none in a conversation that came rendered or tokenized.
      place: "file:line", for errors that turn up later.
      file: the file it came from; empty if it was made in Python.
      tools: definitions of the tools that it may call.
      text: a conversation that came rendered.
      tokens, mask: one that came tokenized (`data.forms.Conversation`).
    """

    id: str
    source: str
    messages: tuple[Message, ...]
    place: str
    file: str = ""
    tools: tuple[dict, ...] = ()
    text: str = ""
    tokens: tuple[int, ...] = ()
    mask: tuple[bool, ...] = ()


@dataclasses.dataclass
class ReadCounts:
    """What became of the rows so far.

    Attributes:
      read: rows by file, in the order of the files.
      duplicates: how many of them were left out as duplicates.
      skipped: those that cannot be learned from.
      unread: rows by key, of keys that have a value and are not read.
      renamed: rows with the id of an earlier one.
    """

    read: Counter[str] = dataclasses.field(default_factory=Counter)
    duplicates: Counter[str] = dataclasses.field(default_factory=Counter)
    skipped: SkippedRows = dataclasses.field(default_factory=SkippedRows)
    unread: Counter[str] = dataclasses.field(default_factory=Counter)
    renamed: int = 0

    def notes(self) -> list[str]:
        """Sentences about what was not read as it stands."""
        sentence = "rows have the id of another and are named after their file and place in it"
        return [*filter(None, [self.unread_words()]), *([f"{self.renamed:,} {sentence}"] if self.renamed else [])]

    def unread_words(self) -> str:
        """A sentence about what was not read; empty if everything was."""
        if not self.unread:
            return ""
        keys = ", ".join(f"{count:,} rows have {key!r}" for key, count in self.unread.most_common(_SHOWN_KEYS))
        more = len(self.unread) - _SHOWN_KEYS
        return f"not read: {keys}" + (f" and {more} other keys" if more > 0 else "")


@dataclasses.dataclass
class FoundChats(ReadCounts):
    """What `read_chat_files` found: the conversations, without duplicates, and the counts."""

    chats: list[Chat] = dataclasses.field(default_factory=list)


_SHOWN_KEYS = 8


def read_chats(names: str | Path | Sequence[str | Path]) -> list[Chat]:
    """The conversations in files, directories or datasets, one name or several; the first row that cannot be learned from is an
    error that names file, line and remedy.
    """
    return read_chat_files(names, strict=True).chats


def read_chat_files(names: Sequence[str | Path], answered: bool = True, *, strict: bool = False) -> FoundChats:
    """Reads conversations, in the order of the files and of their rows. Arguments and errors as in `stream_chats`."""
    result = FoundChats()
    result.chats.extend(stream_chats(names, result, answered, strict=strict))
    return result


def stream_chats(
    names: Sequence[str | Path], counts: ReadCounts, answered: bool = True, *, strict: bool = False
) -> Iterator[Chat]:
    """Conversations one after the other, in the order of the files and of their rows.

    Args:
      names: files, directories, patterns or datasets (`data.rows`).
      counts: what became of the rows is added to it.
      answered: whether each must have an assistant turn.
      strict: whether a row that cannot be learned from is an error; else it is skipped and counted.

    Raises FileNotFoundError for a missing file, and ValueError "file:line: what; remedy" for a damaged file, a malformed
    line, and a file without rows; if `strict`, also for an id that two conversations have.
    """
    digests: set[int] = set()
    ids: set[int] = set()
    for row in read_rows(names, COLUMNS, counts.unread):
        counts.read[row.file] += 1
        try:
            conversation = conversation_of(row.value, row.place, answered)
        except BadRow as error:
            if strict:
                raise
            counts.skipped.add(row.file, error)
            continue
        counts.unread.update(unread(row.value, conversation, answered))
        digest = _short_digest(_conversation_bytes(conversation))
        if digest in digests:
            counts.duplicates[row.file] += 1
            continue
        digests.add(digest)
        if not strict and _short_digest(row.id.encode()) in ids:
            counts.renamed += 1
            row = row._replace(id=row.name)
        _check_id(row, ids, names)
        yield Chat(row.id, row.source, conversation.messages, row.place, row.file, *conversation[1:])


def read_prompts(names: str | Path | Sequence[str | Path]) -> list[Prompt]:
    """Reads prompts, in the order of the files and of their rows.

    Raises FileNotFoundError for a missing file, and ValueError "file:line: what; remedy" for the first row that asks nothing
    or cannot be read: results on prompts are compared, so all of them have to be there.
    """
    prompts: list[Prompt] = []
    ids: set[int] = set()
    for row in read_rows(names, COLUMNS):
        prompt = _prompt(row)
        _check_id(row, ids, names)
        prompts.append(prompt)
    return prompts


def _prompt(row: Row) -> Prompt:
    conversation = conversation_of(row.value, row.place, answered=False)
    if not conversation.messages:
        raise BadRow("no_form", row.place, "a text or tokens ask nothing; give 'turns' or messages")
    system, turns = _system_and_turns(conversation.messages)
    if not turns:
        raise BadRow("no_question", row.place, "no user's turn, so nothing to answer; add one or drop the row")
    return Prompt(row.id, row.source, tuple(turns), system, conversation.tools)


def _system_and_turns(messages: Sequence[Message]) -> tuple[str, list[str]]:
    """The system's text, and what the user says before each answer. What follows a tool's result is left out: it returns what
    a call asked for that the target did not make."""
    system: list[str] = []
    turns: list[list[str]] = [[]]
    for message in messages:
        if message["role"] == "tool":
            break
        if message["role"] == "assistant":
            turns.append([])
        else:
            (system if message["role"] == "system" else turns[-1]).append(message["content"])
    return "\n\n".join(system), ["\n\n".join(parts) for parts in turns if parts]


def content_digest(messages: Sequence[Message], tools: Sequence[dict] = ()) -> bytes:
    """sha256 of everything that a chat template may write of a conversation; ids and sources are not in it."""
    return hashlib.sha256(_conversation_bytes(Conversation(tuple(messages), tuple(tools)))).digest()


def _check_id(row: Row, ids: set[int], names: Sequence[str | Path]) -> None:
    """Raise ValueError, naming both places, if another row has this id. `ids` holds digests: 70 MB for a million ids."""
    digest = _short_digest(row.id.encode())
    if digest in ids:
        first = next((earlier.place for earlier in read_rows(names, COLUMNS) if earlier.id == row.id), row.place)
        raise ValueError(
            f"{row.place}: id {row.id!r} was already used at {first}; make ids unique, or leave 'id' out and "
            "name the files differently"
        )
    ids.add(digest)


def _conversation_bytes(conversation: Conversation) -> bytes:
    plain = conversation == (conversation.messages, (), "", (), ())
    return json.dumps(conversation.messages if plain else conversation, sort_keys=True).encode()


def _short_digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=16).digest())
