"""The target's k likeliest tokens of each distribution and the mass of all others, stored once: p, as coarse as it takes.

With them any distance of `distances.py` is taken without the target's head, between coarse outcomes (`token_loss.coarse_loss`):
the k tokens, each by itself, likeliest first, and the tail, all others together. A row (`top_k_row.py`) has 4k + 2 bytes, or
6k + 2 of a vocabulary beyond 65,536, whatever the model's width.

With a draft vocabulary the k tokens and the tail are of its tokens, numbered within it, and one more outcome, the last, is all
that the draft cannot propose. Rows of tokens that do not count are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt16

from jsfdd.base.mesh import map_over_devices
from jsfdd.base.records import DraftBatch
from jsfdd.hidden.store import HiddenStore
from jsfdd.models.counted import fold_counted
from jsfdd.training.batch import TrainingData
from jsfdd.training.distances import coarse
from jsfdd.training.loss import Borrowed
from jsfdd.training.soft_rows import pack, row_words
from jsfdd.training.soft_store import store_target
from jsfdd.training.token_loss import row_logits


def top_outcomes(
    k: int,
    block: int,
    head: Float[Array, "V D"],
    truth: Float[Array, "R D"],
    weight: Float[Array, " R"],
    vocabulary: tuple[int, ...] = (),
) -> UInt16[Array, "R W"]:
    """The row of each token of nonzero weight; `truth` are its hidden states. Arguments as in `token_loss`, `vocabulary` the
    draft's, empty for all tokens; it has at least `k`."""
    tokens = np.array(vocabulary, np.int32)
    size = len(vocabulary) or head.shape[0]

    def visit(rows, found):
        z_p = row_logits(head, truth, rows)
        proposed = z_p[tokens] if vocabulary else z_p
        ids = jax.lax.top_k(proposed.T, k)[1]
        outcomes = coarse(proposed, ids.T)
        if vocabulary:
            outside = jax.nn.logsumexp(z_p.at[tokens].set(-jnp.inf), axis=0, keepdims=True)
            outcomes = jnp.concatenate([outcomes, outside])
        return found.at[rows].set(pack(jax.nn.log_softmax(outcomes, axis=0).T, ids, size), mode="drop")

    found = jnp.zeros((truth.shape[0], row_words(k, head.shape[0], len(vocabulary))), jnp.uint16)
    return fold_counted(weight > 0, block, visit, found)


def make_top_k_step(k: int, mesh: Mesh, block: int, vocabulary: tuple[int, ...] = ()) -> Callable:
    """Compile `(frozen, DraftBatch) -> rows [B, T, W]`. Build it once."""

    def step(frozen: Borrowed, batch: DraftBatch):
        shape = batch.hidden.shape
        truth = batch.hidden.astype(jnp.float32).reshape(-1, shape[2])
        found = top_outcomes(k, block, frozen.output, truth, batch.weight.reshape(-1), vocabulary)
        return found.reshape(*shape[:2], -1)

    return map_over_devices(step, mesh)


def store_top_k(
    data: TrainingData,
    frozen: Borrowed,
    k: int,
    mesh: Mesh,
    *,
    block: int,
    batch_tokens: int,
    directory: Path,
    identity: dict,
    vocabulary: tuple[int, ...] = (),
    progress: bool = True,
) -> HiddenStore:
    """The store in `directory` with the rows of all samples, after computing those it lacks; as `store_target`.

    Any distance can be trained on it: it depends on none.
    """
    return store_target(
        data,
        frozen,
        make_top_k_step(k, mesh, block, vocabulary),
        mesh,
        width=row_words(k, frozen.output.shape[0], len(vocabulary)),
        dtype="uint16",
        batch_tokens=batch_tokens,
        directory=directory,
        identity=identity,
        name="top_k",
        settings={"k": k},
        vocabulary=vocabulary,
        progress=progress,
    )
