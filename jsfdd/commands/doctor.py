"""`jsfdd doctor`: load what a config names, examine it, print what was found and write it down."""

from __future__ import annotations

import jax.numpy as jnp
from rich.console import Console

from jsfdd.base.files import write_json
from jsfdd.base.progress import console
from jsfdd.commands.configs import DoctorConfig
from jsfdd.commands.inputs import identity_of
from jsfdd.commands.options import DataOptions
from jsfdd.data.chat import read_chats
from jsfdd.data.template import tokenize_chats
from jsfdd.doctor.examine import examine
from jsfdd.doctor.findings import Diagnosis, print_diagnosis
from jsfdd.hidden.store import HiddenStore
from jsfdd.weights.draft import load_draft
from jsfdd.weights.target import load_target, locate_target


def doctor(config: DoctorConfig) -> Diagnosis:
    """Print the findings on stdout and, with --out, write doctor.json; returns them.

    Conversations are cut where they were in the draft's training, so that tokens and masks can be compared with it.
    """
    if config.model_shards > 1:
        raise ValueError("--model-shards: doctor examines on one device; leave the option out")
    chats = read_chats(config.data)
    draft = None if config.draft is None else load_draft(config.draft)
    record = (draft and draft.record) or {}
    store = _find_store(config)
    target = load_target(config.target, jnp.dtype(config.dtype))
    max_length = record.get("max_length", DataOptions.max_length)
    samples, summary = tokenize_chats(chats, target.tokenizer, max_length, config.mask_spans)
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
            progress=status.update,
        )
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / "doctor.json", diagnosis.to_json() | {"config": config.to_json()})
    print_diagnosis(diagnosis, Console(highlight=False))
    return diagnosis


def _find_store(config: DoctorConfig) -> HiddenStore | None:
    """The store that is asked for, or the one beside the draft if there is one; whatever it belongs to."""
    if config.hidden is not None:
        return HiddenStore.open(config.hidden, identity=None)
    beside = None if config.draft is None else config.draft / "hidden"
    return HiddenStore.open(beside, identity=None) if beside is not None and beside.is_dir() else None
