"""What became of each input file's rows: how many were read, kept, cut, and left out for which reason."""

from __future__ import annotations

import dataclasses
from collections import Counter

from jsfdd.data.chat import FoundChats
from jsfdd.data.template import TokenizeSummary

# Field -> what it means behind a number.
_REASONS = {
    "duplicates": "duplicates",
    "no_counted": "without a counted token",
    "special_text": "with a special token's text in a message",
    "refused": "that the chat template refuses",
}


@dataclasses.dataclass(frozen=True)
class FileCounts:
    """Rows of one file: read = kept + duplicates + no_counted + special_text + refused.

    Attributes:
      file: as the inputs name it.
      read: rows in it.
      kept: samples made of them.
      truncated: how many of those were cut to the maximal length.
      duplicates: rows with the messages of an earlier one, of this file or another.
      no_counted, special_text, refused: as in `TokenizeSummary`.
    """

    file: str
    read: int
    kept: int
    truncated: int
    duplicates: int
    no_counted: int
    special_text: int
    refused: int

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
    file_of = {chat.id: chat.file for chat in found.chats}
    names = ("truncated", "no_counted", "special_text", "refused")
    by_reason = {name: Counter(file_of[chat_id] for chat_id in getattr(summary, name)) for name in names}
    counts = []
    for file, read in found.read.items():
        numbers = {name: by_reason[name][file] for name in names}
        skipped = found.duplicates[file] + sum(number for name, number in numbers.items() if name != "truncated")
        counts.append(FileCounts(file=file, read=read, kept=read - skipped, duplicates=found.duplicates[file], **numbers))
    return counts


def total(counts: list[FileCounts]) -> FileCounts:
    """The sums of all files, as those of one "all files"."""
    names = [field.name for field in dataclasses.fields(FileCounts) if field.name != "file"]
    return FileCounts(file="all files", **{name: sum(getattr(count, name) for count in counts) for name in names})
