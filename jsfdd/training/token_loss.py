"""The loss behind the vocabulary: how far q = softmax(head(g)) is from p = softmax(head(h)), and its gradient by g.

The head dominates training: for SmolLM2 it is 85-90% of a step's arithmetic. So only tokens that count visit it, a block
at a time, nothing of size tokens × V outlives its block, and the gradient is worked out in the forward pass while the
logits are at hand: the backward pass only scales it. Three ways there:

`token_loss` takes any distance of `distances.py` and three products with the head: p's logits, q's, and back.

`mean_loss` knows of p only its mean head vector e = Σ_v p_v · head_v, which is all that the cross entropy needs:

    H(p, q) = −Σ p_v log q_v = logsumexp(z_q) − Σ p_v z_q,v = logsumexp(z_q) − e · g        d/dg = Σ q_v head_v − e

Exact, with two products, and p's own logits are never needed again once e is stored (`target_means.py`). It holds for
any p' ≥ 0 that does not sum to 1 as well, such as p with the top k counted twice: H = mass · logsumexp(z_q) − e · g.

`coarse_loss` knows of p its likeliest tokens and the mass of the others (`target_top_k.py`), and takes any distance between
coarse outcomes with two products as well. The distance between all tokens is at least as large (`distances.py`), and equal
where all tokens are among the likeliest; the gradient moves the other tokens' probabilities together, in proportion.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsfdd.models.counted import fold_counted
from jsfdd.training.distances import DISTANCES, coarse, cross_entropy, first_k_loss, top_k_loss, total_variation
from jsfdd.training.recipe import Recipe


class Distance(NamedTuple):
    """What `token_loss` minimises: a distance of `distances.py`, and `top_k_weight` times the top-k loss."""

    name: str
    top_k: int = 0
    top_k_weight: float = 0.0

    @classmethod
    def of(cls, options: Recipe) -> Distance:
        """The distance that the options name."""
        return cls(options.token_loss, options.hass_top_k, options.hass_top_k_weight)


class TokenSums(NamedTuple):
    """Sums over counted tokens, each times its weight, float32 scalars; divided by `counted` they are means.

    The last five are None where only the target's means are known, of its likeliest tokens all but `agreement` or `coverage`,
    the entropies with a draft vocabulary, and `coverage` without one.
    """

    counted: Float[Array, ""]  # the weights' own sum; without weights, the tokens that count
    distance: Float[Array, ""]  # what is minimised
    cross_entropy: Float[Array, ""] | None  # H(p, q), nats
    target_entropy: Float[Array, ""] | None  # H(p), nats: the least that H(p, q) can become; KL(p‖q) is the difference
    agreement: Float[Array, ""] | None  # 1 where the draft's likeliest token is the target's
    acceptance: Float[Array, ""] | None  # Σ_v min(p, q): the chance that a token drawn from q is accepted, α at depth 1
    coverage: Float[Array, ""] | None  # Σ p over the draft's vocabulary: the most that acceptance can become


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def token_loss(
    distance: Distance,
    block: int,
    head: Float[Array, "V D"],
    predicted: Float[Array, "R D"],
    truth: Float[Array, "R D"],
    weight: Float[Array, " R"],
    allowed: Bool[Array, " V"] | None = None,
) -> TokenSums:
    """The distance between the distributions of `truth` (p) and `predicted` (q), and what goes with it.

    Only `TokenSums.distance` has a gradient, and only by `predicted`: the target is frozen. Products are in the head's
    dtype, all else in float32.

    Args:
      distance: what is summed and differentiated.
      block: tokens that meet the head at a time.
      head, predicted, truth: as in the module's text.
      weight: of each token, 0 where it does not count and then costs nothing.
      allowed: the draft's vocabulary, None for all tokens; q gives others nothing.
    """
    return _with_slope(distance, block, head, predicted, truth, weight, allowed, with_gradient=False)[0]


def _with_slope(distance, block, head, predicted, truth, weight, allowed=None, with_gradient=True):
    def of_block(rows, z_q):
        z_p = row_logits(head, truth, rows)

        def limited(z_q):
            return z_q if allowed is None else jnp.where(allowed[:, None], z_q, -jnp.inf)

        def minimised(z_q):
            z_q = limited(z_q)
            loss = DISTANCES[distance.name](z_p, z_q)
            return loss + distance.top_k_weight * top_k_loss(z_p, z_q, distance.top_k) if distance.top_k_weight else loss

        value, pull_back = jax.vjp(minimised, z_q)
        z_q = limited(z_q)
        sums = TokenSums(
            counted=jnp.ones(rows.shape),
            distance=value,
            cross_entropy=cross_entropy(z_p, z_q) if allowed is None else None,
            target_entropy=cross_entropy(z_p, z_p) if allowed is None else None,
            # The draft agrees when its score of the target's likeliest token is its own highest: no argmax, no index.
            agreement=jnp.max(jnp.where(z_p == jnp.max(z_p, 0)[None], z_q, -jnp.inf), axis=0) == jnp.max(z_q, axis=0),
            acceptance=1.0 - total_variation(z_p, z_q),
            coverage=None if allowed is None else jnp.sum(jnp.where(allowed[:, None], jax.nn.softmax(z_p, axis=0), 0.0), 0),
        )
        return sums, lambda: times_head(pull_back(jnp.ones_like(value))[0], head)

    empty = TokenSums(0.0, 0.0, *((0.0, 0.0) if allowed is None else (None, None)), 0.0, 0.0, None if allowed is None else 0.0)
    return _visit_tokens(of_block, empty, block, head, predicted, weight, with_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mean_loss(
    block: int,
    head: Float[Array, "V D"],
    predicted: Float[Array, "R D"],
    mean: Float[Array, "R D"],
    mass: Float[Array, " R"],
    weight: Float[Array, " R"],
) -> TokenSums:
    """Cross entropy between a target of which `mean` = Σ_v p_v · head_v and `mass` = Σ_v p_v are known, and q.

    The other arguments, and what has a gradient, as in `token_loss`. Its rounding is that of `mean`, which training
    stores in bfloat16 unless told otherwise: the gradient is the exact one of a target that is off by as much.
    """
    return _with_mean(block, head, predicted, mean, mass, weight, with_gradient=False)[0]


def _with_mean(block, head, predicted, mean, mass, weight, with_gradient):
    def of_block(rows, z_q):
        g, e = _rows(predicted, rows), _rows(mean, rows).astype(jnp.float32)
        share = mass.at[rows].get(mode="fill", fill_value=0.0)
        top = jnp.max(z_q, axis=0)
        above = jnp.exp(z_q - top[None])
        total = jnp.sum(above, axis=0)
        distance = share * (top + jnp.log(total)) - jnp.sum(e * g, axis=1)
        sums = TokenSums(jnp.ones(rows.shape), distance, None, None, None, None, None)
        return sums, lambda: times_head(above, head) * (share / total)[:, None] - e

    empty = TokenSums(0.0, 0.0, None, None, None, None, None)
    return _visit_tokens(of_block, empty, block, head, predicted, weight, with_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def coarse_loss(
    distance: Distance,
    block: int,
    head: Float[Array, "V D"],
    predicted: Float[Array, "R D"],
    log_probs: Float[Array, "R M"],
    ids: Int[Array, "R K"],
    weight: Float[Array, " R"],
) -> TokenSums:
    """The distance between coarse outcomes of a target of which some tokens' probabilities are known, and q's.

    Args:
      log_probs: log p of the tokens `ids`, likeliest first, and of all others together; where one more is given, it is of what
        no row of `head` stands for (a draft vocabulary). Need not be normalised.
      ids: rows of `head`.

    The other arguments, and what has a gradient, as in `token_loss`.
    """
    return _with_outcomes(distance, block, head, predicted, log_probs, ids, weight, with_gradient=False)[0]


def _with_outcomes(distance, block, head, predicted, log_probs, ids, weight, with_gradient):
    limited = log_probs.shape[1] == ids.shape[1] + 2

    def of_block(rows, z_q):
        known, tokens = _rows(log_probs, rows).T, _rows(ids, rows).T

        def minimised(z_q):
            outcomes = jnp.pad(coarse(z_q, tokens), ((0, limited), (0, 0)), constant_values=-jnp.inf)
            loss = DISTANCES[distance.name](known, outcomes)
            if not distance.top_k_weight:
                return loss
            return loss + distance.top_k_weight * first_k_loss(known, outcomes, distance.top_k)

        value, pull_back = jax.vjp(minimised, z_q)
        agreement = None if limited else z_q[tokens[0], jnp.arange(len(rows))] == jnp.max(z_q, axis=0)
        coverage = 1.0 - jax.nn.softmax(known, axis=0)[-1] if limited else None
        sums = TokenSums(jnp.ones(rows.shape), value, None, None, agreement, None, coverage)
        return sums, lambda: times_head(pull_back(jnp.ones_like(value))[0], head)

    empty = TokenSums(0.0, 0.0, None, None, None if limited else 0.0, None, 0.0 if limited else None)
    return _visit_tokens(of_block, empty, block, head, predicted, weight, with_gradient)


def _visit_tokens(of_block, empty, block, head, predicted, weight, with_gradient):
    """(weighted sums over counted tokens, d distance / d predicted [R, D], or [0, D] unless asked for).

    `of_block(rows, z_q)` gives the sums' terms [block] and a function that works out their gradient [block, D].
    """

    def visit(rows, carry):
        sums, gradient = carry
        w = weight.at[rows].get(mode="fill", fill_value=0.0)
        terms, slope = of_block(rows, row_logits(head, predicted, rows))
        sums = jax.tree.map(lambda total, each: total + jnp.sum(jnp.where(w > 0, w * each, 0.0)), sums, terms)
        if with_gradient:
            gradient = gradient.at[rows].set(w[:, None] * slope(), mode="drop")
        return sums, gradient

    rows = len(predicted) if with_gradient else 0
    zeros = jax.tree.map(lambda _: jnp.zeros(()), empty)
    return fold_counted(weight > 0, block, visit, (zeros, jnp.zeros((rows, predicted.shape[1]))))


def _rows(array, rows):
    """The block's rows; those past the end, which only fill it up, are 0."""
    return array.at[rows].get(mode="fill", fill_value=0)


