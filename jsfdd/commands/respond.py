"""`jsfdd respond`: let the target answer the users' turns of chats, and write its answers as a new file of chats.

    answers.jsonl         one line {"id", "source", "messages", "answered_by": {…}} per conversation, in the order of the input
    answers.jsonl.parts   a log of the answers (`decoding.conversation_log`), from which an interrupted run continues
    scores.parquet …      with --keep-hidden, what `jsfdd score --keep-hidden` would write (`commands.kept_answers`)

Long answers need not all be finished: a first call answers every prompt with a few tokens and keeps their scores, and with
--selection a second one answers those that were selected (experiments/029_racing).

Drafts learn best from the target's own text. If an answer was cut at --max-new-tokens, its message has `"truncated": true`:
every command reads its text, but does not count the end-of-turn token that the template adds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

from jsfdd.commands import score
from jsfdd.commands.combine import check_combine, check_one_team, one_team
from jsfdd.commands.inputs import (
    describe_target,
    identity_of,
    load_weights,
    setup_of,
    show_counts,
    target_dtype,
    tree_shape,
)
from jsfdd.commands.kept_answers import (
    Kept,
    Recording,
    check_free,
    expected_tokens,
    recording,
    score_answers,
    scoring_of,
)
from jsfdd.commands.options import (
    ChatOptions,
    DecodingOptions,
    DraftOptions,
    Flag,
    ModelOptions,
    OptionalPath,
    OptionalShare,
    Paths,
    ProcessOptions,
    RecipeOptions,
    SelectionOptions,
    Within,
    check,
    check_at_least,
    check_share,
    share_of,
    to_json,
)
from jsfdd.commands.outcome import Outcome, counts_to_json, many, planned
from jsfdd.commands.score import check_arms
from jsfdd.models.architecture import DraftKind

if TYPE_CHECKING:
    from jsfdd.data.counts import FileCounts
    from jsfdd.data.questions import QuestionTable
    from jsfdd.decoding.conversations import Conversation
    from jsfdd.decoding.settings import DecodeSetup, Team
    from jsfdd.models.draft import Draft
    from jsfdd.selection.sfdd import Selection
    from jsfdd.weights.target import Target

EXAMPLES = """
jsfdd respond --target smollm2 --data chats.jsonl --max-new-tokens 512 --out answers.jsonl
jsfdd respond --target DIR --data chats/ --temperature 0.7 --out answers.jsonl --dry-run
jsfdd respond --target DIR --data chats/ --turns first --keep-hidden flatness --out own/a.jsonl
jsfdd respond --target DIR --data chats/ --selection begun/selection.json --out own/a.jsonl
"""


_CHARACTERS_PER_TOKEN = 4  # an estimate
_PROVENANCE = 250  # bytes of a row about how it was answered


@dataclasses.dataclass(frozen=True, kw_only=True)
class RespondConfig:
    """Let the target answer the users' turns of chats. A draft learns best from the target's own text."""

    model: ModelOptions
    decoding: DecodingOptions = DecodingOptions()
    drafts: DraftOptions = DraftOptions()
    processes: ProcessOptions = ProcessOptions()
    data: Paths
    """Chats, as for `jsfdd score`. Their answers are ignored."""
    out: Path
    """File of chats to write; its name must end in .jsonl. An interrupted run continues from FILE.parts."""
    selection: OptionalPath = None
    """selection.json, made from scores of the same chats, such as those of their first 32 tokens of answer (--max-new-tokens 32
    --keep-hidden random). Answer only the chats whose ids it keeps; their texts are not compared."""
    turns: Literal["all", "first"] = "all"
    """Answer every turn of the user, after the target's answers to the earlier turns, or only the first turn."""
    max_length: int = ChatOptions.max_length
    """A conversation ends before a turn that would make it longer than this many tokens."""
    strict: Flag = False
    """Stop at the first row without a question. By default such rows are skipped and counted."""
    max_skipped: OptionalShare = None
    """Stop if more than this share of the rows is skipped, as for `jsfdd score`."""
    batch_size: int = 8
    """Prompts decoded together."""
    keep_hidden: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="", metavar="ARM …")] = ()
    """In the same pass, write scores.parquet and hidden/ beside FILE, as `jsfdd score --keep-hidden` does in a pass of its own:
    an ARM is a metric, for the samples that it can select, or `full`. Decodes without a draft."""
    retain_ratio: float = SelectionOptions.retain_ratio
    """With --keep-hidden: the share of the samples that the selection will keep."""
    within: Within = SelectionOptions.within
    """With --keep-hidden: how the selection will rank samples, as for `jsfdd score`."""
    draft_kind: DraftKind = RecipeOptions.draft_kind
    """With --keep-hidden: the kind of draft to train. Of `eagle3` the inputs of three layers are kept too."""
    seed: int = 0
    """Seed of every random choice of the command."""

    def __post_init__(self):
        check("--data", self.data, len(self.data) > 0, "at least one chat file")
        check("--max-length", self.max_length, self.max_length >= 8, "8 tokens or more")
        check("--out", str(self.out), self.out.suffix == ".jsonl", "a file that ends in .jsonl")
        check_at_least(1, batch_size=self.batch_size)
        share_of("--max-skipped", self.max_skipped)
        check_share("--retain-ratio", self.retain_ratio)
        check_arms("--keep-hidden", self.keep_hidden)
        if self.keep_hidden and self.drafts.draft:
            raise ValueError("--keep-hidden keeps the states of plain decoding; leave --draft out")
        check_one_team(self.drafts)
        check_combine(self.drafts, self.decoding)


