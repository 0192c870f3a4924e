"""Accept or reject draft tokens so that what is emitted is distributed as the target's own text.

Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318): draft token d at depth
i is accepted with probability min(1, p_i(d) / q_i(d)); at the first rejection the next token is drawn from the residual
norm(max(p_i − q_i, 0)); when all are accepted one more comes from the target. At temperature 0 both distributions are
one-hot, and this is a comparison of argmaxes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Verdict(NamedTuple):
    """Outcome of one verification.

    Attributes:
      num_accepted: int32[B], accepted draft tokens, 0 … G; the next token is not among them.
      next_token: int32[B], the correction token, or the bonus token when all were accepted.
    """

    num_accepted: Int[Array, " B"]
    next_token: Int[Array, " B"]


def draw(keys: Key[Array, " B"], logits: Float[Array, "B V"], temperature: Float[Array, ""]) -> Int[Array, " B"]:
    """One token a row: the argmax at temperature 0, else a sample of softmax(logits / temperature)."""

    def sample():
        return jax.vmap(jax.random.categorical)(keys, logits / temperature)

    # A branch, not a select: the random bits of a whole vocabulary cost more than the head at temperature 0.
    return jax.lax.cond(temperature > 0, sample, lambda: jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def verify(
    keys: Key[Array, " B"],
    draft_tokens: Int[Array, "B G"],
    draft_logits: Float[Array, "B G V"],
    target_logits: Float[Array, "B G1 V"],
    temperature: Float[Array, ""],
) -> Verdict:
    """Judge a chain of G draft tokens a row.

    Args:
      keys: one per row, used for nothing else.
      draft_tokens: what the draft proposed, each drawn from softmax(draft_logits / temperature).
      draft_logits: the draft's float32 logits, of which `draft_tokens` are draws.
      target_logits: float32 logits at the last committed token and at each draft token, G1 = G + 1.
      temperature: scalar; 0 is greedy.
    """
    return jax.lax.cond(
        temperature > 0,
        lambda: jax.vmap(verify_sampled)(
            keys,
            draft_tokens,
            jax.nn.softmax(draft_logits / temperature, axis=-1),
            jax.nn.softmax(target_logits / temperature, axis=-1),
        ),
        lambda: jax.vmap(verify_greedy)(draft_tokens, target_logits),
    )


def verify_greedy(draft_tokens: Int[Array, " G"], target_logits: Float[Array, "G1 V"]) -> Verdict:
    """Accept the longest prefix that equals the target's argmaxes; the next token is the argmax after it."""
    best = jnp.argmax(target_logits, axis=-1).astype(jnp.int32)
    num_accepted = _leading_true(draft_tokens == best[:-1])
    return Verdict(num_accepted, best[num_accepted])


def verify_sampled(
    key: Key[Array, ""], draft_tokens: Int[Array, " G"], q: Float[Array, "G V"], p: Float[Array, "G1 V"]
) -> Verdict:
    """Speculative sampling of one row, from probabilities.

    Example: with p = q every draft token is accepted, and `next_token` is a sample of p[G].
    """
    accept_key, residual_key = jax.random.split(key)
    depth = jnp.arange(draft_tokens.shape[0])
    uniform = jax.random.uniform(accept_key, draft_tokens.shape)
    # u < p/q without the division: q > 0 wherever the draft could draw.
    accepted = uniform * q[depth, draft_tokens] < p[depth, draft_tokens]
    num_accepted = _leading_true(accepted)
    # q has no row G: nothing was proposed there, so the residual of a full acceptance is p itself.
    q = jnp.concatenate([q, jnp.zeros_like(p[:1])])
    residual = jnp.maximum(p[num_accepted] - q[num_accepted], 0.0)
    # Rounding can leave a rejection without residual only where p and q agree to the last bit; then p is its limit.
    residual = jnp.where(jnp.sum(residual) > 0, residual, p[num_accepted])
    next_token = jax.random.categorical(residual_key, jnp.log(residual)).astype(jnp.int32)
    return Verdict(num_accepted, next_token)


def _leading_true(flags):
    """How many flags come before the first False."""
    return jnp.sum(jnp.cumprod(flags.astype(jnp.int32)))