def row_logits(head: Float[Array, "V D"], hidden: Float[Array, "R D"], rows) -> Float[Array, "V block"]:
    """float32 logits of some rows of `hidden`, with the vocabulary on the leading axis.

    Sums over it then run in step for all the block's tokens, which XLA's CPU backend vectorises, and over a trailing
    axis does not.
    """
    hidden = _rows(hidden, rows).astype(head.dtype)
    return jax.lax.dot_general(head, hidden, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def times_head(slope: Float[Array, "V block"], head: Float[Array, "V D"]) -> Float[Array, "block D"]:
    """Σ_v slope_v · head_v of each token, float32."""
    slope = slope.astype(head.dtype)
    return jax.lax.dot_general(slope, head, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _token_loss_forward(distance, block, *arguments):
    return _with_slope(distance, block, *arguments)


def _token_loss_backward(distance, block, gradient, cotangent: TokenSums):
    return None, gradient * cotangent.distance, None, None, None


def _mean_loss_forward(block, *arguments):
    return _with_mean(block, *arguments, with_gradient=True)


def _mean_loss_backward(block, gradient, cotangent: TokenSums):
    return None, gradient * cotangent.distance, None, None, None


def _coarse_loss_forward(distance, block, *arguments):
    return _with_outcomes(distance, block, *arguments, with_gradient=True)


def _coarse_loss_backward(distance, block, gradient, cotangent: TokenSums):
    return None, gradient * cotangent.distance, None, None, None


token_loss.defvjp(_token_loss_forward, _token_loss_backward)
mean_loss.defvjp(_mean_loss_forward, _mean_loss_backward)
coarse_loss.defvjp(_coarse_loss_forward, _coarse_loss_backward)