class Prepared(NamedTuple):
    """The questions and how to answer them, prepared without the target's weights.

    Attributes:
      questions: in the order of the input; with a selection those that it keeps.
      selection: if there is one.
      files: counts of each input file's rows.
      team: the drafts, if any.
      setup: how to decode.
      longest_prompt: the most tokens of a prompt that is answered.
      state_bytes: with --keep-hidden, those of a token's states on disk; else 0.
    """

    questions: QuestionTable
    selection: Selection | None
    files: list[FileCounts]
    team: Team
    setup: DecodeSetup
    longest_prompt: int
    state_bytes: int = 0


class Responses(NamedTuple):
    """The answered conversations.

    Attributes:
      conversations: in the order of the output file.
      files: counts of each input file's rows.
      tau: tokens emitted per verification; None without a draft.
      kept: with --keep-hidden, how many samples have their scores from the decoding.
    """

    conversations: Sequence[Conversation]
    files: list[FileCounts]
    tau: float | None
    kept: Kept | None = None

    def counts(self) -> dict[str, int]:
        """Numbers of conversations, answers, tokens and truncated answers, and of conversations that ended early, by reason."""
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
    """Read and check the inputs without the target's weights, and print the counts of the input's rows."""
    from jsfdd.base.processes import is_primary
    from jsfdd.data.chat import ReadCounts, stream_chats
    from jsfdd.data.counts import check_too_many_skipped, count_questions_by_file
    from jsfdd.data.questions import questions_of, selected
    from jsfdd.data.rows import expand_names
    from jsfdd.selection.sfdd import read_selection
    from jsfdd.weights.draft import check_draft

    tree_shape(config.decoding)
    if not config.keep_hidden:
        score.check_only_with_keep_hidden(config, ("retain_ratio", "within", "draft_kind"))
    if config.out.is_dir():
        raise IsADirectoryError(f"{config.out}: a directory; give --out the name of a file")
    if config.out.exists() and not parts_of(config.out).exists():
        raise FileExistsError(f"{config.out}: already there, without {parts_of(config.out).name}; choose another --out")
    if config.keep_hidden:
        check_free(config.out)
    expand_names(config.data)  # a wrong name should not even cost the target's tokenizer
    selection = None if config.selection is None else read_selection(config.selection)
    target = describe_target(config.model)
    team = one_team(config.drafts, target.config.num_layers)
    for name, draft in team.drafts.items():
        check_draft(target, draft.config, name)
    setup = setup_of(target, team, config.decoding)
    state_bytes = 0
    if config.keep_hidden:
        scoring = scoring_of(config)
        layers = score.layers_kept(scoring, target.config)  # fails if the target has too few
        state_bytes = score.hidden_bytes(scoring.hidden_dtype, target.config.hidden_size, 1, len(layers))
    longest_prompt = min(config.max_length, target.config.max_position) - config.decoding.max_new_tokens
    read = ReadCounts()
    questions, summary = questions_of(
        stream_chats(config.data, read, answered=False, strict=config.strict),
        target.tokenizer,
        longest_prompt=longest_prompt,
        first_turn_only=config.turns == "first",
        vocab_size=target.config.vocab_size,
    )
    files = count_questions_by_file(read, summary)
    if is_primary():
        show_counts(files, read.notes())
    check_too_many_skipped(files, read.skipped.first | summary.first, share_of("--max-skipped", config.max_skipped))
    if selection is not None:
        skipped = {name for names in summary.skipped.values() for name in names}  # they are counted above
        questions = selected(set(selection.ids) - skipped, questions, config.selection)
    return Prepared(questions, selection, files, team, setup, longest_prompt, state_bytes)


