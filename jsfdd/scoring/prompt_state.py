"""A prompt as 64 numbers, by which like prompts are found (`selection/clusters.py`): where the target's states lie on average.

The mean of the target's hidden states over the prompt's tokens is what grouped the prompts in experiments 014 and 022. It has
hundreds or thousands of numbers, of which a projection on 64 random directions keeps nearly all that cosines say (correlation
0.99 with SmolLM2's 576; experiments/022_clusters). The directions are signs from a hash, the same in every version and on every
device.
"""

from __future__ import annotations

import functools
import hashlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

SIZE = 64


def prompt_states(final: Float[Array, "B T D"], counted: Bool[Array, "B T"]) -> Float[Array, "B P"]:
    """The state of each row's prompt: the tokens before the first that counts. Zeros where there is none. float32.

    Args:
      final: the target's hidden states after the final norm.
      counted: where the score counts.
    """
    first = jnp.argmax(counted, axis=1)  # 0 where nothing counts
    in_prompt = (jnp.arange(counted.shape[1])[None, :] < first[:, None]).astype(jnp.float32)
    total = jnp.einsum("bt,btd->bd", in_prompt, final.astype(jnp.float32), precision="highest")
    return jnp.matmul(total / jnp.maximum(first, 1)[:, None], directions(final.shape[-1]), precision="highest")


@functools.cache
def directions(hidden_size: int) -> Float[np.ndarray, "D P"]:
    """SIZE columns of ±1/√D: no number of a projected state is larger than the state's length."""
    bits = np.frombuffer(hashlib.shake_256(b"jsfdd prompt state").digest(hidden_size * SIZE // 8), np.uint8)
    return np.float32(hidden_size**-0.5) * (2 * np.unpackbits(bits).reshape(hidden_size, SIZE).astype(np.float32) - 1)
