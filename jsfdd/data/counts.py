"""What became of each input file's rows: how many were read, kept, cut, and left out for which reason."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from jsfdd.data.chat import FoundChats
from jsfdd.data.questions import QuestionSummary
from jsfdd.data.template import TokenizeSummary

# Field -> what it means behind a number.
_REASONS = {
    "duplicates": "duplicates",
    "no_counted": "without a counted token",
    "special_text": "with a special token's text in a message",
    "refused": "that the chat template refuses",
    "no_question": "without a user's turn",
    "too_long": "whose prompt and answer exceed the maximal length",
}


@dataclasses.dataclass(frozen=True)
class FileCounts:
    """Rows of one file: read = kept + duplicates + no_counted + special_text + refused + no_question + too_long.

    Attributes:
      file: as the inputs name it.
      read: rows in it.
      kept: samples made of them.
      truncated: how many of those were cut to the maximal length.
      duplicates: rows with the messages of an earlier one, of this file or another.
      no_counted, special_text, refused: as in `TokenizeSummary`.
      no_question, too_long: as in `QuestionSummary`; none but where the target is to answer.
    """

    file: str
    read: int
    kept: int
    truncated: int
    duplicates: int
    no_counted: int
    special_text: int
    refused: int
    no_question: int = 0
    too_long: int = 0

    def __str__(self) -> str:
        skipped = [f"{getattr(self, name):,} {meaning}" for name, meaning in _REASONS.items() if getattr(self, name)]
        cut = f" ({self.truncated:,} of them cut to the maximal length)" if self.truncated else ""
        ending = f"; skipped: {', '.join(skipped)}" if skipped else ""
        return f"{self.file}: {self.read:,} read, {self.kept:,} kept{cut}{ending}"


def count_by_file(found: FoundChats, summary: TokenizeSummary) -> list[FileCounts]:
    """The counts of every file, in the order of the files.

    Args:
      found: from `read_chat_files`.
      summary: from `tokenize_chats` of found.chats.
    """
    reasons = {name: getattr(summary, name) for name in ("no_counted", "special_text", "refused")}
    return _count(found, reasons, summary.truncated)


def count_questions_by_file(found: FoundChats, summary: QuestionSummary) -> list[FileCounts]:
    """As `count_by_file`, with the summary of `questions_of` of found.chats."""
    return _count(found, summary._asdict(), truncated=())


def _count(found: FoundChats, skipped: Mapping[str, Sequence[str]], truncated: Sequence[str]) -> list[FileCounts]:
    """Counts from the ids that were skipped for each reason, and those that were cut."""
    file_of = {chat.id: chat.file for chat in found.chats}
    by_reason = {name: Counter(file_of[chat_id] for chat_id in ids) for name, ids in skipped.items()}
    by_reason["duplicates"] = by_reason.get("duplicates", Counter()) + found.duplicates
    cut = Counter(file_of[chat_id] for chat_id in truncated)
    counts = []
    for file, read in found.read.items():
        numbers = {"no_counted": 0} | {name: ids[file] for name, ids in by_reason.items()}
        counts.append(FileCounts(file=file, read=read, kept=read - sum(numbers.values()), truncated=cut[file], **numbers))
    return counts


def total(counts: list[FileCounts]) -> FileCounts:
    """The sums of all files, as those of one "all files"."""
    names = [field.name for field in dataclasses.fields(FileCounts) if field.name != "file"]
    return FileCounts(file="all files", **{name: sum(getattr(count, name) for count in counts) for name in names})
