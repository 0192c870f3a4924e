"""Chats and prompts from files: every row becomes a `Chat` or a `Prompt`, or an error that names file, line and remedy.

Which files a name stands for, and how they are read, is in `data.files`; the forms of chat rows are in `data.forms`. A
prompt row has `{"turns": ["…", …]}`. "id" and "source" are optional everywhere.

A conversation with the same messages as an earlier one, in whichever file, is a duplicate: it is left out and counted,
whatever its id. Two different conversations (or two prompts) with one id are an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jsfdd.base.records import Prompt
from jsfdd.data.forms import COLUMNS, Message, messages_of
from jsfdd.data.rows import Row, check_text, kind_of, read_rows


@dataclasses.dataclass(frozen=True)
class Chat:
    """One conversation; with at least one assistant turn unless it was read to be answered.

    Attributes:
      id: unique over the files read together.
      source: the row's own, or its file's name.
      messages: the turns in order.
      place: "file:line", for errors that turn up later.
      file: the file it came from; empty if it was made in Python.
    """

    id: str
    source: str
    messages: tuple[Message, ...]
    place: str
    file: str = ""


class FoundChats(NamedTuple):
    """What `read_chat_files` found.

    Attributes:
      chats: the conversations, without duplicates.
      read: rows by file, in the order of the files.
      duplicates: how many of them were left out as duplicates.
    """

    chats: list[Chat]
    read: dict[str, int]
    duplicates: Counter[str]


def read_chats(names: Sequence[str | Path]) -> list[Chat]:
    """The conversations of `read_chat_files`."""
    return read_chat_files(names).chats


def read_chat_files(names: Sequence[str | Path], answered: bool = True) -> FoundChats:
    """Reads conversations, in the order of the files and of their rows.

    Args:
      names: files, directories, patterns or datasets (`data.files`).
      answered: whether each must have an assistant turn.

    Raises FileNotFoundError for a missing file, and ValueError "file:line: what; remedy" for anything that is not in a
    known form: a malformed line, an unknown role, content that is not text, a conversation without an assistant turn, an
    id that two conversations have, a file without rows.
    """
    chats, read, duplicates = [], Counter(), Counter()
    seen: set[bytes] = set()
    place_of_id: dict[str, str] = {}
    for row in read_rows(names, COLUMNS):
        messages = messages_of(row.value, row.place)
        if answered and not any(message["role"] == "assistant" for message in messages):
            raise ValueError(f"{row.place}: no assistant turn, so nothing to learn from; add an answer or drop the row")
        read[row.file] += 1
        digest = content_digest(messages)
        if digest in seen:
            duplicates[row.file] += 1
            continue
        seen.add(digest)
        _check_id(row, place_of_id)
        chats.append(Chat(row.id, row.source, messages, row.place, row.file))
    return FoundChats(chats, dict(read), duplicates)


def read_prompts(names: Sequence[str | Path]) -> list[Prompt]:
    """Reads evaluation prompts, in the order of the files and of their rows.

    Raises what `read_chats` raises; a row needs "turns", a list of at least one string.
    """
    prompts = []
    place_of_id: dict[str, str] = {}
    for row in read_rows(names, ("turns",)):
        if "turns" not in row.value:
            raise ValueError(f"{row.place}: 'turns' is missing; add it or drop the row")
        turns = row.value["turns"]
        if not isinstance(turns, list):
            raise ValueError(f"{row.place}: 'turns' is {kind_of(turns)}; expected a list")
        if not turns:
            raise ValueError(f"{row.place}: 'turns' is empty; give at least one user turn or drop the row")
        for number, turn in enumerate(turns, 1):
            check_text(turn, f"turn {number}", row.place)
            if not turn.strip():
                raise ValueError(f"{row.place}: turn {number} of 'turns' is empty; write it or drop the row")
        _check_id(row, place_of_id)
        prompts.append(Prompt(row.id, row.source, tuple(turns)))
    return prompts


def content_digest(messages: Sequence[Message]) -> bytes:
    """sha256 of everything that a chat template may write of a conversation; ids and sources are not in it."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).digest()


def _check_id(row: Row, place_of_id: dict[str, str]) -> None:
    if row.id in place_of_id:
        raise ValueError(
            f"{row.place}: id {row.id!r} was already used at {place_of_id[row.id]}; make ids unique, or leave 'id' out and "
            "name the files differently"
        )
    place_of_id[row.id] = row.place
