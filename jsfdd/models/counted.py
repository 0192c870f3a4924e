"""Visit only the tokens that count, a block at a time.

The vocabulary projection dominates scoring and draft training, and template, prompt and padding tokens need none of it.
Packing the counted rows first and looping over as many blocks as they fill keeps every shape static, so that one
compiled program serves any mask, and never makes an array of all tokens by the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Carry = TypeVar("Carry")


def fold_counted(
    counted: Bool[Array, " R"], block: int, visit: Callable[[Int[Array, " block"], Carry], Carry], carry: Carry
) -> Carry:
    """`carry = visit(rows, carry)` for each block of row numbers where `counted` is True.

    The last block is filled up with R, one past the end: read such rows with `mode="fill"` and write them with
    `mode="drop"`. The number of rounds depends on the data, so gradients do not flow through: a caller that needs them
    computes them on the way.
    """
    size = counted.shape[0]
    padded = -(-size // block) * block
    rows = jnp.nonzero(counted, size=padded, fill_value=size)[0]
    rounds = (jnp.sum(counted) + block - 1) // block

    def body(i, carry):
        return visit(jax.lax.dynamic_slice(rows, (i * block,), (block,)), carry)

    return jax.lax.fori_loop(0, rounds, body, carry)
