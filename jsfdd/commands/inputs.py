"""What several commands read: a target, its mesh and the tokenized chats, the same in every process; a draft."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jsfdd.commands.options import DataOptions, DecodingOptions, TargetOptions

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jsfdd.base.records import Sample
    from jsfdd.data.batches import Shape
    from jsfdd.data.counts import FileCounts
    from jsfdd.data.template import TokenizeSummary
    from jsfdd.decoding.settings import TreeShape
    from jsfdd.weights.target import Target

_FILES_SHOWN = 40


class Inputs(NamedTuple):
    """What is known before any weights are read; the target has none yet."""

    target: Target
    mesh: Mesh
    samples: list[Sample]
    summary: TokenizeSummary
    files: list[FileCounts]  # what became of each input file's rows
    shapes: tuple[Shape, ...]


class Loaded(NamedTuple):
    """A target and tokenized chats, shared by the stages of one process."""

    target: Target
    mesh: Mesh
    samples: list[Sample]
    summary: TokenizeSummary
    files: list[FileCounts]  # what became of each input file's rows
    shapes: tuple[Shape, ...]
    identity: dict  # what every result from them depends on; JSON-ready


def read_inputs(config: TargetOptions | DataOptions) -> Inputs:
    """The tokenized chats that a config names, and the target without its weights: a bad line should not cost a minute."""
    from jsfdd.base.mesh import make_mesh
    from jsfdd.base.processes import is_primary
    from jsfdd.data.batches import choose_shapes
    from jsfdd.data.chat import read_chat_files
    from jsfdd.data.counts import count_by_file
    from jsfdd.data.template import tokenize_chats
    from jsfdd.weights.target import describe_target

    found = read_chat_files(config.data)
    mesh = make_mesh(model=config.model_shards)
    target = describe_target(config.target)
    samples, summary = tokenize_chats(found.chats, target.tokenizer, config.max_length, config.mask_spans)
    files = count_by_file(found, summary)
    if is_primary():
        show_counts(files)
    shapes = choose_shapes([len(sample.tokens) for sample in samples], config.batch_tokens)
    return Inputs(target, mesh, samples, summary, files, shapes)


def load(config: TargetOptions | DataOptions, inputs: Inputs | None = None) -> Loaded:
    """The inputs (those that the config names unless given) with the target's weights."""
    import jax.numpy as jnp

    from jsfdd.base.processes import agree
    from jsfdd.base.records import samples_digest
    from jsfdd.weights.target import load_target

    inputs = inputs or read_inputs(config)
    target = load_target(config.target, jnp.dtype(config.dtype), inputs.mesh)
    identity = identity_of(target, config.data, config.max_length, config.dtype)
    agree({"the options": config.to_json(), "the tokenized chats": samples_digest(inputs.samples), **identity})
    return Loaded(*inputs._replace(target=target), identity)


def identity_of(target: Target, data: Sequence[Path], max_length: int, dtype: str) -> dict:
    """What every result from a target and chats depends on; JSON-ready."""
    from jsfdd.data.rows import input_digests
    from jsfdd.weights.tokenizer import tokenizer_digest

    return {
        "target": target.fingerprint,
        "tokenizer": tokenizer_digest(target.tokenizer),
        "template": hashlib.sha256(target.tokenizer.chat_template.encode()).hexdigest(),
        "data": list(input_digests(data).values()),
        "max_length": max_length,
        "dtype": dtype,
    }


def show_counts(files: Sequence[FileCounts]) -> None:
    """One line a file on stderr, and their sums; of very many files only the first."""
    from jsfdd.base.progress import console
    from jsfdd.data.counts import total

    for counts in files[:_FILES_SHOWN]:
        console.print(str(counts), soft_wrap=True)
    if len(files) > _FILES_SHOWN:
        console.print(f"… and {len(files) - _FILES_SHOWN} more files", soft_wrap=True)
    if len(files) > 1:
        console.print(str(total(files)), soft_wrap=True)


def tree_shape(config: DecodingOptions) -> TreeShape | None:
    """The tree that a config asks for, None for chains. ValueError if its depth cannot hold it."""
    from jsfdd.decoding.settings import TreeShape

    return TreeShape(config.num_draft_tokens, config.tree_top_k, config.tree_nodes) if config.tree_nodes else None
