"""Counts of each input file's rows: how many were read, kept and cut, and how many were skipped for each reason."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from jsfdd.data.chat import FoundChats, ReadCounts
from jsfdd.data.questions import QuestionSummary
from jsfdd.data.skipped import MEANINGS, check_skipped
from jsfdd.data.template import Tally, TokenizeSummary

# Rows that are left out by what was asked for, not by what is wrong with them.
_NO_FAULT = ("duplicates", "no_counted", "no_question", "too_long")
_ALWAYS = ("duplicates", "no_counted", "special_text", "refused", "no_question", "too_long")


@dataclasses.dataclass(frozen=True)
class FileCounts:
    """Rows of one file: read = kept + the sum of skipped.

    Attributes:
      file: as the inputs name it.
      read: rows in it.
      kept: those of them that samples were made of.
      truncated: samples that were cut to the maximal length.
      skipped: rows by reason (`data.skipped.MEANINGS`), duplicates among them.
    """

    file: str
    read: int
    kept: int
    truncated: int
    skipped: dict[str, int]

    def __str__(self) -> str:
        skipped = [f"{count:,} {MEANINGS[reason]}" for reason, count in self.skipped.items() if count]
        cut = f" ({self.truncated:,} of them cut to the maximal length)" if self.truncated else ""
        ending = f"; skipped: {', '.join(skipped)}" if skipped else ""
        return f"{self.file}: {self.read:,} read, {self.kept:,} kept{cut}{ending}"

    def to_json(self) -> dict:
        """A flat dict: every reason beside the other numbers. The usual reasons are there even if they are 0."""
        return {
            "file": self.file, "read": self.read, "kept": self.kept, "truncated": self.truncated,
            **dict.fromkeys(_ALWAYS, 0), **self.skipped,
        }  # fmt: skip


def counts_of(read: ReadCounts, tally: Tally) -> list[FileCounts]:
    """The counts of every file, in the order of the files, where `tally` was told the files."""
    return _count(read, tally.by_file)


def count_by_file(found: FoundChats, summary: TokenizeSummary) -> list[FileCounts]:
    """The counts of every file, in the order of the files.

    Args:
      found: from `read_chat_files`.
      summary: from `tokenize_chats` of found.chats.
    """
    return _count(found, _by_file(found, summary.skipped | {"truncated": summary.truncated}))


def count_questions_by_file(read: ReadCounts, summary: QuestionSummary) -> list[FileCounts]:
    """As `count_by_file`, of the chats that `questions_of` was given as they were read."""
    return _count(read, summary.by_file)


def total(counts: Sequence[FileCounts]) -> FileCounts:
    """The sums over all files, as the counts of one file "all files"."""
    skipped: Counter[str] = Counter()
    for count in counts:
        skipped.update(count.skipped)
    read, kept, truncated = (sum(getattr(count, name) for count in counts) for name in ("read", "kept", "truncated"))
    return FileCounts("all files", read, kept, truncated, dict(skipped))


def check_too_many_skipped(counts: Sequence[FileCounts], first: Mapping[str, str], limit: float | None) -> None:
    """ValueError with all reasons if more than the share `limit` of all rows cannot be learned from.

    Args:
      first: of each reason, what is wrong with its first row, and where.
      limit: None for the usual share (`data.skipped.check_skipped`).
    """
    everything = total(counts)
    faults = {reason: count for reason, count in everything.skipped.items() if count and reason not in _NO_FAULT}
    check_skipped(everything.read, faults, first, limit)


def _by_file(found: FoundChats, ids_of: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], int]:
    file_of = {chat.id: chat.file for chat in found.chats}
    counts: Counter[tuple[str, str]] = Counter()
    for what, ids in ids_of.items():
        # A sample of one answer among several is named after its conversation.
        counts.update((file_of[one if one in file_of else one.rpartition("/")[0]], what) for one in ids)
    return counts


def _count(read: ReadCounts, others: Mapping[tuple[str, str], int]) -> list[FileCounts]:
    """Counts from those of reading and from others by file and reason ("truncated" among them)."""
    by_file: dict[str, Counter[str]] = {file: Counter(duplicates=read.duplicates[file]) for file in read.read}
    for counts in (read.skipped.counts, others):
        for (file, what), count in counts.items():
            by_file[file][what] += count
    files = []
    for file, rows in read.read.items():
        cut = by_file[file].pop("truncated", 0)
        skipped = {what: count for what, count in by_file[file].items() if count}
        files.append(FileCounts(file, rows, rows - sum(skipped.values()), cut, skipped))
    return files