def run(config: RespondConfig, prepared: Prepared) -> Outcome:
    responses = respond(config, prepared)
    counts = responses.counts()
    words = f"{counts['conversations']:,} conversations, {counts['answers']:,} answers of {counts['tokens']:,} tokens"
    if counts["truncated_answers"]:
        words += f", {counts['truncated_answers']:,} of them cut at --max-new-tokens {config.decoding.max_new_tokens}"
    early = {
        "after such an answer": counts["ended_after_truncated"],
        "for their length": counts["ended_too_long"],
        "at a turn that the chat template refuses": counts["ended_refused"],
    }
    ended = ", ".join(f"{count:,} {reason}" for reason, count in early.items() if count)
    words += f"; ended early: {ended}" if ended else ""
    words += "" if responses.tau is None else f"; τ {responses.tau:.2f}"
    values = {"command": "respond"} | counts | {"tau": responses.tau, "chats": config.out}
    words += f": {config.out}"
    if responses.kept is not None:
        samples, decoded = responses.kept
        values |= {"samples": samples, "scored_while_decoding": decoded, "scores": config.out.parent / "scores.parquet"}
        values |= {"hidden": config.out.parent / score.HIDDEN}
        words += f"; {many(samples, 'sample')} scored, {decoded:,} of them while decoding: {values['scores']}"
    return Outcome(values | {"files": counts_to_json(responses.files)}, words)


def describe(config: RespondConfig, prepared: Prepared) -> Outcome:
    from jsfdd.data.counts import total

    answers = sum(len(questions.turns) for questions in prepared.questions)
    values = {
        "files": counts_to_json(prepared.files),
        "conversations": len(prepared.questions),
        "skipped": total(prepared.files).read - total(prepared.files).kept,
        "answers": answers,
        "max_new_tokens": config.decoding.max_new_tokens,
    }
    words = [
        f"answer {many(values['conversations'], 'conversation')} ({many(values['skipped'], 'row')} skipped): "
        f"{many(answers, 'answer')} of up to {many(config.decoding.max_new_tokens, 'token')}",
        f"{config.batch_size} at a time, {' and '.join(prepared.team.drafts) or 'without a draft'}",
    ]
    parts = parts_of(config.out)
    files = [config.out.name, parts.name]
    text = _CHARACTERS_PER_TOKEN * answers * config.decoding.max_new_tokens
    # The log repeats the answers.
    values["answers_bytes"] = prepared.questions.num_bytes + len(prepared.questions) * _PROVENANCE + 2 * text
    words.append(f"at most about {values['answers_bytes'] / 1e6:,.1f} MB of questions and answers")
    if config.keep_hidden:
        values["hidden_bytes"] = prepared.state_bytes * expected_tokens(config, prepared)
        kept = f"{values['hidden_bytes'] / 1e6:,.1f} MB of hidden states for {' '.join(config.keep_hidden)}"
        words.append(f"keep scores, and at most about {kept}, in the same pass")
        files += ["scores.parquet", "scores.parts/", f"{score.HIDDEN}/"]
    return planned("respond", values, words, config.out.parent, files, continues=parts)


def respond(config: RespondConfig, prepared: Prepared | None = None) -> Responses:
    """Write a file of chats, and return its content. A second call continues, and decodes nothing again."""
    from jsfdd.base.lock import sole_writer
    from jsfdd.base.processes import agree_on_directory

    prepared = prepared or prepare(config)
    agree_on_directory(config.out.parent)
    with sole_writer(config.out):
        return _respond(config, prepared)


