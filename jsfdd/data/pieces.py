"""The tokens of a text, piece by piece: a piece that came up before has its tokens already.

Byte-level tokenizers split a text by a pattern and then merge bytes within each part, so what stands left of a border between
parts has no influence on the tokens to its right, nor the other way round. `_PIECE` cuts only at such borders:

  - before a space that follows anything but white space,
  - between an ASCII letter and an ASCII character after it that is no letter.

No part of the patterns in `_EVERYTHING` reaches over either, and none looks further than white space. What a piece becomes is
asked of the library; the twin is the library's encoding of the whole text, with which a test compares. Tokenizers that split by
another rule, rewrite texts, or whose added tokens take in what is around them have no pieces.
"""

from __future__ import annotations

import json
import re
from array import array

import numpy as np
from jaxtyping import Int

from jsfdd.data.marks import any_of
from jsfdd.data.mask import KnownOffsets

_PIECE = re.compile(
    r" ?[A-Za-z]+(?![^\x00-@\[-`{-\x7f])"  # a word, before what is neither a letter nor beyond ASCII
    r"|\s*\S+(?:[^\S ]\s*(?:\S+|\Z))*|\s+"  # or everything up to a space behind what is none
)
_KEPT = 1 << 18  # pieces: about 50 MB
_LONGEST = 32  # characters of a piece that is kept; longer ones rarely come again
_CONTRACTIONS = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'s|'t|'re|'ve|'m|'ll|'d")
_EVERYTHING = (  # parts that match letters, numbers, white space and all others
    {r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+"},
    {r"\p{N}", r"\p{N}{1,3}", r" ?\p{N}+"},
    {r"\s+", r"\s+(?!\S)", r"\s*[\r\n]+"},
    {r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"},
)


class PieceTokenizer:
    """Tokenizes texts as the library does; `piece_tokenizer` makes one."""

    def __init__(self, backend):
        added = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}
        self._added = re.compile(f"({any_of(added.values()).pattern})")
        self._normalizer = backend.normalizer
        self._known = _Known(backend)
        vocabulary = backend.get_vocab(with_added_tokens=False)  # a character stands for a byte
        self._bytes = np.zeros(max([*vocabulary.values(), *added]) + 1, np.int64)  # of each token
        self._bytes[list(vocabulary.values())] = [len(token) for token in vocabulary]
        for number, content in added.items():
            self._bytes[number] = len(content.encode())

    def encode(self, text: str) -> tuple[Int[np.ndarray, " T"], KnownOffsets] | None:
        """Ids and offsets, as the library's encoding has them; None for a text that the tokenizer would rewrite, or of which it
        would leave out bytes that its vocabulary does not have."""
        plain = text.isascii()
        if not plain and self._normalizer is not None and self._normalizer.normalize_str(text) != text:
            return None
        pieces: list[str] = []
        for number, part in enumerate(self._added.split(text)):
            if number % 2:  # an added token
                pieces.append(part)
            else:
                pieces += _PIECE.findall(part)
        ids = np.frombuffer(b"".join(map(self._known.__getitem__, pieces)), np.int32)
        lengths = self._bytes[ids]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        data = np.frombuffer(text.encode(), np.uint8)
        if lengths.sum() != len(data):
            return None
        if not plain:  # a token may begin and end inside a character
            first = np.flatnonzero((data & 0xC0) != 0x80)  # the first byte of every character
            starts, ends = np.searchsorted(first, starts, "right") - 1, np.searchsorted(first, ends, "left")
        return ids, KnownOffsets(starts, ends)


class _Known(dict[str, bytes]):
    """piece -> its ids, int32 one after the other; what is not there is asked for."""

    def __init__(self, backend):
        super().__init__()
        self._encode = backend.encode

    def __missing__(self, piece: str) -> bytes:
        ids = array("i", self._encode(piece, add_special_tokens=False).ids).tobytes()
        if len(piece) <= _LONGEST:
            if len(self) >= _KEPT:  # another file may have other words
                self.clear()
            self[piece] = ids
        return ids


def piece_tokenizer(backend) -> PieceTokenizer | None:
    """A tokenizer by pieces, if the backend (without a post-processor) splits texts so that they may be taken apart."""
    model, tokens = backend.model, backend.get_added_tokens_decoder().values()
    if (
        type(model).__name__ != "BPE"
        or model.dropout
        or model.continuing_subword_prefix
        or model.end_of_word_suffix
        or model.unk_token is not None
        or backend.encode_special_tokens
        or any(token.normalized or token.lstrip or token.rstrip or token.single_word for token in tokens)
        or (backend.normalizer is not None and _state(backend.normalizer) != {"type": "NFC"})
        or backend.pre_tokenizer is None
        or not _splits_at_borders(_steps(_state(backend.pre_tokenizer)))
    ):
        return None
    return PieceTokenizer(backend)


def _splits_at_borders(steps: list[dict]) -> bool:
    """Whether the steps of a pre-tokenizer have no parts but those of `_EVERYTHING`, one splits everything, and the last one
    makes bytes."""
    *before, last = steps
    return (
        all(map(_is_known, before))
        and last["type"] == "ByteLevel"
        and not last["add_prefix_space"]
        and (last["use_regex"] or any(all(parts & _parts(step) for parts in _EVERYTHING) for step in before))
    )


def _is_known(step: dict) -> bool:
    return step["type"] == "Digits" or _parts(step) <= set().union(*_EVERYTHING)


def _parts(step: dict) -> set[str]:
    """The alternatives of a step's pattern, beside contractions; one that is not known for any other step."""
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"] or "Regex" not in step["pattern"]:
        return {step["type"]}
    pattern = step["pattern"]["Regex"]
    for contractions in _CONTRACTIONS:
        pattern = pattern.removeprefix(f"{contractions}|")
    return set(pattern.split("|"))


def _steps(state: dict) -> list[dict]:
    return [step for inner in state["pretokenizers"] for step in _steps(inner)] if state["type"] == "Sequence" else [state]


def _state(part) -> dict:
    """What a part of a backend is made of; only the whole and these states are to be had as JSON."""
    return json.loads(part.__getstate__())
