"""The loss behind the vocabulary, in plain equations: how far q = softmax(head·g) is from p = softmax(head·h).

What is known of p decides what a step costs, in products of a token with the head:

    token_loss    all of p                                    3: p's logits, q's, and the gradient's way back
    mean_loss     its mean head vector e = Σ_v p_v · head_v   2: e is stored once for all epochs (`soft_means.py`)
    coarse_loss   its k likeliest tokens and their tail       2: they are stored once for all epochs (`soft_top_k.py`)

`mean_loss` is the cross entropy and exact, because there p enters through e alone:

    H(p, q) = −Σ p_v log q_v = logsumexp(z_q) − Σ p_v z_q,v = logsumexp(z_q) − e·g

and with any p' ≥ 0 that sums to a mass other than 1, such as p with its top k counted twice, H = mass · logsumexp(z_q) − e·g.
`coarse_loss` takes any distance, between fewer outcomes: at most the distance between all tokens, and equal to it where all
tokens are among the likeliest.

Training runs the same equations by `visited_loss.py`, block by block and only for tokens that count; a test holds the two
equal. The functions here make arrays [R, V]: they are for reading and for tests.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jsfdd.training.distances import DISTANCES, Logits, PerToken, coarse, first_k_loss, top_k_loss
from jsfdd.training.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Distance:
    """The quantity to minimise: a distance of `distances.py` plus `top_k_weight` times HASS's top-k loss."""

    name: str = "cross_entropy"
    top_k: int = 0
    top_k_weight: float = 0.0

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Distance:
        """The distance that a recipe names."""
        return cls(recipe.token_loss, recipe.hass_top_k, recipe.hass_top_k_weight)

    def between(self, target: Logits, draft: Logits, axis: int = -1) -> PerToken:
        """The distance between the distributions of two arrays of logits."""
        loss = DISTANCES[self.name](target, draft, axis)
        if self.top_k_weight:
            loss = loss + self.top_k_weight * top_k_loss(target, draft, self.top_k, axis)
        return loss

    def between_outcomes(self, target: Logits, draft: Logits, axis: int = -1) -> PerToken:
        """The same for coarse outcomes, sorted with the likeliest first."""
        loss = DISTANCES[self.name](target, draft, axis)
        if self.top_k_weight:
            loss = loss + self.top_k_weight * first_k_loss(target, draft, self.top_k, axis)
        return loss


def token_loss(
    distance: Distance,
    head: Float[Array, "V D"],
    predicted: Float[Array, "R D"],
    truth: Float[Array, "R D"],
    allowed: Bool[Array, " V"] | None = None,
) -> Float[Array, " R"]:
    """The distance between the distributions behind `truth` (p) and `predicted` (q).

    Args:
      allowed: the draft's vocabulary, None for all tokens; q gives others nothing.
    """
    z_p, z_q = truth @ head.T, predicted @ head.T
    if allowed is not None:
        z_q = jnp.where(allowed[None], z_q, -jnp.inf)
    return distance.between(z_p, z_q)


def mean_loss(
    head: Float[Array, "V D"], predicted: Float[Array, "R D"], mean: Float[Array, "R D"], mass: Float[Array, " R"]
) -> Float[Array, " R"]:
    """The cross entropy between q and a target of which `mean` = Σ_v p_v · head_v and `mass` = Σ_v p_v are known."""
    return mass * jax.nn.logsumexp(predicted @ head.T, axis=-1) - jnp.sum(mean * predicted, axis=-1)


def coarse_loss(
    distance: Distance,
    head: Float[Array, "V D"],
    predicted: Float[Array, "R D"],
    log_probs: Float[Array, "R M"],
    ids: Int[Array, "R K"],
) -> Float[Array, " R"]:
    """The distance between q and a target of which only some tokens' probabilities are known, as between coarse outcomes.

    Args:
      log_probs: log p of the tokens `ids`, likeliest first, and of all others together: M = K + 1. M = K + 2 where a draft
        vocabulary limits q: the last is what no row of `head` stands for. Need not be normalised.
      ids: rows of `head`.
    """
    outcomes = coarse(predicted @ head.T, ids)
    if log_probs.shape[1] > outcomes.shape[1]:
        outcomes = jnp.pad(outcomes, ((0, 0), (0, 1)), constant_values=-jnp.inf)  # q is never where it cannot be
    return distance.between_outcomes(log_probs, outcomes)
