"""Compute soft targets once for all epochs, and store them.

store = store_soft_targets("means", data, borrowed, draft, recipe, mesh, batch_tokens=4096, directory=folder, identity={})
data = data._replace(soft_targets=store)
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from jsfdd.base.tuning import vocabulary_block
from jsfdd.hidden.rows import row_bytes
from jsfdd.hidden.store import HiddenStore
from jsfdd.hidden.writer import HiddenWriter, large_shard_bytes, write_missing
from jsfdd.models.draft import DraftConfig, vocabulary_digest
from jsfdd.training.batch import TrainingData, on_devices, read_rows, weights_digest
from jsfdd.training.loss import Borrowed
from jsfdd.training.recipe import Recipe
from jsfdd.training.soft_means import MeansDtype, make_means_step
from jsfdd.training.soft_rows import row_words
from jsfdd.training.soft_top_k import make_top_k_step
from jsfdd.training.token_loss import Distance

SoftKind = Literal["means", "top_k"]


def store_soft_targets(
    kind: SoftKind,
    data: TrainingData,
    borrowed: Borrowed,
    draft: DraftConfig,
    recipe: Recipe,
    mesh: Mesh,
    *,
    batch_tokens: int = 4096,
    directory: Path,
    identity: dict,
    means_dtype: MeansDtype = "bfloat16",
    progress: bool = True,
) -> HiddenStore:
    """Open the store in `directory`, after computing the samples that it lacks; it has one row per token.

    Args:
      kind: from `recipe.stored_soft_targets`.
      data: only hidden states and weights are read.
      borrowed: from `loss.borrow`, on `mesh`.
      draft: its vocabulary limits the rows.
      recipe: gives the distance, which means depend on, and k. Top-k targets suit any distance.
      batch_tokens: tokens of a batch, padding included.
      identity: the identity of the hidden states; the other facts that the rows depend on are added to it.

    Raises: as `HiddenWriter` and `read_rows` do.
    """
    platform, settings = mesh.devices.flat[0].platform, {"kind": kind, "vocabulary": vocabulary_digest(draft)}
    if draft.vocabulary and recipe.beyond_vocab != "weigh":
        settings |= {"beyond": recipe.beyond_vocab}
    if kind == "top_k":
        k = recipe.likeliest(len(draft.vocabulary) or draft.decoder.vocab_size)
        step = make_top_k_step(k, mesh, vocabulary_block(platform), draft.vocabulary, recipe.beyond_vocab)
        width, dtype = row_words(k, draft.decoder.vocab_size, len(draft.vocabulary)), "uint16"
        settings |= {"k": k}
    else:
        distance = Distance.from_recipe(recipe)
        block = vocabulary_block(platform)
        step = make_means_step(distance, mesh, block, means_dtype, draft.vocabulary, recipe.beyond_vocab)
        width, dtype = draft.decoder.hidden_size + 1, means_dtype
        settings |= {"top_k": distance.top_k if distance.top_k_weight else 0, "top_k_weight": distance.top_k_weight}
    if data.weights is not None:
        settings |= {"weights": weights_digest(data)}
    identity = {**identity, "soft_targets": settings}

    shard_bytes = large_shard_bytes(sum(len(sample.tokens) for sample in data.samples) * row_bytes(dtype, width))
    with HiddenWriter(directory, width, dtype, identity, shard_bytes) as writer:
        write_missing(
            writer,
            lambda borrowed, rows: step(borrowed, on_devices(data, rows)),
            borrowed,
            data.samples,
            mesh,
            batch_tokens=batch_tokens,
            label="soft targets",
            progress=progress,
            build=lambda samples, shape: read_rows(data, samples, shape),
        )
    return HiddenStore.open(directory, identity)
