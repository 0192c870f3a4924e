"""The functions of the front door: they take a target and a draft whole, and what they need beside has a default.

Heavy rooms are imported by the functions that use them, so that looking at logits does not import the trainer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from jsfdd.base.mesh import make_mesh
from jsfdd.base.records import Sample
from jsfdd.models import draft as drafts
from jsfdd.models import target as targets
from jsfdd.models.draft import Draft
from jsfdd.models.foreign import ForeignTarget

if TYPE_CHECKING:
    from jsfdd.data.chat import Chat
    from jsfdd.scoring.table import ScoreTable
    from jsfdd.weights.target import Target

MAX_LENGTH = 2048  # tokens of a chat, as on the command line


def init_draft(target: Target | ForeignTarget, key: Key[Array, ""], *, vocabulary: tuple[int, ...] = ()) -> Draft:
    """A fresh EAGLE draft for a target: one decoder layer of the target's widths (arXiv 2401.15077), float32.

    Args:
      key: of the random weights.
      vocabulary: the tokens that the draft can propose, ascending; empty for all.

    Example:
      >>> draft = jsfdd.init_draft(target, jax.random.key(0))
      >>> draft.params["fc"]["kernel"].shape == (2 * target.config.hidden_size, target.config.hidden_size)
      True
    """
    config = drafts.draft_config(target.config, vocabulary=vocabulary)
    return Draft(config, drafts.init_draft(config, key))


def hidden_states(target: Target | ForeignTarget, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The target's hidden states after the final norm: what its head reads, and what a draft is fed.

    Args:
      tokens: whole sequences from position 0, right-padded if lengths differ.

    Example:
      >>> jsfdd.hidden_states(target, tokens).shape == (*tokens.shape, target.config.hidden_size)
      True
    """
    if isinstance(target, ForeignTarget):
        return target.hidden_states(np.asarray(tokens))
    return _hidden_states(target.config, target.params, jnp.asarray(tokens))


def head_logits(target: Target | ForeignTarget, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape V"]:
    """The target's float32 logits: `logits[:, t]` is the distribution of token t+1 given the tokens up to t.

    All of them at once: [B, T, V] is large. `jsfdd.score` never makes it.

    Example:
      >>> logits = jsfdd.head_logits(target, jsfdd.hidden_states(target, tokens))
      >>> jsfdd.token_flatness(logits).shape == tokens.shape
      True
    """
    return _head_logits(target.config, target.params, hidden)


def draft_logits(
    target: Target | ForeignTarget, draft: Draft, hidden: Float[Array, "B T D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T-1 V"]:
    """The draft's float32 logits along a text, read with the target's own hidden states, as in training.

    At t the draft reads the pair (h_t, embedding of x_{t+1}) and predicts x_{t+2}. So `draft_logits(…)[:, t]` stands beside
    `head_logits(target, hidden)[:, t + 1]`: both are distributions of x_{t+2}.

    Args:
      hidden: the target's hidden states of `tokens`.

    Returns:
      −inf for tokens outside the draft's vocabulary, if it has one.

    Example:
      >>> hidden = jsfdd.hidden_states(target, tokens)
      >>> p, q = jsfdd.head_logits(target, hidden)[:, 1:], jsfdd.draft_logits(target, draft, hidden, tokens)
      >>> p.shape == q.shape
      True
    """
    return _draft_logits(target.config, draft.config, target.params, draft.params, hidden, jnp.asarray(tokens))


def score(
    target: Target | ForeignTarget,
    chats: Sequence[Chat] | Sequence[Sample],
    *,
    hidden: Mapping[str, np.ndarray] | None = None,
    per_token: bool = False,
    max_length: int = MAX_LENGTH,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> ScoreTable:
    """How uncertain the target is along each chat (arXiv 2601.18902, Eq. 6 and 7): a table of metrics, one row a chat.

    Args:
      chats: from `read_chats`, or samples that are tokenized already.
      hidden: the target's hidden states by the samples' ids, [T, D] each, if they are there; the target does not run then.
      per_token: also keep the flatness and entropy (nats) of every token.
      max_length: chats are cut after so many tokens.
      mesh: devices that share the work; all by default.
      progress: show a bar.

    Raises:
      ValueError: a chat that the template cannot render, or a score that is not finite; names the chat.

    Example:
      >>> table = jsfdd.score(target, chats, progress=False)
      >>> table["flatness"].shape == (len(chats),)
      True
    """
    from jsfdd.scoring.score import score_samples

    samples = _tokenized(target, chats, max_length)
    return score_samples(target, samples, mesh or make_mesh(), hidden=hidden, per_token=per_token, progress=progress)


def _tokenized(target: Target | ForeignTarget, chats: Sequence[Chat] | Sequence[Sample], max_length: int) -> list[Sample]:
    if all(isinstance(chat, Sample) for chat in chats):
        return list(chats)
    if target.tokenizer is None:
        raise ValueError(f"{target.name} has no tokenizer: give tokenized samples, or the target with a tokenizer")
    from jsfdd.data.template import tokenize_chats

    return tokenize_chats(chats, target.tokenizer, max_length)[0]


@functools.partial(jax.jit, static_argnums=0)
def _hidden_states(config, params, tokens):
    return targets.hidden_states(config, params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _head_logits(config, params, hidden):
    return targets.head_logits(config, params, hidden)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draft_logits(target_config, config, target_params, params, hidden, tokens):
    embedding = targets.embed_tokens(target_config, target_params, tokens[:, 1:])
    (predicted,) = drafts.draft_steps(config, params, embedding, hidden[:, :-1], 1)
    logits = targets.head_logits(target_config, target_params, predicted)
    allowed = drafts.allowed_tokens(config)
    return logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
