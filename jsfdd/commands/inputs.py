"""What several commands read: a target, its mesh and the tokenized chats, the same in every process; a draft."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jsfdd.commands.options import ChatOptions, DecodingOptions, ModelOptions, share_of, to_json

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jsfdd.base.records import Sample
    from jsfdd.data.batches import Shape
    from jsfdd.data.counts import FileCounts
    from jsfdd.data.template import TokenizeSummary
    from jsfdd.data.tokenized import TokenizedChats
    from jsfdd.decoding.settings import DecodeSetup, Team, TreeShape
    from jsfdd.weights.target import Target

_FILES_SHOWN = 40


class Inputs(NamedTuple):
    """What is known before any weights are read; the target has none yet."""

    target: Target
    mesh: Mesh
    samples: Sequence[Sample]
    summary: TokenizeSummary
    files: list[FileCounts]  # what became of each input file's rows
    shapes: tuple[Shape, ...]


class Loaded(NamedTuple):
    """A target and tokenized chats, shared by the stages of one process."""

    target: Target
    mesh: Mesh
    samples: Sequence[Sample]
    summary: TokenizeSummary
    files: list[FileCounts]  # what became of each input file's rows
    shapes: tuple[Shape, ...]
    identity: dict  # what every result from them depends on; JSON-ready


def read_inputs(model: ModelOptions, chats: ChatOptions) -> Inputs:
    """The tokenized chats, and the target without its weights: a bad line should not cost a minute."""
    from jsfdd.base.mesh import make_mesh
    from jsfdd.base.processes import is_primary
    from jsfdd.data.batches import choose_shapes
    from jsfdd.data.rows import expand_names
    from jsfdd.data.tokenized import usable_processes

    expand_names(chats.data)  # a name that is wrong should not even cost the target's tokenizer
    mesh = make_mesh(model=model.model_shards)
    target = describe_target(model)
    found = read_chats_for(target, chats, processes=usable_processes())
    if is_primary():
        show_counts(found.files, found.notes)
    shapes = choose_shapes(found.samples.lengths, chats.batch_tokens)
    return Inputs(target, mesh, found.samples, found.summary, found.files, shapes)


def read_chats_for(target: Target, chats: ChatOptions, processes: int = 1) -> TokenizedChats:
    """The chats as the target's tokenizer reads them, cut where its context ends."""
    from jsfdd.data.tokenized import read_samples

    length = longest_sample(target, chats.max_length)
    found = read_samples(
        chats.data,
        target.tokenizer,
        length,
        chats.mask_spans,
        vocab_size=target.config.vocab_size,
        split_answers=chats.split_answers,
        strict=chats.strict,
        max_skipped=share_of("--max-skipped", chats.max_skipped),
        processes=processes,
    )
    if length < chats.max_length and found.summary.truncated:
        found.notes.append(
            f"{len(found.summary.truncated):,} conversations are cut after {length} tokens, where the target's context ends "
            f"(max_position_embeddings), before --max-length {chats.max_length}"
        )
    return found


def longest_sample(target: Target, max_length: int) -> int:
    """Tokens after which a conversation is cut."""
    return min(max_length, target.config.max_position)


def load(config, inputs: Inputs | None = None) -> Loaded:
    """The inputs (those that `config.model` and `config.chats` name unless given) with the target's weights."""
    from jsfdd.base.processes import agree
    from jsfdd.base.records import samples_digest, tokens_digest

    inputs = inputs or read_inputs(config.model, config.chats)
    target = load_weights(config.model, inputs.mesh)
    length = longest_sample(target, config.chats.max_length)
    identity = identity_of(target, config.chats.data, length, target_dtype(config.model))
    # What is stored belongs to tokens: another template that writes the same is no other, and the same one may write others.
    del identity["template"]
    identity["tokens"] = tokens_digest(inputs.samples)
    if "strftime_now" in target.tokenizer.chat_template:
        identity["date"] = config.model.date
    agree({"the options": to_json(config), "the tokenized chats": samples_digest(inputs.samples), **identity})
    return Loaded(*inputs._replace(target=target), identity)


def load_weights(model: ModelOptions, mesh: Mesh | None = None) -> Target:
    """The target with its weights, on the devices of a mesh or whole on the first device."""
    import jax.numpy as jnp

    from jsfdd.weights.target import load_target

    return load_target(model.target, jnp.dtype(target_dtype(model)), mesh, model.template_options())


def describe_target(model: ModelOptions) -> Target:
    """The target without its weights."""
    from jsfdd.weights.target import describe_target

    return describe_target(model.target, model.template_options())


def target_dtype(model: ModelOptions) -> str:
    """What --dtype comes to on the devices that are here."""
    import jax

    if model.dtype != "auto":
        return model.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def identity_of(target: Target, data: Sequence[Path], max_length: int, dtype: str) -> dict:
    """What every result from a target and chats depends on; JSON-ready."""
    from jsfdd.data.rows import input_digests
    from jsfdd.weights.tokenizer import tokenizer_digest

    return {
        "target": target.fingerprint,
        "tokenizer": tokenizer_digest(target.tokenizer),
        "template": template_digest(target),
        "data": list(input_digests(data).values()),
        "max_length": max_length,
        "dtype": dtype,
    }


def template_digest(target: Target) -> str:
    """sha256 hex of the chat template with all that the user said about it."""
    return hashlib.sha256(target.tokenizer.chat_template.encode()).hexdigest()


def show_counts(files: Sequence[FileCounts], notes: Sequence[str] = ()) -> None:
    """One line a file on stderr, their sums, and notes; of very many files only the first."""
    from jsfdd.base.progress import console
    from jsfdd.data.counts import total

    for counts in files[:_FILES_SHOWN]:
        console.print(str(counts), soft_wrap=True)
    if len(files) > _FILES_SHOWN:
        console.print(f"… and {len(files) - _FILES_SHOWN} more files", soft_wrap=True)
    if len(files) > 1:
        console.print(str(total(files)), soft_wrap=True)
    for note in notes:
        console.print(note, soft_wrap=True, markup=False)


def tree_shape(decoding: DecodingOptions) -> TreeShape | None:
    """The tree that is asked for, None for chains. ValueError if its depth cannot hold it."""
    from jsfdd.decoding.settings import TreeShape

    if not decoding.tree_nodes:
        return None
    return TreeShape(decoding.num_draft_tokens, decoding.tree_top_k, decoding.tree_nodes)


def setup_of(target: Target, team: Team, decoding: DecodingOptions) -> DecodeSetup:
    """How the target answers with these drafts."""
    from jsfdd.decoding.settings import Cutoff, decode_setup

    return decode_setup(
        target,
        team.configs,
        num_draft_tokens=decoding.num_draft_tokens,
        max_new_tokens=decoding.max_new_tokens,
        tree=tree_shape(decoding),
        cutoff=Cutoff(decoding.top_k, decoding.top_p),
        combine=team.combine,
    )
