"""`jsfdd respond`: the target answers the users' turns of chats, and its own text becomes a file of chats.

    answers.jsonl         {"id", "source", "messages", "answered_by": {…}} a conversation, in the order of the input
    answers.jsonl.parts   the answers as they come (`decoding.conversation_log`): what a later call continues from

Drafts learn best from the target's own text. An answer that was cut at --max-new-tokens has `"truncated": true` in its
message: every command reads its text and does not count the end-of-turn token that the template puts after it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from jsfdd.commands.inputs import identity_of, show_counts, tree_shape
from jsfdd.commands.options import (
    Batched,
    ChatNames,
    ConversationLength,
    DecodingOptions,
    ProcessOptions,
    Seeded,
    TargetOptions,
)
from jsfdd.commands.outcome import Outcome, counts_to_json, many, planned

if TYPE_CHECKING:
    from jsfdd.data.counts import FileCounts
    from jsfdd.data.questions import Questions
    from jsfdd.decoding.conversations import Conversation
    from jsfdd.decoding.settings import DecodeSetup
    from jsfdd.models.draft import Draft
    from jsfdd.weights.target import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class RespondConfig(TargetOptions, ChatNames, ConversationLength, DecodingOptions, Batched, Seeded, ProcessOptions):
    """Let the target answer the users' turns of chats: its own text is what a draft learns best from."""

    out: Path
    """File of chats to write, ending in .jsonl; an interrupted run continues it, with what is in FILE.parts."""
    turns: Literal["all", "first"] = "all"
    """Answer every turn of the user's, each after the target's own earlier answers, or only the first one."""
    draft: Path | None = None
    """A training run's directory, its checkpoints/, or an exported draft, to decode with; without one, a token a step."""

    def __post_init__(self):
        super().__post_init__()
        if self.out.suffix != ".jsonl":
            raise ValueError(f"--out: got {str(self.out)!r}, but it must be a file that ends in .jsonl")
        if self.tree_nodes and self.draft is None:
            raise ValueError("--tree-nodes is about a draft's tokens; give --draft DIR or leave it out")


class Prepared(NamedTuple):
    """What is to be answered, and how; known before any weights of the target are read.

    Attributes:
      questions: in the order of the input.
      files: what became of each input file's rows.
      draft: None without one.
      setup: how to decode.
      longest_prompt: tokens of a prompt that still has an answer.
    """

    questions: list[Questions]
    files: list[FileCounts]
    draft: Draft | None
    setup: DecodeSetup
    longest_prompt: int


class Responses(NamedTuple):
    """What was answered.

    Attributes:
      conversations: in the order of the file.
      files: what became of each input file's rows.
      tau: tokens per verification; None without a draft.
    """

    conversations: list[Conversation]
    files: list[FileCounts]
    tau: float | None

    def counts(self) -> dict[str, int]:
        """Conversations, answers, tokens, answers cut short, and conversations that ended early, by reason."""
        answers = [answer for conversation in self.conversations for answer in conversation.answers]
        ended = Counter(conversation.ended for conversation in self.conversations)
        return {
            "conversations": len(self.conversations),
            "answers": len(answers),
            "tokens": sum(answer.num_tokens for answer in answers),
            "truncated_answers": sum(answer.truncated for answer in answers),
            "ended_after_truncated": ended["truncated"],
            "ended_too_long": ended["too_long"],
            "ended_refused": ended["refused"],
        }


def prepare(config: RespondConfig) -> Prepared:
    """Read and check all that `respond` needs but the target's weights; shows what became of the input's rows."""
    from jsfdd.base.processes import is_primary
    from jsfdd.data.chat import read_chat_files
    from jsfdd.data.counts import count_questions_by_file
    from jsfdd.data.questions import questions_of
    from jsfdd.decoding.settings import Cutoff, decode_setup
    from jsfdd.weights.draft import check_draft, load_draft
    from jsfdd.weights.target import describe_target

    tree = tree_shape(config)
    if config.out.is_dir():
        raise IsADirectoryError(f"{config.out}: a directory; give --out the name of a file")
    if config.out.exists() and not parts_of(config.out).exists():
        raise FileExistsError(f"{config.out}: already there, without {parts_of(config.out).name}; choose another --out")
    found = read_chat_files(config.data, answered=False)
    draft = None if config.draft is None else load_draft(config.draft)
    target = describe_target(config.target)
    if draft is not None:
        check_draft(target, draft.config, str(config.draft))
    setup = decode_setup(
        target,
        [] if draft is None else [draft.config],
        num_draft_tokens=config.num_draft_tokens,
        max_new_tokens=config.max_new_tokens,
        tree=tree,
        cutoff=Cutoff(config.top_k, config.top_p),
    )
    longest_prompt = min(config.max_length, target.config.max_position) - config.max_new_tokens
    questions, summary = questions_of(
        found.chats, target.tokenizer, longest_prompt=longest_prompt, first_turn_only=config.turns == "first"
    )
    files = count_questions_by_file(found, summary)
    if is_primary():
        show_counts(files)
    return Prepared(questions, files, draft, setup, longest_prompt)


