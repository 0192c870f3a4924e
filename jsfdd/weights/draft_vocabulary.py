"""Which tokens a draft with a small head can propose, as files say it.

An EAGLE-3 draft's head is a tensor of its own: d2t int64[Vq] says by how much row i lies before the token that it is of, and
t2d bool[V] whether a token has a row.

An EAGLE-1/2 draft borrows the target's head, and engines read no tokens for it: they take the whole head, and let the draft
propose all tokens. So the tokens stand in a file beside the weights, draft_vocabulary.json, a list of them in ascending order.
jsfdd reads it, engines do not; `weights/card.py` says how SGLang's token map is made of it.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

from jsfdd.base.files import read_json
from jsfdd.models.draft import DraftConfig, allowed_tokens
from jsfdd.weights.huggingface_config import check_no_pointer
from jsfdd.weights.layout import Source

VOCABULARY_FILE = "draft_vocabulary.json"
_REMEDY = "copy it from the draft's directory again, or export the draft once more"


def vocabulary_tensors(config: DraftConfig) -> dict[str, np.ndarray]:
    """d2t int64[Vq] and t2d bool[V] of an EAGLE-3 draft: zeros and true if it proposes all tokens."""
    size = config.decoder.vocab_size
    allowed = allowed_tokens(config)
    allowed = np.ones(size, bool) if allowed is None else allowed
    tokens = np.flatnonzero(allowed)
    return {"d2t": tokens - np.arange(len(tokens)), "t2d": allowed}


def read_vocabulary_tensors(
    path: Path, draft_size: object, size: int, sources: dict[str, Source]
) -> tuple[tuple[int, ...], np.ndarray | None]:
    """(the tokens that an EAGLE-3 draft proposes, ascending and empty for all; the order that sorts its head's rows, None if
    sorted). Takes d2t and t2d out of `sources`.

    Args:
      path, draft_size: config.json, and its draft_vocab_size.
      size: the target's tokens.

    Raises:
      ValueError: d2t is missing, or names a token twice or one that there is not, or t2d another.
    """
    draft_size = size if draft_size is None else draft_size
    if not isinstance(draft_size, int) or not 0 < draft_size <= size:
        raise ValueError(f"{path}: draft_vocab_size is {draft_size!r:.80}, not a number of the target's {size} tokens")
    d2t, t2d = sources.pop("d2t", None), sources.pop("t2d", None)
    if d2t is None:
        if draft_size < size:
            raise ValueError(
                f"{path}: draft_vocab_size is {draft_size} of {size} tokens, but there is no tensor d2t that says which"
            )
        return (), None
    offsets = _whole(d2t, "d2t", draft_size)
    tokens = np.arange(draft_size) + offsets
    if outside := np.flatnonzero((tokens < 0) | (tokens >= size)).tolist():
        raise ValueError(
            f"{d2t.file}: tensor d2t: row {outside[0]} would be of token {tokens[outside[0]]}, and the target has {size}; it "
            "holds each token less the number of the row"
        )
    order = np.argsort(tokens, kind="stable")
    repeats = np.flatnonzero(np.diff(tokens[order]) == 0).tolist()
    if repeats:
        rows = sorted(order[repeats[0] : repeats[0] + 2].tolist())
        raise ValueError(f"{d2t.file}: tensor d2t: rows {rows[0]} and {rows[1]} are both of token {tokens[rows[0]]}")
    if t2d is not None and not np.array_equal(_whole(t2d, "t2d", size) != 0, np.isin(np.arange(size), tokens)):
        raise ValueError(f"{t2d.file}: tensor t2d marks other tokens than d2t gives rows to; one of them is damaged")
    vocabulary = () if draft_size == size else tuple(tokens[order].tolist())
    return vocabulary, None if np.array_equal(order, np.arange(draft_size)) else order


def write_vocabulary_file(directory: Path, config: DraftConfig) -> None:
    """Put the tokens of an EAGLE-1/2 draft beside its weights; a draft that proposes all has no such file."""
    if config.vocabulary:
        (directory / VOCABULARY_FILE).write_text(json.dumps(list(config.vocabulary)) + "\n", encoding="utf-8")


def read_vocabulary_file(directory: Path, size: int) -> tuple[int, ...]:
    """The tokens of an EAGLE-1/2 draft, of the target's `size`; empty, for all, if there is no such file.

    Raises:
      ValueError: the file is damaged, or not an ascending list of tokens; it names the first that is wrong.
    """
    path = directory / VOCABULARY_FILE
    if not path.exists() and not path.is_symlink():  # a link that leads nowhere is a lost file
        return ()
    check_no_pointer(path)
    tokens = read_json(path, list, remedy=_REMEDY)
    if not tokens:
        raise ValueError(f"{path}: an empty list: a draft that could propose no token; {_REMEDY}")
    for number, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size:
            raise ValueError(f"{path}: entry {number} is {token!r:.80}, not one of the target's {size} tokens; {_REMEDY}")
    for number, (before, token) in enumerate(itertools.pairwise(tokens), 1):
        if token <= before:
            raise ValueError(f"{path}: entry {number} is {token}, after {before}: tokens must ascend; {_REMEDY}")
    return () if len(tokens) == size else tuple(tokens)


def _whole(source: Source, name: str, size: int) -> np.ndarray:
    """A tensor of whole numbers or truth values, [size]."""
    with safe_open(source.file, framework="numpy") as handle:
        kind = handle.get_slice(name).get_dtype()
        if kind not in ("I64", "I32", "I8", "U8", "BOOL"):
            raise ValueError(f"{source.file}: tensor {name} has type {kind}, which holds no whole numbers")
        value = handle.get_tensor(name)
    if value.shape != (size,):
        raise ValueError(f"{source.file}: tensor {name} has shape {list(value.shape)}, the config says [{size}]")
    return value
