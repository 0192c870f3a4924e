"""What the stages of one process share: a target, its mesh and the tokenized chats, the same in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from jsfdd.base.mesh import make_mesh
from jsfdd.base.processes import agree, is_primary
from jsfdd.base.progress import console
from jsfdd.base.records import Sample, samples_digest
from jsfdd.commands.options import DataOptions, TargetOptions
from jsfdd.data.batches import Shape, choose_shapes
from jsfdd.data.chat import read_chat_files
from jsfdd.data.counts import FileCounts, count_by_file, total
from jsfdd.data.rows import input_digests
from jsfdd.data.template import TokenizeSummary, tokenize_chats
from jsfdd.weights.target import Target, load_target
from jsfdd.weights.tokenizer import tokenizer_digest

_FILES_SHOWN = 40


class Loaded(NamedTuple):
    """A target and tokenized chats, shared by the stages of one process."""

    target: Target
    mesh: Mesh
    samples: list[Sample]
    summary: TokenizeSummary
    files: list[FileCounts]  # what became of each input file's rows
    shapes: tuple[Shape, ...]
    identity: dict  # what every result from them depends on; JSON-ready


def load(config: TargetOptions | DataOptions) -> Loaded:
    """The target and the tokenized chats that a config names."""
    found = read_chat_files(config.data)  # before the weights: a bad line should not cost a minute
    mesh = make_mesh(model=config.model_shards)
    target = load_target(config.target, jnp.dtype(config.dtype), mesh)
    samples, summary = tokenize_chats(found.chats, target.tokenizer, config.max_length, config.mask_spans)
    files = count_by_file(found, summary)
    if is_primary():
        show_counts(files)
    shapes = choose_shapes([len(s.tokens) for s in samples], config.batch_tokens)
    identity = identity_of(target, config.data, config.max_length, config.dtype)
    agree({"the options": config.to_json(), "the tokenized chats": samples_digest(samples), **identity})
    return Loaded(target, mesh, samples, summary, files, shapes, identity)


def identity_of(target: Target, data: Sequence[Path], max_length: int, dtype: str) -> dict:
    """What every result from a target and chats depends on; JSON-ready."""
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
    for counts in files[:_FILES_SHOWN]:
        console.print(str(counts), soft_wrap=True)
    if len(files) > _FILES_SHOWN:
        console.print(f"… and {len(files) - _FILES_SHOWN} more files", soft_wrap=True)
    if len(files) > 1:
        console.print(str(total(files)), soft_wrap=True)
