"""The inputs that several commands share: a target, its mesh, and the tokenized chats, the same in every process."""

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
    from jsfdd.hidden.imported import ImportedStates, StateIndex
    from jsfdd.weights.target import Target

_MAX_LISTED_FILES = 40


class Inputs(NamedTuple):
    """The inputs before any weights are read; the target has none yet. `states`: where another program's states lie."""

    target: Target
    mesh: Mesh
    samples: Sequence[Sample]
    summary: TokenizeSummary
    files: list[FileCounts]  # counts of each input file's rows
    shapes: tuple[Shape, ...]
    states: StateIndex | None = None


class Loaded(NamedTuple):
    """A target and tokenized chats, shared by the stages of one process. With `states` the target has no layers."""

    target: Target
    mesh: Mesh
    samples: Sequence[Sample]
    summary: TokenizeSummary
    files: list[FileCounts]  # counts of each input file's rows
    shapes: tuple[Shape, ...]
    states: StateIndex | None
    identity: dict  # JSON-ready: what every result from them depends on


def read_inputs(model: ModelOptions, chats: ChatOptions, states_from: Path | None = None) -> Inputs:
    """Read and tokenize the chats, and describe the target. Weights are not read, so that a bad line fails at once.

    Args:
      states_from: directory with hidden states that another program wrote; the target then needs no layers.
    """
    from jsfdd.base.mesh import make_mesh
    from jsfdd.base.processes import is_primary
    from jsfdd.data.batches import choose_shapes
    from jsfdd.data.rows import expand_names
    from jsfdd.data.tokenized import usable_processes

    expand_names(chats.data)  # fails on a wrong file name before the target's tokenizer is loaded
    mesh = make_mesh(model=model.model_shards)
    target = describe_target(model, layers=states_from is None)
    tokenized = read_chats_for(target, chats, processes=usable_processes())
    if is_primary():
        show_counts(tokenized.files, tokenized.notes)
    shapes = choose_shapes(tokenized.samples.lengths, chats.batch_tokens)
    inputs = Inputs(target, mesh, tokenized.samples, tokenized.summary, tokenized.files, shapes)
    if states_from is None:
        return inputs
    from jsfdd.hidden.imported import find_states

    index = find_states(states_from, inputs.samples, target.config, longest_sample(target, chats.max_length))
    if index.unused and is_primary():
        show_counts(
            (),
            [f"{states_from}: {index.unused:,} files of hidden states belong to no sample, or to one that has a file already"],
        )
    return inputs._replace(states=index)


