"""A prompt as 64 numbers, by which like prompts are found (`selection/clusters.py`): where the target's states lie on average.

The mean of the target's hidden states over the prompt's tokens is what grouped the prompts in experiments 014 and 022. It has
hundreds or thousands of numbers, of which 64 random directions keep most that cosines say (correlation 0.94 with SmolLM2's
576), and the choice within clusters about as well as another seed of theirs does (experiments/022_clusters). The
directions are signs from a hash, the same in every version and on every device.
"""

from __future__ import annotations

import functools
import hashlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SIZE = 64


def prompt_states(final: Float[Array, "B T D"], lengths: Int[Array, " B"]) -> Float[Array, "B P"]:
    """The state of each row's prompt, its first `lengths` tokens; zeros where it has none. float32.

    Args:
      final: the target's hidden states after the final norm.
    """
    in_prompt = (jnp.arange(final.shape[1])[None, :] < lengths[:, None]).astype(jnp.float32)
    total = jnp.einsum("bt,btd->bd", in_prompt, final.astype(jnp.float32), precision="highest")
    return jnp.matmul(total / jnp.maximum(lengths, 1)[:, None], directions(final.shape[-1]), precision="highest")


def prompt_lengths(counted: Bool[Array, "B T"]) -> Int[Array, " B"]:
    """How many tokens stand before the first that counts; 0 where none does."""
    return jnp.argmax(counted, axis=1)


@functools.cache
def directions(hidden_size: int) -> Float[np.ndarray, "D P"]:
    """SIZE columns of ±1/√D: no number of a projected state is larger than the state's length."""
    bits = np.frombuffer(hashlib.shake_256(b"jsfdd prompt state").digest(hidden_size * SIZE // 8), np.uint8)
    return np.float32(hidden_size**-0.5) * (2 * np.unpackbits(bits).reshape(hidden_size, SIZE).astype(np.float32) - 1)
