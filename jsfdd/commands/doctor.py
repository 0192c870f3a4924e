"""`jsfdd doctor`: find what would make a draft's served acceptance differ from its training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jsfdd.commands.inputs import identity_of
from jsfdd.commands.options import ChainOptions, ChatFiles, DataOptions, TargetOptions
from jsfdd.commands.outcome import Outcome, rendered

if TYPE_CHECKING:
    from jsfdd.base.records import Sample
    from jsfdd.data.chat import Chat
    from jsfdd.data.template import TokenizeSummary
    from jsfdd.doctor.findings import Diagnosis
    from jsfdd.hidden.store import HiddenStore
    from jsfdd.models.draft import Draft


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig(TargetOptions, ChatFiles, ChainOptions):
    """Find what would make a draft's served acceptance differ from its training. Exits with 1 on an error."""

    draft: Path | None = None
    """A training run's directory, its checkpoints/, or an exported draft; without one, target and data alone are examined."""
    hidden: Path | None = None
    """A store of hidden states to compare with fresh ones; hidden/ in the training run's directory unless given."""
    conversations: int = 6
    """So many are read by the target, and so many of their prompts decoded; template and mask are checked on more."""
    out: Path | None = None
    """Directory for doctor.json; without it the findings are only printed."""


class Prepared(NamedTuple):
    """What is examined. Conversations are cut where they were in the draft's training, so that tokens and masks can be
    compared with it."""

    chats: list[Chat]
    draft: Draft | None
    store: HiddenStore | None
    max_length: int
    samples: list[Sample]
    summary: TokenizeSummary


def prepare(config: DoctorConfig) -> Prepared:
    from jsfdd.data.chat import read_chat_files
    from jsfdd.data.template import tokenize_chats
    from jsfdd.weights.draft import load_draft
    from jsfdd.weights.target import describe_target

    if config.model_shards > 1:
        raise ValueError("--model-shards: doctor examines on one device; leave the option out")
    chats = read_chat_files(config.data).chats
    draft = None if config.draft is None else load_draft(config.draft)
    record = (draft and draft.record) or {}
    store = _find_store(config)
    max_length = record.get("max_length", DataOptions.max_length)
    samples, summary = tokenize_chats(chats, describe_target(config.target).tokenizer, max_length, config.mask_spans)
    return Prepared(chats, draft, store, max_length, samples, summary)


def run(config: DoctorConfig, prepared: Prepared) -> Outcome:
    from jsfdd.doctor.findings import print_diagnosis

    diagnosis = doctor(config, prepared)
    words = rendered(lambda out: print_diagnosis(diagnosis, out)).rstrip("\n")
    return Outcome({"command": "doctor"} | diagnosis.to_json(), words, 1 if diagnosis.worst == "error" else 0)


def doctor(config: DoctorConfig, prepared: Prepared | None = None) -> Diagnosis:
    """Examine and, with --out, write doctor.json; returns the findings."""
    import jax.numpy as jnp

    from jsfdd.base.files import write_json
    from jsfdd.base.progress import console
    from jsfdd.doctor.examine import examine
    from jsfdd.weights.target import load_target, locate_target

    chats, draft, store, max_length, samples, summary = prepared or prepare(config)
    target = load_target(config.target, jnp.dtype(config.dtype))
    with console.status("examining") as status:
        diagnosis = examine(
            target,
            locate_target(config.target),
            chats,
            samples,
            summary,
            identity_of(target, config.data, max_length, config.dtype),
            draft,
            store,
            conversations=config.conversations,
            num_draft_tokens=config.num_draft_tokens,
            max_new_tokens=config.max_new_tokens,
            masks_spans=bool(config.mask_spans),
            progress=status.update,
        )
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / "doctor.json", diagnosis.to_json() | {"config": config.to_json()})
    return diagnosis


def _find_store(config: DoctorConfig) -> HiddenStore | None:
    """The store that is asked for, or the one beside the draft if there is one; whatever it belongs to."""
    from jsfdd.hidden.store import HiddenStore

    if config.hidden is not None:
        return HiddenStore.open(config.hidden, identity=None)
    beside = None if config.draft is None else config.draft / "hidden"
    return HiddenStore.open(beside, identity=None) if beside is not None and beside.is_dir() else None
