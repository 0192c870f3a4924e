"""Block sizes per backend. They affect speed and memory, and results only by rounding.

`platform` is JAX's name, "cpu", "gpu" or "tpu": `jax.default_backend()`, or `mesh.devices.flat[0].platform` of a mesh.
"""

from __future__ import annotations


def scoring_block(platform: str) -> int:
    """How many tokens the target's head processes at a time while scoring.

    On a CPU the logits of a block should fit in its caches. An accelerator reads the whole head for each block, which is
    worth it from about a thousand tokens.
    """
    return 64 if platform == "cpu" else 1024


def fast_memory(platform: str) -> int:
    """Bytes of temporaries that the compiler places outside a device's main memory: a TPU's vector memory, from v5e on."""
    return 1 << 27 if platform == "tpu" else 0


def vocabulary_block(platform: str) -> int:
    """How many tokens the head processes at a time while a draft trains; a block needs two float32 arrays [V, block].

    On a CPU it is larger than `scoring_block`, because the gradient is a second product that reads the whole head again.
    """
    return 128 if platform == "cpu" else 1024
