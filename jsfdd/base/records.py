"""The records that rooms exchange, with their shapes, and the index rule that all rooms obey.

**Index rule.** `logits[:, t]` is the target's distribution of token t+1 given tokens ≤ t. Its score is stored at t and
*counts* when tokens t and t+1 are both assistant tokens, so an answer's first token, which always comes from the target
itself, is neither scored nor trained on.

**EAGLE pairing.** At position t the draft reads (hidden h_t, embedding of x_{t+1}) and predicts h_{t+1}, hence the token
x_{t+2}. The loss at t counts when the score at t+1 counts.

Letters: B batch rows, T tokens, V vocabulary, D model width, L layers, K key/value heads, S cache slots, H head dim,
G draft tokens per step (the papers' γ).

Host records are frozen dataclasses of numpy arrays; device records are NamedTuples, pytrees without registration.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # brings JAX with it: more than a second for each process that only tokenizes
    from jaxtyping import Array, Bool, Float, Int, UInt16


@dataclasses.dataclass(frozen=True)
class Sample:
    """One tokenized conversation.

    Attributes:
      id: unique in a run.
      source: where it came from ("gsm8k", …). Reports, mixtures and selection within sources read it; no score does.
      tokens: int32[T] token ids, template included.
      assistant_mask: bool[T], True on an answer's content and on the end-of-turn token that closes it.
    """

    id: str
    source: str
    tokens: np.ndarray
    assistant_mask: np.ndarray

    @property
    def counted(self) -> np.ndarray:
        """bool[T]: where the score at t counts (the index rule above)."""
        counted = np.zeros(len(self.tokens), bool)
        counted[:-1] = self.assistant_mask[:-1] & self.assistant_mask[1:]
        return counted


def samples_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of ids, tokens and masks, in order: all that scores and training read of the samples."""
    sha = hashlib.sha256()
    for sample in samples:
        sha.update(f"{sample.id}\0{len(sample.tokens)}\0".encode())
        sha.update(np.ascontiguousarray(sample.tokens, np.int32).tobytes())
        sha.update(np.ascontiguousarray(sample.assistant_mask, bool).tobytes())
    return sha.hexdigest()


def tokens_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of ids and tokens, in order: all that hidden states read of the samples."""
    sha = hashlib.sha256()
    for sample in samples:
        sha.update(f"{sample.id}\0{len(sample.tokens)}\0".encode())
        sha.update(np.ascontiguousarray(sample.tokens, np.int32).tobytes())
    return sha.hexdigest()


def has_repeats(ids: Sequence[str]) -> bool:
    """Whether an id occurs twice. Takes 16 bytes an id, where a set takes five times that."""
    hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
    hashes.sort()
    # Different ids may have equal hashes, though hardly ever.
    return bool((hashes[1:] == hashes[:-1]).any()) and len(set(ids)) < len(ids)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One evaluation prompt: the user's turns in order. A turn is asked after the answers to the turns before it.

    `system` is the text of a system message, or empty; `tools` are tool definitions for the chat template.
    """

    id: str
    source: str
    turns: tuple[str, ...]
    system: str = ""
    tools: tuple[dict, ...] = ()


class Batch(NamedTuple):
    """Right-padded samples of one length bucket, as the jitted stages take them.

    Padding rows have `counted` all False and length 0.
    """

    tokens: Int[Array, "B T"] | np.ndarray
    counted: Bool[Array, "B T"] | np.ndarray
    lengths: Int[Array, " B"] | np.ndarray


class TokenScores(NamedTuple):
    """Per-token scores, which `scoring/flatness.py` defines: float32, 0 where a token does not count."""

    flatness: Float[Array, "*shape"]
    entropy: Float[Array, "*shape"]
    top1: Float[Array, "*shape"]
    margin: Float[Array, "*shape"]
    energy: Float[Array, "*shape"]
    nll: Float[Array, "*shape"]  # −log p(x_{t+1}); exp of the mean is a sample's perplexity


class KVCache(NamedTuple):
    """Keys and values of every layer. The first `length` slots of a row are valid, so lowering `length` rolls a row back.

    The keys (transposed) and the values of a head are contiguous matrices, the layout that attention's two products read,
    so a decoding step rearranges only its few queries.
    """

    k: Float[Array, "L B K H S"]
    v: Float[Array, "L B K S H"]
    length: Int[Array, " B"]


class DraftBatch(NamedTuple):
    """A batch with the target's hidden states, for draft training."""

    tokens: Int[Array, "B T"] | np.ndarray
    counted: Bool[Array, "B T"] | np.ndarray  # where the *score* counts; the loss shifts it (EAGLE pairing)
    weight: Float[Array, "B T"] | np.ndarray  # of each score position in the loss; 0 wherever `counted` is False
    hidden: Float[Array, "B T D"] | np.ndarray  # target hidden states after its final norm
    # Stored soft targets, in the format of `training/soft_store.py`. If None, each step runs the target's head.
    soft_targets: Float[Array, "B T D1"] | UInt16[Array, "B T W"] | np.ndarray | None = None


class TrainState(NamedTuple):
    """Everything that a training step updates."""

    params: Any
    opt_state: Any
    step: Int[Array, ""]
    key: Array


class DecodeStats(NamedTuple):
    """Counts of decoding steps, per row. τ, α and the histogram of accepted tokens all derive from them.

    Attributes:
      accept_counts: int32[B, G+1], steps in which exactly i draft tokens were accepted.
      reached: int32[B, G], steps in which draft depth i+1 was verified (all shallower drafts were accepted).
      accepted: int32[B, G], steps in which the draft token at depth i+1 was accepted.
    """

    accept_counts: Int[Array, "B G1"]
    reached: Int[Array, "B G"]
    accepted: Int[Array, "B G"]


class DraftShares(NamedTuple):
    """Draft tokens by the draft that proposed them, per row, for E drafts that decode together.

    Attributes:
      offered: int32[B, E], draft tokens that the target verified. A token that several drafts proposed counts for one.
      accepted: int32[B, E], offered tokens that were accepted.
    """

    offered: Int[Array, "B E"]
    accepted: Int[Array, "B E"]


class Generation(NamedTuple):
    """Generated tokens of a batch, `tokens[b, :lengths[b]]` with the stop token included, which of them a draft had
    proposed, and the counts of its steps."""

    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]
    drafted: Bool[Array, "B N"]
    stats: DecodeStats
    shares: DraftShares
