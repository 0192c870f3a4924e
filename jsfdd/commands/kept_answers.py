"""`jsfdd respond --keep-hidden`: scores and hidden states from the pass in which the target answers.

    answers.jsonl.kept/    while it answers: scores and states of the answers so far (`decoding.kept`)
    scores.parquet         in the end, as `jsfdd score --keep-hidden` writes them
    hidden/
    scores.parts/

Once all is answered, answers.jsonl is read as `jsfdd score` reads it. What belongs to its samples moves from answers.jsonl.kept
to scores.parts and hidden/, and the scoring pass computes what is then missing, which is little or nothing.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jsfdd.commands import score
from jsfdd.commands.inputs import load, longest_sample
from jsfdd.commands.options import ChatOptions
from jsfdd.commands.score import HIDDEN, ScoreConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jsfdd.base.records import Sample
    from jsfdd.commands.respond import Prepared, RespondConfig
    from jsfdd.decoding.conversation_log import AnsweredBatch
    from jsfdd.decoding.conversations import PromptGroup
    from jsfdd.weights.target import Target

_SECONDS = 60.0  # of answers that a kill may lose


class Kept(NamedTuple):
    """What `score_answers` found.

    Attributes:
      samples: that the answers became.
      decoded: how many of them have the scores of the decoding; the rest was read once more.
    """

    samples: int
    decoded: int


def kept_of(out: Path) -> Path:
    """Where states and scores stay until all is answered."""
    return out.with_name(out.name + ".kept")


def check_free(out: Path) -> None:
    """Raise FileExistsError if scores or hidden states of other answers lie beside the file to write."""
    found = [name for name in ("scores.parquet", "scores.parts", HIDDEN) if (out.parent / name).exists()]
    if found and not out.exists():
        raise FileExistsError(
            f"{out.parent}: {found[0]} is there, of other answers than {out.name} will have; --keep-hidden writes its own "
            "beside --out: choose a folder of its own for it"
        )


def scoring_of(config: RespondConfig) -> ScoreConfig:
    """How `jsfdd score` would score and keep the answers."""
    names = ("keep_hidden", "retain_ratio", "within", "draft_kind", "seed")
    return ScoreConfig(
        model=config.model,
        chats=ChatOptions(data=(config.out,), max_length=config.max_length, max_skipped=config.max_skipped),
        processes=config.processes,
        out=config.out.parent,
        **{name: getattr(config, name) for name in names},
    )


class Recording(NamedTuple):
    """What `conversations.answer_all` takes to record.

    Attributes:
      decode: compiled.
      keep: takes every new batch, and passes on to the log what is on disk.
    """

    decode: Callable
    keep: Callable[[AnsweredBatch, PromptGroup, Any], None]


@contextmanager
def recording(
    config: RespondConfig, prepared: Prepared, target: Target, mesh: Mesh, identity: dict, log: Callable[[AnsweredBatch], None]
) -> Iterator[Recording]:
    """Keep scores and states of new answers in answers.jsonl.kept. When the block ends, all is on disk and in the log.

    A batch enters the log after its scores and states are on disk, so what the log has is never lost; it is decoded anew where
    a kill came before.
    """
    from jsfdd.data.template import ChatTokenizer
    from jsfdd.decoding.kept import AnswerKeeper, tail_of
    from jsfdd.decoding.recorded import make_recorded
    from jsfdd.hidden.capture import keep_hidden

    scoring, directory = scoring_of(config), kept_of(config.out)
    tail, layers = tail_of(target.tokenizer), score.layers_kept(scoring, target.config)
    tokenize = ChatTokenizer(target.tokenizer, longest_sample(target, config.max_length), vocab_size=target.config.vocab_size)
    by_number = {item.number: index for index, item in enumerate(prepared.questions)}
    waiting: list[AnsweredBatch] = []
    saved = time.monotonic()
    with keep_hidden(
        target,
        score.still_possible(scoring, _as_samples(prepared, config.decoding.max_new_tokens)),
        directory=directory / HIDDEN,
        identity=identity,
        kept_for=score.rule_of(scoring),
        dtype=scoring.hidden_dtype,
        layers=layers,
    ) as hidden:
        keeper = AnswerKeeper(directory, hidden, tokenize, tail, identity)

        def save() -> None:
            nonlocal saved
            keeper.save()
            for batch in waiting:
                log(batch)
            waiting.clear()
            saved = time.monotonic()

        def keep(batch: AnsweredBatch, group: PromptGroup, out) -> None:
            asked = [prepared.questions[by_number[number]] for number in group.numbers]
            keeper.add(asked, group, batch.answers, out)
            waiting.append(batch)
            if time.monotonic() - saved >= _SECONDS:
                save()

        yield Recording(make_recorded(prepared.setup, mesh, tail=tail, layers=layers, dtype=hidden.device_dtype), keep)
        save()


def score_answers(config: RespondConfig, target: Target) -> Kept:
    """Write scores.parquet and hidden/ beside the answers, from what was kept, computing only what is missing."""
    from jsfdd.decoding.kept import read_kept
    from jsfdd.hidden.adopt import adopt
    from jsfdd.scoring.parts import GIVEN
    from jsfdd.scoring.score import identity_of_scores
    from jsfdd.scoring.table import read_scores, write_part

    scoring, directory = scoring_of(config), kept_of(config.out)
    loaded = load(scoring, score.prepare(scoring), target)
    given = config.out.parent / "scores.parts" / GIVEN
    if directory.exists():
        identity = identity_of_scores(loaded.identity, loaded.samples, loaded.mesh, scoring.chats.batch_tokens)
        table = read_kept(directory, loaded.samples)
        if table is not None:
            given.parent.mkdir(exist_ok=True)
            write_part(given, dataclasses.replace(table, identity=identity))
            adopt(
                directory / HIDDEN,
                config.out.parent / HIDDEN,
                identity=loaded.identity,
                kept_for=score.rule_of(scoring),
                wanted=frozenset(table.ids),
            )
    table = score.score(scoring, loaded)
    if directory.exists():
        shutil.rmtree(directory)
    return Kept(len(table), len(read_scores(given)) if given.exists() else 0)


def expected_tokens(config: RespondConfig, prepared: Prepared) -> int:
    """About how many tokens' states are kept if every answer is as long as it may be; an upper estimate."""
    longest = config.decoding.max_new_tokens
    share = score.still_possible(scoring_of(config), _as_samples(prepared, longest)).expected_tokens
    share /= len(prepared.questions) * (longest + 1)
    answers = sum(len(questions.turns) for questions in prepared.questions)
    return round(
        share * min(answers * longest + prepared.questions.num_bytes // 4, len(prepared.questions) * config.max_length)
    )


def _as_samples(prepared: Prepared, length: int) -> Sequence[Sample]:
    """A sample in the place of every conversation, before it is answered."""
    import numpy as np

    from jsfdd.base.records import Sample

    tokens, mask = np.zeros(length + 1, np.int32), np.ones(length + 1, bool)
    return [Sample(item.id, item.source, tokens, mask) for item in prepared.questions]
