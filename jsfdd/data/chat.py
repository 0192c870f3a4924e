"""Chat and prompt files: every row becomes a `Chat` or a `Prompt`, or an error that names file, line and remedy.

Files end in .jsonl (one JSON object a line) or .json (one list of objects), each also with .gz. A chat row has one of

    {"messages": [{"role": "user", "content": "…"}, …]}            role: system, user, assistant
    {"conversations": [{"from": "human", "value": "…"}, …]}        ShareGPT; from: system, human, gpt
    {"instruction": "…", "input": "…" (optional), "output": "…"}   Alpaca

and a prompt row has `{"turns": ["…", …]}`. "id" and "source" are optional everywhere: they default to
"<file name>-<line>" (entry number in a .json list) and to the file name, without its endings. Ids are unique over all
files of one call. Other keys are not read. Blank lines of a .jsonl file hold no row.
"""

from __future__ import annotations

import codecs
import dataclasses
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

from jsfdd.records import Prompt

# Reading stops here instead of filling the memory: a few KB of gzip can unfold to any size.
MAX_LINE_BYTES = 64 << 20
MAX_JSON_BYTES = 4 << 30

_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_CHAT_KEYS = ("messages", "conversations", "instruction")
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclasses.dataclass(frozen=True)
class Chat:
    """One conversation with at least one assistant turn.

    Attributes:
      id: unique over the files read together.
      source: the row's own, or its file's name.
      messages: the turns in order.
      place: "file:line", for errors that turn up later.
    """

    id: str
    source: str
    messages: tuple[Message, ...]
    place: str


class _Row(NamedTuple):
    """One JSON object of a file, its id and source settled."""

    value: dict
    id: str
    source: str
    place: str


def read_chats(paths: Sequence[str | Path]) -> list[Chat]:
    """Reads conversations, in the order of the files and of their rows.

    Raises FileNotFoundError for a missing file, and ValueError "file:line: what; remedy" for anything that is not the
    format above: a malformed line, an unknown role, content that is not a string, a conversation without an assistant
    turn, an id that occurs twice, a file without rows.
    """
    chats = []
    for row in _rows(paths):
        messages = _messages(row.value, row.place)
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError(f"{row.place}: no assistant turn, so nothing to learn from; add an answer or drop the row")
        chats.append(Chat(row.id, row.source, messages, row.place))
    return chats


def read_prompts(paths: Sequence[str | Path]) -> list[Prompt]:
    """Reads evaluation prompts, in the order of the files and of their rows.

    Raises what `read_chats` raises; a row needs "turns", a list of at least one string.
    """
    prompts = []
    for row in _rows(paths):
        turns = _field(row.value, "turns", list, row.place)
        if not turns:
            raise ValueError(f"{row.place}: 'turns' is empty; give at least one user turn or drop the row")
        for number, turn in enumerate(turns, 1):
            _check_text(turn, f"turn {number}", row.place)
        prompts.append(Prompt(row.id, row.source, tuple(turns)))
    return prompts


def _rows(paths: Sequence[str | Path]) -> Iterator[_Row]:
    """The rows of all files; an id seen before is an error that names both places."""
    place_of_id: dict[str, str] = {}
    for path in map(Path, paths):
        stem, _, ending = path.name.removesuffix(".gz").rpartition(".")
        if not stem or ending not in ("jsonl", "json"):
            raise ValueError(f"{path}: unknown file ending; expected .jsonl or .json, each also with .gz")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; check the path")
        place = None
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for value, place, number in _lines(stream, path) if ending == "jsonl" else _entries(stream, path):
                if not isinstance(value, dict):
                    raise ValueError(f"{place}: found {_kind(value)}; a row is an object {{…}}")
                row_id, source = value.get("id", f"{stem}-{number}"), value.get("source", stem)
                if type(row_id) is int:
                    row_id = str(row_id)
                _check_text(row_id, "'id'", place)
                _check_text(source, "'source'", place)
                if row_id in place_of_id:
                    raise ValueError(
                        f"{place}: id {row_id!r} was already used at {place_of_id[row_id]}; make ids unique, or leave "
                        "'id' out and name the files differently"
                    )
                place_of_id[row_id] = place
                yield _Row(value, row_id, source, place)
        if place is None:
            raise ValueError(f"{path}: the file holds no rows; remove it from the list or write it again")


def _lines(stream: io.BufferedIOBase, path: Path) -> Iterator[tuple[object, str, int]]:
    """(value, place, line number) of each line that is not blank."""
    for number in itertools.count(1):
        place = f"{path}:{number}"
        data = _read(stream.readline, MAX_LINE_BYTES, place)
        if not data:
            return
        line = _decode(data.removeprefix(codecs.BOM_UTF8) if number == 1 else data, place)
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: malformed JSON ({error}); one complete JSON object a line") from error
            yield value, place, number


