"""Accept or reject draft tokens so that the emitted text has the target's distribution.

Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318): draft token d at depth
i is accepted with probability min(1, p_i(d) / q_i(d)). At the first rejection the next token is drawn from the residual
norm(max(p_i − q_i, 0)); if all are accepted, one more is drawn from the target. At temperature 0 both distributions are
one-hot, and this becomes a comparison of argmaxes.

p and q are the distributions after temperature, top-k and top-p; the text follows the target's distribution after them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jsfdd.decoding.settings import EVERY_TOKEN, Cutoff


class Verdict(NamedTuple):
    """Outcome of one verification.

    Attributes:
      num_accepted: int32[B], accepted draft tokens, 0 … G; the next token is not among them.
      next_token: int32[B], the correction token, or the bonus token if all were accepted.
    """

    num_accepted: Int[Array, " B"]
    next_token: Int[Array, " B"]


def warp(logits: Float[Array, "*shape V"], temperature: Float[Array, ""], cutoff: Cutoff) -> Float[Array, "*shape V"]:
    """Logits of the distribution to sample from: divided by the temperature (> 0), −inf for tokens that the cut-off excludes.

    The order is that of transformers: temperature, top-k, then top-p of the remaining tokens. Unlike transformers, tokens that
    tie at the edge are all kept.
    """
    logits = logits / temperature
    if cutoff.top_k:
        edge = jax.lax.top_k(logits, cutoff.top_k)[0][..., -1:]
        logits = jnp.where(logits >= edge, logits, -jnp.inf)
    if cutoff.top_p < 1:
        probs = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(probs >= fast_nucleus_edge(probs, cutoff.top_p), logits, -jnp.inf)
    return logits


def nucleus_edge(probs: Float[Array, "*shape V"], top_p: float) -> Float[Array, "*shape 1"]:
    """The least probability that top-p keeps: tokens at or above it sum to at least `top_p`, tokens above it to less.

    Source: arXiv 1904.09751, section 3.1.
    """
    descending = jnp.sort(probs, axis=-1, descending=True)
    above = jnp.cumsum(descending, axis=-1) - descending
    return jnp.min(jnp.where(above < top_p, descending, jnp.inf), axis=-1, keepdims=True)


def fast_nucleus_edge(probs: Float[Array, "*shape V"], top_p: float) -> Float[Array, "*shape 1"]:
    """`nucleus_edge` by bisection, in 31 sums over the vocabulary. Sorting 49,152 tokens takes fifty times as long on a CPU.

    Positive float32 numbers sort like their bit patterns read as integers, so bisecting the patterns finds the exact edge.
    """

    def halve(_, bounds):
        low, high = bounds  # invariant: tokens at or above `low` sum to top_p, those at or above `high` do not
        middle = low + (high - low) // 2
        edge = jax.lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.sum(jnp.where(probs >= edge, probs, 0.0), axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros((*probs.shape[:-1], 1), jnp.int32)
    above_one = jax.lax.bitcast_convert_type(jnp.float32(1.5), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, above_one)))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def draw(
    keys: Key[Array, " B"], logits: Float[Array, "B V"], temperature: Float[Array, ""], cutoff: Cutoff = EVERY_TOKEN
) -> Int[Array, " B"]:
    """Draw one token per row: the argmax at temperature 0 (the lowest id in a tie), else a sample after `warp`."""

    def sample():
        return jax.vmap(jax.random.categorical)(keys, warp(logits, temperature, cutoff))

    # cond, not where: at temperature 0 the random bits for a whole vocabulary would cost more than the head.
    return jax.lax.cond(temperature > 0, sample, lambda: jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def fold_in_rows(keys: Key[Array, " B"], number: Int[Array, "*B"]) -> Key[Array, " B"]:
    """Fold a number into each row's key: one number for all rows, or one per row."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(number, keys.shape))


def verify(
    keys: Key[Array, " B"],
    draft_tokens: Int[Array, "B G"],
    draft_logits: Float[Array, "B G V"],
    target_logits: Float[Array, "B G1 V"],
    temperature: Float[Array, ""] | float = 0.0,
    cutoff: Cutoff = EVERY_TOKEN,
) -> Verdict:
    """Verify a chain of G draft tokens per row by speculative sampling (arXiv 2211.17192, algorithm 1).

    Args:
      keys: typed keys, one per row, used for nothing else.
      draft_tokens: int32, the draft's tokens, drawn by `draw` with the same temperature and cut-off.
      draft_logits: the draft's float32 logits, from which `draft_tokens` were drawn.
      target_logits: float32 logits at the last committed token and at each draft token, G1 = G + 1.
      temperature: scalar; 0 is greedy.
      cutoff: top-k and top-p.

    Returns:
      The number of accepted draft tokens, and the target's token after them; int32[B] each. The accepted tokens and the next
      token together have the target's distribution.

    Example:
      >>> p = jnp.log(jnp.array([[[0.1, 0.9], [0.8, 0.2]]]))  # the target's, at two positions of one row
      >>> q = jnp.log(jnp.array([[[0.5, 0.5]]]))              # the draft's, at the first position
      >>> verify(jax.random.split(jax.random.key(0), 1), jnp.array([[1]]), q, p)
      Verdict(num_accepted=Array([1], dtype=int32), next_token=Array([0], dtype=int32))
    """
    if isinstance(temperature, int | float) and temperature < 0:
        raise ValueError(f"temperature is {temperature}, but it must be 0 (greedy) or more")
    return jax.lax.cond(
        temperature > 0,
        lambda: jax.vmap(verify_sampled)(
            keys,
            draft_tokens,
            jax.nn.softmax(warp(draft_logits, temperature, cutoff), axis=-1),
            jax.nn.softmax(warp(target_logits, temperature, cutoff), axis=-1),
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
    # This is u < p/q without the division; q > 0 for every token that the draft can draw.
    accepted = uniform * q[depth, draft_tokens] < p[depth, draft_tokens]
    num_accepted = _leading_true(accepted)
    # Nothing was proposed after the last draft token: q is 0 there, so the residual after a full acceptance is p.
    q = jnp.concatenate([q, jnp.zeros_like(p[:1])])
    residual = jnp.maximum(p[num_accepted] - q[num_accepted], 0.0)
    # A rejection without a residual is only possible through rounding, if p and q are nearly equal; draw from p then.
    residual = jnp.where(jnp.sum(residual) > 0, residual, p[num_accepted])
    next_token = jax.random.categorical(residual_key, jnp.log(residual)).astype(jnp.int32)
    return Verdict(num_accepted, next_token)


def _leading_true(flags):
    """The number of flags before the first False."""
    return jnp.sum(jnp.cumprod(flags.astype(jnp.int32)))