def read_chats_for(target: Target, chats: ChatOptions, processes: int = 1) -> TokenizedChats:
    """Read and tokenize the chats, and cut them at --max-length or where the target's context ends."""
    from jsfdd.data.tokenized import read_samples

    length = longest_sample(target, chats.max_length)
    tokenized = read_samples(
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
    if length < chats.max_length and tokenized.summary.truncated:
        tokenized.notes.append(
            f"{len(tokenized.summary.truncated):,} conversations are cut after {length} tokens, where the target's context "
            f"ends (max_position_embeddings), before --max-length {chats.max_length}"
        )
    return tokenized


def longest_sample(target: Target, max_length: int) -> int:
    """The number of tokens after which a conversation is cut."""
    return min(max_length, target.config.max_position)


def load(config, inputs: Inputs | None = None, target: Target | None = None) -> Loaded:
    """Load the target's weights, and read the inputs that `config.model` and `config.chats` name, unless they are given."""
    from jsfdd.base.processes import agree
    from jsfdd.base.records import samples_digest

    inputs = inputs or read_inputs(config.model, config.chats)
    target = target or load_weights(config.model, inputs.mesh, layers=inputs.states is None)
    identity = {"target": target.fingerprint} | known_identity(config, inputs)
    agree({"the options": to_json(config), "the tokenized chats": samples_digest(inputs.samples), **identity})
    return Loaded(*inputs._replace(target=target), identity)


def known_identity(config, inputs: Inputs) -> dict:
    """`Loaded.identity` without the target's weights, which need not be loaded for it."""
    from jsfdd.base.records import tokens_digest

    length = longest_sample(inputs.target, config.chats.max_length)
    identity = identity_of(inputs.target, config.chats.data, length, target_dtype(config.model))
    del identity["target"]
    # Results depend on the tokens, not on the template's text: different templates may write the same tokens.
    del identity["template"]
    identity["tokens"] = tokens_digest(inputs.samples)
    if inputs.states is not None:
        identity["hidden_from"] = inputs.states.digest
    if "strftime_now" in inputs.target.tokenizer.chat_template:
        identity["date"] = config.model.date
    return identity


def imported_states(loaded: Loaded, dtype: str, layers: tuple[int, ...] = ()) -> ImportedStates:
    """The hidden states of another program, after trying the target's head on some of them, which it prints.

    Raises:
      ValueError: they are not what the head reads, or the inputs of `layers` are not among them.
    """
    import numpy as np

    from jsfdd.base.processes import is_primary
    from jsfdd.hidden.imported import ImportedStates, check_head

    target, scale = loaded.target, np.asarray(loaded.target.params["norm"]["scale"])
    states = ImportedStates(loaded.states, target.config, scale, dtype, layers)
    fit = check_head(target, states, loaded.samples)
    if is_primary():
        show_counts(
            (),
            [
                f"{states.directory}: head(norm(h)) gives the next token {fit.top1:.1%} of the time as the likeliest (−log p "
                f"{fit.nll:.3f} on average, {fit.tokens} tokens)"
            ],
        )
    return states


def load_weights(model: ModelOptions, mesh: Mesh | None = None, layers: bool = True) -> Target:
    """Load the target with its weights, onto the devices of a mesh, or whole onto the first device."""
    import jax.numpy as jnp

    from jsfdd.weights.target import load_target

    return load_target(model.target, jnp.dtype(target_dtype(model)), mesh, model.template_options(), layers=layers)


def describe_target(model: ModelOptions, layers: bool = True) -> Target:
    """The target without its weights."""
    from jsfdd.weights.target import describe_target

    return describe_target(model.target, model.template_options(), layers=layers)


def target_dtype(model: ModelOptions) -> str:
    """Resolve --dtype for the devices of this machine."""
    import jax

    if model.dtype != "auto":
        return model.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def identity_of(target: Target, data: Sequence[Path], max_length: int, dtype: str) -> dict:
    """The identity of results from a target and chats: all that they depend on, JSON-ready."""
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
    """SHA-256 of the chat template, with the user's template options applied."""
    return hashlib.sha256(target.tokenizer.chat_template.encode()).hexdigest()


def show_counts(files: Sequence[FileCounts], notes: Sequence[str] = ()) -> None:
    """Print a line per file on stderr (at most 40), their sum, and notes."""
    from jsfdd.base.progress import console
    from jsfdd.data.counts import total

    for counts in files[:_MAX_LISTED_FILES]:
        console.print(str(counts), soft_wrap=True)
    if len(files) > _MAX_LISTED_FILES:
        console.print(f"… and {len(files) - _MAX_LISTED_FILES} more files", soft_wrap=True)
    if len(files) > 1:
        console.print(str(total(files)), soft_wrap=True)
    for note in notes:
        console.print(note, soft_wrap=True, markup=False)


def tree_shape(decoding: DecodingOptions) -> TreeShape | None:
    """The tree shape of the options, None for chains. ValueError if the tree is larger than its depth allows."""
    from jsfdd.decoding.settings import TreeShape

    if not decoding.tree_nodes:
        return None
    return TreeShape(decoding.num_draft_tokens, decoding.tree_top_k, decoding.tree_nodes)


def setup_of(target: Target, team: Team, decoding: DecodingOptions) -> DecodeSetup:
    """Make the decoding setup for a target, its drafts and the options."""
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