def _entries(stream: io.BufferedIOBase, path: Path) -> Iterator[tuple[object, str, int]]:
    """(value, place, entry number from 1) of the one list that a .json file holds, each with the line it starts on."""
    text = _decode(_read(stream.read, MAX_JSON_BYTES, f"{path}:1").removeprefix(codecs.BOM_UTF8), f"{path}:1")
    decoder = json.JSONDecoder()
    line, position = 1, 0

    def advance(to: int) -> str:
        """Moves to the next character after `to` that is no white space, and returns it ("" at the end)."""
        nonlocal line, position
        to = _JSON_SPACE.match(text, to).end()
        line += text.count("\n", position, to)
        position = to
        return text[to : to + 1]

    if advance(0) != "[":
        raise ValueError(
            f"{path}:{line}: a .json file holds one list [row, row, …]; call a file of one object a line .jsonl"
        )
    character = advance(position + 1)
    number = 0
    while not (character == "]" and number == 0):
        number += 1
        place = f"{path}:{line}: entry {number}"
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: malformed JSON ({error}); the file is one list of complete objects") from error
        yield value, place, number
        character = advance(end)
        if character == "]":
            break
        if character != ",":
            raise ValueError(f"{path}:{line}: expected ',' or ']' after entry {number}; is the file cut off?")
        advance(position + 1)
    if advance(position + 1):
        raise ValueError(f"{path}:{line}: text after the closing ']'; a .json file holds one list")


def _read(read: Callable[[int], bytes], limit: int, place: str) -> bytes:
    """Up to `limit` bytes from `read`, with gzip's ways of failing named."""
    try:
        data = read(limit + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{place}: cannot be unpacked as gzip ({error}); copy the file again, or drop .gz if it is not compressed"
        ) from error
    if len(data) > limit:
        raise ValueError(f"{place}: longer than {limit >> 20} MiB; split it into smaller rows")
    return data


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        is_gzip = data.startswith(b"\x1f\x8b")
        remedy = "this is gzip data: add .gz to the file's name" if is_gzip else "save the file as UTF-8"
        raise ValueError(f"{place}: invalid UTF-8 at byte {error.start} ({error.reason}); {remedy}") from error


def _messages(row: dict, place: str) -> tuple[Message, ...]:
    """The conversation of a chat row in any of the three formats."""
    present = [key for key in _CHAT_KEYS if key in row]
    if len(present) != 1:
        found = " and ".join(map(repr, present)) or "none of them"
        raise ValueError(
            f"{place}: a chat row has exactly one of 'messages', 'conversations', 'instruction'; found {found}"
        )
    if present == ["instruction"]:
        instruction, answer = _text(row, "instruction", place), _text(row, "output", place)
        extra = _text(row, "input", place) if "input" in row else ""
        question = f"{instruction}\n\n{extra}" if extra else instruction
        return (Message(role="user", content=question), Message(role="assistant", content=answer))

    (key,) = present
    role_key, content_key = ("role", "content") if key == "messages" else ("from", "value")
    roles = _ROLES if key == "messages" else _SHAREGPT_ROLES
    turns = _field(row, key, list, place)
    if not turns:
        raise ValueError(f"{place}: the conversation is empty; add messages or drop the row")
    messages = []
    for number, turn in enumerate(turns, 1):
        where = f"{place}: message {number}"
        if not isinstance(turn, dict):
            raise ValueError(f"{where} is {_kind(turn)}; expected {{{role_key!r}: …, {content_key!r}: …}}")
        role = _text(turn, role_key, where)
        if role not in roles:
            raise ValueError(f"{where} has the unknown role {role!r}; use one of {', '.join(roles)}")
        messages.append(Message(role=roles[role], content=_text(turn, content_key, where)))
    return tuple(messages)


def _field(row: dict, key: str, kind: type, place: str):
    if key not in row:
        raise ValueError(f"{place}: {key!r} is missing; add it or drop the row")
    if not isinstance(row[key], kind):
        raise ValueError(f"{place}: {key!r} is {_kind(row[key])}; expected {_KINDS[kind]}")
    return row[key]


def _text(row: dict, key: str, place: str) -> str:
    text = _field(row, key, str, place)
    _check_text(text, repr(key), place)
    return text


def _check_text(value: object, what: str, place: str) -> None:
    """A string, and one that UTF-8 can hold: JSON's escapes can spell half a surrogate pair, which is no character."""
    if not isinstance(value, str):
        raise ValueError(f"{place}: {what} is {_kind(value)}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: {what} holds half a surrogate pair at character {error.start}; remove it or write the character"
        ) from error


_KINDS = {str: "a string", list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "null")
