"""The assistant mask: from spans of characters to tokens."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
from jaxtyping import Bool, Int

from jsfdd.data.answers import Span


class KnownOffsets:
    """Which tokens begin and end where, of a text whose tokens follow one another without gaps.

    Attributes:
      starts, ends: characters, not decreasing. Several tokens of one character all have that character's.
    """

    def __init__(self, starts: Int[np.ndarray, " T"], ends: Int[np.ndarray, " T"]):
        self.starts, self.ends = starts, ends

    def first_beyond(self, position: int) -> int:
        """The first token that ends behind a character position."""
        return int(np.searchsorted(self.ends, position, "right"))

    def first_from(self, position: int) -> int:
        """The first token that begins at a character position or behind it."""
        return int(np.searchsorted(self.starts, position, "left"))

    def span(self, token: int) -> Span:
        return int(self.starts[token]), int(self.ends[token])


class AskedOffsets:
    """The same of a tokenizer's encoding, asked one by one: a list of all offsets costs a quarter of encoding."""

    def __init__(self, encoding, num_tokens: int, num_characters: int):
        self.encoding, self.num_tokens, self.num_characters = encoding, num_tokens, num_characters

    def first_beyond(self, position: int) -> int:
        for character in range(position, self.num_characters):
            token = self.encoding.char_to_token(character)
            if token is not None:  # a normalizer may have taken the character away
                return token
        return self.num_tokens

    def first_from(self, position: int) -> int:
        token = self.first_beyond(position)
        while token < self.num_tokens and self.encoding.token_to_chars(token)[0] < position:
            token += 1
        return token

    def span(self, token: int) -> Span:
        return self.encoding.token_to_chars(token)


def assistant_mask(
    ids: Sequence[int],
    offsets: KnownOffsets | AskedOffsets,
    text: str,
    spans: Sequence[Span],
    closed: Sequence[int],
    excluded: Sequence[Span],
    added_tokens: Container[int],
) -> Bool[np.ndarray, " T"]:
    """True on the tokens of the spans without those that touch an excluded one, and on the added token that closes each
    whose end is in `closed`. `ids` and `offsets` are those of `text`."""
    mask = np.zeros(len(ids), bool)
    for values, counts in ((spans, True), (excluded, False)):
        for begin, end in values:
            if begin < end:  # several byte-level tokens of one character all have that character's offsets
                mask[offsets.first_beyond(begin) : offsets.first_from(end)] = counts
    for end in closed:
        # A token may lie across the end (an end-of-turn token that takes in the spaces before it), so what counts is
        # what it covers beyond the content.
        for t in range(offsets.first_beyond(end), len(ids)):
            start, stop = offsets.span(t)
            if text[max(start, end) : stop].strip():
                mask[t] |= ids[t] in added_tokens
                break
    return mask