def run(config: RespondConfig, prepared: Prepared) -> Outcome:
    responses = respond(config, prepared)
    counts = responses.counts()
    words = f"{counts['conversations']:,} conversations, {counts['answers']:,} answers of {counts['tokens']:,} tokens"
    if counts["truncated_answers"]:
        words += f", {counts['truncated_answers']:,} of them cut at --max-new-tokens {config.max_new_tokens}"
    early = {
        "after such an answer": counts["ended_after_truncated"],
        "for their length": counts["ended_too_long"],
        "at what the chat template refuses": counts["ended_refused"],
    }
    ended = ", ".join(f"{count:,} {reason}" for reason, count in early.items() if count)
    words += f"; ended early: {ended}" if ended else ""
    words += "" if responses.tau is None else f"; τ {responses.tau:.2f}"
    values = {"command": "respond"} | counts | {"tau": responses.tau, "chats": config.out}
    return Outcome(values | {"files": counts_to_json(responses.files)}, f"{words}: {config.out}")


def describe(config: RespondConfig, prepared: Prepared) -> Outcome:
    from jsfdd.data.counts import total

    answers = sum(len(questions.turns) for questions in prepared.questions)
    values = {
        "files": counts_to_json(prepared.files),
        "conversations": len(prepared.questions),
        "skipped": total(prepared.files).read - len(prepared.questions),
        "answers": answers,
        "max_new_tokens": config.max_new_tokens,
    }
    words = [
        f"answer {many(values['conversations'], 'conversation')} ({many(values['skipped'], 'row')} skipped): "
        f"{many(answers, 'answer')} of up to {many(config.max_new_tokens, 'token')}",
        f"{config.batch_size} at a time, {'with a draft' if config.draft else 'a token a step'}",
    ]
    parts = parts_of(config.out)
    return planned("respond", values, words, config.out.parent, [config.out.name, parts.name], continues=parts)


def respond(config: RespondConfig, asked: Prepared | None = None) -> Responses:
    """Write a file of chats; returns what it holds. A second call continues, never decodes again."""
    import jax.numpy as jnp
    import numpy as np

    from jsfdd.base.mesh import make_mesh, round_up_to_shards
    from jsfdd.base.processes import agree, agree_on_directory, is_primary, wait_for_all
    from jsfdd.base.progress import progress
    from jsfdd.decoding.conversation_log import append_batch, open_log, read_log
    from jsfdd.decoding.conversations import answer_all
    from jsfdd.weights.target import load_target

    asked = asked or prepare(config)
    mesh = make_mesh(model=config.model_shards)
    target = load_target(config.target, jnp.dtype(config.dtype), mesh)
    batch_size = round_up_to_shards(config.batch_size, mesh)
    identity = _identity(config, target, asked, batch_size)
    agree({"the options": config.to_json(), **identity})
    agree_on_directory(config.out.parent)
    log = parts_of(config.out)
    finished = read_log(log, identity)
    agree({"the answers that an earlier call left": finished})  # and so that no one writes before all have read
    if is_primary():
        open_log(log, identity)
    done, total = sum(len(batch.answers) for batch in finished), sum(len(each.turns) for each in asked.questions)
    with progress("respond", "answers", total, finished=done, shown=is_primary()) as bar:
        conversations, accept_counts = answer_all(
            target,
            asked.setup,
            [] if asked.draft is None else [asked.draft.params],
            asked.questions,
            mesh,
            temperature=config.temperature,
            batch_size=batch_size,
            longest_prompt=asked.longest_prompt,
            seed=config.seed,
            finished=finished,
            keep=lambda batch: append_batch(log, batch) if is_primary() else None,
            progress=bar.update,
        )
    if is_primary():
        _write(config, target, conversations)
    wait_for_all("answers written")
    steps = accept_counts.sum()
    emitted = accept_counts @ np.arange(1, len(accept_counts) + 1)
    return Responses(conversations, asked.files, float(emitted / steps) if asked.draft and steps else None)


def parts_of(out: Path) -> Path:
    """Where the answers are kept as they come; no name of a chat file, so that --data never reads it."""
    return out.with_name(out.name + ".parts")


def _identity(config: RespondConfig, target: Target, asked: Prepared, batch_size: int) -> dict:
    """What the answers depend on; JSON-ready."""
    names = ("model_shards", "turns", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    reach = ("num_draft_tokens", "tree_nodes", "tree_top_k")
    draft = None
    if asked.draft is not None:
        draft = {"digest": _digest(asked.draft)} | {name: getattr(config, name) for name in reach}
    return (
        identity_of(target, config.data, config.max_length, config.dtype)
        | {name: getattr(config, name) for name in names}
        | {"stop_tokens": target.stop_tokens, "batch_size": batch_size, "draft": draft}
    )


def _digest(draft: Draft) -> str:
    import jax
    import numpy as np

    from jsfdd.weights.checkpoint import draft_to_json

    sha = hashlib.sha256(json.dumps(draft_to_json(draft.config), sort_keys=True).encode())
    for path, leaf in jax.tree.leaves_with_path(draft.params):
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


def _write(config: RespondConfig, target: Target, conversations: Sequence[Conversation]) -> None:
    """The rows, whole or not at all. Each says how it was made, since rows outlive the files they were written to."""
    from jsfdd.base.files import written_whole

    made = {"target": Path(config.target).name, "fingerprint": target.fingerprint}
    made |= {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "seed")}
    with written_whole(config.out) as aside, aside.open("w", encoding="utf-8") as file:
        for conversation in conversations:
            questions = conversation.questions
            row = {"id": questions.id, "source": questions.source, "messages": conversation.messages}
            row |= {"tools": questions.tools} if questions.tools else {}
            row["answered_by"] = made
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
