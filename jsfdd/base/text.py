"""Text from files on its way to a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with a mark for each character that a terminal could obey: names, ids and chats may hold anything."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def shortened(text: str, longest: int = 2000) -> str:
    """The text, without its middle if it is too long for a line: names come first, and remedies last."""
    if len(text) <= longest:
        return text
    return f"{text[: longest * 2 // 3]} … {text[-longest // 3 :]}"