def _respond(config: RespondConfig, prepared: Prepared) -> Responses:
    import numpy as np

    from jsfdd.base.mesh import make_mesh, round_up_to_shards
    from jsfdd.base.processes import agree, is_primary, wait_for_all
    from jsfdd.base.progress import progress
    from jsfdd.decoding.conversation_log import append_batch, open_log, read_log
    from jsfdd.decoding.conversations import answer_all
    from jsfdd.selection.sfdd import check_inputs

    mesh = make_mesh(model=config.model.model_shards)
    target = load_weights(config.model, mesh)
    batch_size = round_up_to_shards(config.batch_size, mesh)
    identity = _identity(config, target, prepared, batch_size)
    if prepared.selection is not None:
        same = {name: identity[name] for name in ("target", "tokenizer")}
        check_inputs(prepared.selection, same, config.selection)
    agree({"the options": to_json(config), **identity})
    log = parts_of(config.out)
    finished = read_log(log, identity)
    agree({"the answers that an earlier call left": finished})  # also makes sure that all have read before one writes
    if is_primary():
        open_log(log, identity)
    done, total = sum(len(batch.answers) for batch in finished), sum(len(item.turns) for item in prepared.questions)
    kept_for_later = nullcontext(Recording(None, lambda batch, *_: append_batch(log, batch) if is_primary() else None))
    if config.keep_hidden:
        kept_for_later = recording(config, prepared, target, mesh, identity, lambda batch: append_batch(log, batch))
    with (
        kept_for_later as recorder,
        progress("respond", "answers", total, finished=done, shown=is_primary()) as bar,
    ):
        conversations, accept_counts = answer_all(
            target,
            prepared.setup,
            prepared.team.params,
            prepared.questions,
            mesh,
            temperature=config.decoding.temperature,
            batch_size=batch_size,
            longest_prompt=prepared.longest_prompt,
            seed=config.seed,
            decode=recorder.decode,
            finished=finished,
            keep=recorder.keep,
            progress=bar.update,
        )
    if is_primary():
        _write(config, target, conversations)
    wait_for_all("answers written")
    kept = score_answers(config, target) if config.keep_hidden else None
    steps = accept_counts.sum()
    emitted = accept_counts @ np.arange(1, len(accept_counts) + 1)
    tau = float(emitted / steps) if prepared.team.drafts and steps else None
    return Responses(conversations, prepared.files, tau, kept)


def parts_of(out: Path) -> Path:
    """The log of answers. Its name is not that of a chat file, so that --data never reads it."""
    return out.with_name(out.name + ".parts")


def _identity(config: RespondConfig, target: Target, prepared: Prepared, batch_size: int) -> dict:
    """All that the answers depend on; JSON-ready."""
    team, selection = prepared.team, prepared.selection
    names = ("model_shards", "turns", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    options, drafts = to_json(config), {}
    if team.drafts:
        drafts = {name: options[name] for name in ("combine", "num_draft_tokens", "tree_nodes", "tree_top_k")}
        drafts["digests"] = [_digest(draft) for draft in team.drafts.values()]
    return (
        identity_of(target, config.data, config.max_length, target_dtype(config.model))
        | {name: options[name] for name in names}
        | {"stop_tokens": target.stop_tokens, "batch_size": batch_size, "drafts": drafts}
        | ({} if selection is None else {"selection": hashlib.sha256(json.dumps(sorted(selection.ids)).encode()).hexdigest()})
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
    """Write the rows atomically. Each row says how it was made, since rows outlive the files they were written to."""
    from jsfdd.base.files import written_whole

    provenance = {"target": Path(config.model.target).name, "fingerprint": target.fingerprint}
    options = to_json(config)
    provenance |= {name: options[name] for name in ("temperature", "top_k", "top_p", "seed")}

    def lines() -> Iterator[bytes]:
        for conversation in conversations:
            questions = conversation.questions
            row = {"id": questions.id, "source": questions.source, "messages": conversation.messages}
            row |= {"tools": questions.tools} if questions.tools else {}
            row["answered_by"] = provenance
            yield json.dumps(row, ensure_ascii=False).encode() + b"\n"

    wanted = sum(map(len, lines()))  # for a disk that refuses
    with written_whole(config.out, wanted) as aside, aside.open("wb") as file:
        file.writelines(lines())
