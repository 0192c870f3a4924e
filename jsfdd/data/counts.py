"""What became of each input file's rows: how many were read, kept, cut, and left out for which reason."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from jsfdd.data.chat import FoundChats
from jsfdd.data.questions import QuestionSummary
from jsfdd.data.skipped import MEANINGS, check_skipped
from jsfdd.data.template import TokenizeSummary

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
        """Flat: every reason beside the other numbers, the usual ones also where they are 0."""
        return {
            "file": self.file, "read": self.read, "kept": self.kept, "truncated": self.truncated,
            **dict.fromkeys(_ALWAYS, 0), **self.skipped,
        }  # fmt: skip


def count_by_file(found: FoundChats, summary: TokenizeSummary) -> list[FileCounts]:
    """The counts of every file, in the order of the files.

    Args:
      found: from `read_chat_files`.
      summary: from `tokenize_chats` of found.chats.
    """
    return _count(found, summary.skipped, summary.truncated)


def count_questions_by_file(found: FoundChats, summary: QuestionSummary) -> list[FileCounts]:
    """As `count_by_file`, with the summary of `questions_of` of found.chats."""
    return _count(found, summary.skipped, truncated=())


def total(counts: Sequence[FileCounts]) -> FileCounts:
    """The sums of all files, as those of one "all files"."""
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


def _count(found: FoundChats, skipped: Mapping[str, Sequence[str]], truncated: Sequence[str]) -> list[FileCounts]:
    """Counts from the ids that were skipped for each reason, and those that were cut."""
    file_of = {chat.id: chat.file for chat in found.chats}
    by_file: dict[str, Counter[str]] = {file: Counter(duplicates=found.duplicates[file]) for file in found.read}
    for (file, reason), count in found.skipped.counts.items():
        by_file[file][reason] += count
    for reason, ids in skipped.items():
        for chat_id in ids:
            by_file[file_of[chat_id]][reason] += 1
    cut = Counter(file_of[sample_id if sample_id in file_of else sample_id.rpartition("/")[0]] for sample_id in truncated)
    return [
        FileCounts(file, read, read - by_file[file].total(), cut[file], {name: n for name, n in by_file[file].items() if n})
        for file, read in found.read.items()
    ]
