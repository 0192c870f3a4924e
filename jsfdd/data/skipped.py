"""Rows that cannot be learned from: the reasons, the place of the first one, and the limit.

One bad row should not end a run of a million: it is skipped, and counted by its reason. With `--strict` the first such row is
an error. More such rows than `--max-skipped` are an error, which lists every reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Reason = Literal[
    "empty", "no_answer", "unknown_role", "no_text", "no_form", "media", "call", "weight", "tools",
    "special_text", "refused", "rewritten", "unknown_token", "no_counted", "no_question", "too_long",
]  # fmt: skip

# Words that follow a number of rows.
MEANINGS: dict[str, str] = {
    "empty": "empty conversations",
    "no_answer": "without an answer",
    "unknown_role": "with an unknown speaker",
    "no_text": "without text where text is due",
    "no_form": "in no known form",
    "media": "with images, sound or the like",
    "call": "with a tool call that cannot be read",
    "weight": "with a weight other than 0 and 1",
    "tools": "with tools that cannot be read",
    "special_text": "with a special token's text in a message",
    "refused": "that the chat template refuses",
    "rewritten": "whose answers the chat template rewrites",
    "unknown_token": "with a token beyond the target's embedding",
    "no_counted": "without a counted token",
    "no_question": "without a user's turn",
    "too_long": "whose prompt and answer exceed the maximal length",
    "duplicates": "duplicates",
}
_FEW = 3  # this many rows are never too many: a share of a handful says nothing


class BadRow(ValueError):
    """A row that cannot be learned from. Its text names the place, what is wrong and a remedy."""

    def __init__(self, reason: Reason, place: str, what: str):
        super().__init__(f"{place}: {what}")
        self.reason, self.place, self.what = reason, place, what

    def __reduce__(self):
        return type(self), (self.reason, self.place, self.what)


@dataclasses.dataclass
class SkippedRows:
    """Counts of rows that were skipped, by file and reason, and the first of each reason.

    Attributes:
      counts: (file, reason) -> rows.
      first: reason -> the text of its first error.
    """

    counts: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    first: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, file: str, error: BadRow) -> None:
        key = (file, error.reason)
        self.counts[key] = self.counts.get(key, 0) + 1
        self.first.setdefault(error.reason, str(error))

    def total(self) -> int:
        return sum(self.counts.values())


def nothing_left(read: int, counts: Mapping[str, int], first: Mapping[str, str]) -> str:
    """An error's text that says why none of the rows is of use."""
    reasons = _listed(counts, first)
    return f"none of {read:,} conversations can be learned from:{reasons}\ngive other chats, or raise --max-length"


def _listed(counts: Mapping[str, int], first: Mapping[str, str]) -> str:
    """One line for each reason."""
    lines = (
        f"\n  {count:,} {MEANINGS[reason]}" + (f"; first {first[reason]}" if reason in first else "")
        for reason, count in counts.items()
        if count
    )
    return "".join(lines)


def check_skipped(read: int, counts: Mapping[str, int], first: Mapping[str, str], limit: float | None) -> None:
    """ValueError with all reasons if more than the share `limit` of the rows was skipped.

    Args:
      read: rows in all.
      counts, first: rows and the first error's text by reason; of reasons that speak of the data (`MEANINGS` names all).
      limit: None: 5%, but never so few rows as a handful.
    """
    skipped = sum(counts.values())
    if skipped <= (max(_FEW, 0.05 * read) if limit is None else limit * read):
        return
    share = 0.05 if limit is None else limit
    raise ValueError(
        f"{skipped:,} of {read:,} rows cannot be learned from, more than --max-skipped {100 * share:g}%:"
        f"{_listed(counts, first)}\nrepair or drop them, or allow more with --max-skipped"
    )
