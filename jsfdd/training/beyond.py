"""What becomes of a token whose target distribution lies partly beyond the draft vocabulary.

weigh   nothing: with mass = Σ p over the vocabulary, the cross entropy of what lies within is mass times that of p / mass
keep    p / mass: every token counts alike, as speculators has it
drop    p / mass, and tokens of which the target's likeliest lies beyond count 0, as EAGLE-3 has it
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Beyond = Literal["weigh", "drop", "keep"]


def within_factor(
    beyond: Beyond, logits: Float[Array, "V block"], within: Float[Array, "Vq block"], mass: Float[Array, " block"]
) -> Float[Array, " block"]:
    """What the probabilities within the draft vocabulary are multiplied by.

    Args:
      logits: the target's, of all tokens; `within`: those of the vocabulary.
      mass: the vocabulary's share of the target's distribution.
    """
    if beyond == "weigh":
        return jnp.ones_like(mass)
    factor = 1 / jnp.maximum(mass, 1e-30)
    return factor if beyond == "keep" else jnp.where(jnp.max(within, axis=0) == jnp.max(logits, axis=0), factor, 0.0)
