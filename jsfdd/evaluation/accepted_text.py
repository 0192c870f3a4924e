"""An answer as text in pieces, by who wrote them: the draft, whose tokens the target accepted, or the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def accepted_pieces(
    decode: Callable[[list[int]], str], tokens: Sequence[int], drafted: Sequence[bool]
) -> list[tuple[str, bool]]:
    """[(text, whether the draft proposed it)], neighbours of one kind together; joined, they are the answer's text.

    A character that spans tokens of both kinds belongs to the one that completes it; one that the answer's last token leaves
    unfinished is left out.

    Example:
      >>> accepted_pieces(lambda ids: "".join(map(chr, ids)), [72, 105, 33, 33], [False, True, True, False])
      [('H', False), ('i!', True), ('!', False)]
    """
    pieces: list[tuple[str, bool]] = []
    written = ""
    for end in range(1, len(tokens) + 1):
        kind, last = bool(drafted[end - 1]), end == len(tokens)
        if not last and bool(drafted[end]) == kind:
            continue  # the piece goes on
        text = decode(list(tokens[:end]))
        if not last and text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # inside a character
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character that the answer leaves unfinished
        if len(text) > len(written):
            pieces.append((text[len(written) :], kind))
            written = text
    return pieces
