"""What a backend likes: sizes that change speed and memory and, but for rounding, no result.

`platform` is JAX's own name, "cpu", "gpu" or "tpu": `jax.default_backend()`, or of a mesh `mesh.devices.flat[0].platform`.
"""

from __future__ import annotations


def scoring_block(platform: str) -> int:
    """Tokens that meet the target's head at a time while scoring.

    On a CPU the logits of a block should stay in its caches. An accelerator reads the whole head for each block, which
    pays from about a thousand tokens on.
    """
    return 64 if platform == "cpu" else 1024


def vocabulary_block(platform: str) -> int:
    """Tokens that meet the vocabulary at a time while a draft trains, with two float32 arrays [V, block] at hand.

    Larger than `scoring_block` on a CPU, because the gradient is a second product with the head, and that reads all of it
    once more.
    """
    return 128 if platform == "cpu" else 1024
