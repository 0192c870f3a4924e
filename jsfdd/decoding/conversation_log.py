"""A log of answers on disk, so that a restarted process continues where a killed one stopped.

    {"identity": {…}}                                                                        what the answers depend on
    {"turn": 0, "numbers": [3, 5], "answers": [["…", 41, false], …], "accept_counts": […]}   one line per batch, in order

Lines are only appended, and each is on disk before the next batch begins. An incomplete last line was cut short by a kill and
is ignored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, TypedDict

import msgspec

from jsfdd.base.files import append_line, differences, plain, sync


class Answer(NamedTuple):
    """One answer.

    Attributes:
      text: without special tokens.
      num_tokens: the stop token included.
      truncated: whether the answer reached the longest length without a stop token.
    """

    text: str
    num_tokens: int
    truncated: bool


class AnsweredBatch(NamedTuple):
    """The answers of one batch.

    Attributes:
      turn: from 0.
      numbers: the conversations' numbers.
      answers: one per conversation.
      accept_counts: [G+1], the number of verifications of the batch in which i draft tokens were accepted.
    """

    turn: int
    numbers: list[int]
    answers: list[Answer]
    accept_counts: list[int]


class _First(TypedDict):
    identity: dict


class _Batch(TypedDict):
    turn: int
    numbers: list[int]
    answers: list[tuple[str, int, bool]]
    accept_counts: list[int]


def read_log(path: Path, identity: dict) -> list[AnsweredBatch]:
    """Read the batches that earlier calls answered; none if there is no log.

    Raises:
      ValueError: the answers have another identity, or a line is damaged.
    """
    lines = []
    for number, row in enumerate(_whole_lines(path).splitlines(), 1):
        try:
            line = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: damaged ({error}); delete the file and start anew") from error
        expected, kind = ({"identity"}, _First) if number == 1 else (set(AnsweredBatch._fields), _Batch)
        try:
            msgspec.convert(line, kind)
        except (msgspec.ValidationError, UnicodeError):  # half a surrogate pair is no text
            expected = None
        if expected is None or set(line) != expected:
            raise ValueError(f"{path}:{number}: not a line of answers; delete the file and start anew")
        lines.append(line)
    if not lines:
        return []
    if changed := differences(lines[0]["identity"], plain(identity)):
        raise ValueError(f"{path}: answers of another run ({changed}); delete it or choose another --out")
    return [AnsweredBatch(**line)._replace(answers=[Answer(*answer) for answer in line["answers"]]) for line in lines[1:]]


def open_log(path: Path, identity: dict) -> None:
    """Prepare a log for appending: remove an incomplete last line, and write the first line if there is none."""
    whole = _whole_lines(path)
    with path.open("ab") as file:
        file.truncate(len(whole))
    if not whole:
        append_line(path, {"identity": identity})
        sync(path.parent)


def append_batch(path: Path, batch: AnsweredBatch) -> None:
    """Append one batch and flush it to disk."""
    append_line(path, batch._asdict())


def _whole_lines(path: Path) -> bytes:
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]
