"""The assistant mask: from spans of characters to tokens."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
from jaxtyping import Bool

from jsfdd.data.answers import Span


def assistant_mask(
    encoding,
    text: str,
    spans: Sequence[Span],
    closed: Sequence[int],
    excluded: Sequence[Span],
    added_tokens: Container[int],
) -> Bool[np.ndarray, " T"]:
    """True on the tokens of the spans without those that touch an excluded one, and on the added token that closes each
    whose end is in `closed`. `encoding` is the tokenizer's of `text`."""
    ids = encoding.ids  # the property builds the list at every access
    offsets = _Offsets(encoding, len(ids), len(text))
    mask = np.zeros(len(ids), bool)
    for values, counts in ((spans, True), (excluded, False)):
        for begin, end in values:
            if begin < end:  # several byte-level tokens of one character all have that character's offsets
                mask[offsets.first_beyond(begin) : offsets.first_from(end)] = counts
    for end in closed:
        # A token may lie across the end (an end-of-turn token that takes in the spaces before it), so what counts is
        # what it covers beyond the content.
        for t in range(offsets.first_beyond(end), len(ids)):
            start, stop = encoding.token_to_chars(t)
            if text[max(start, end) : stop].strip():
                mask[t] |= ids[t] in added_tokens
                break
    return mask


class _Offsets:
    """Which tokens begin and end where, asked of the encoding one by one: a list of all offsets costs a quarter of encoding."""

    def __init__(self, encoding, num_tokens: int, num_characters: int):
        self.encoding, self.num_tokens, self.num_characters = encoding, num_tokens, num_characters

    def first_beyond(self, position: int) -> int:
        """The first token that ends behind a character position."""
        for character in range(position, self.num_characters):
            token = self.encoding.char_to_token(character)
            if token is not None:  # a normalizer may have taken the character away
                return token
        return self.num_tokens

    def first_from(self, position: int) -> int:
        """The first token that begins at a character position or behind it."""
        token = self.first_beyond(position)
        while token < self.num_tokens and self.encoding.token_to_chars(token)[0] < position:
            token += 1
        return token
