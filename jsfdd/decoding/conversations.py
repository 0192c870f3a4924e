"""The target in the assistant's place: conversations answered turn by turn, batched, each with its own earlier answers.

A prompt's shape in the decoder and the key that draws its answer are its own, so an answer does not depend on what it is
batched with. A conversation ends early after an answer that was cut short, since nobody would go on from there, and before
a turn that has become too long or that the template refuses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from jsfdd.base.mesh import num_data_shards, replicate, shard_rows, to_host
from jsfdd.data.chat import Message
from jsfdd.data.questions import Questions, prompt_of
from jsfdd.data.template import RefusedByTemplate
from jsfdd.decoding.conversation_log import Answer, AnsweredBatch
from jsfdd.decoding.generate import DecodeSetup, make_generate, prepare_params
from jsfdd.decoding.prompts import bucket_width, prompt_batch
from jsfdd.models.sharding import place_params
from jsfdd.weights.target import Target


class Conversation(NamedTuple):
    """A conversation that was held.

    Attributes:
      questions: what was asked.
      answers: the target's, for as many turns as it lasted; at least one.
      ended: why it lasted no longer: "truncated", "too_long", "refused"; None if every turn was answered.
    """

    questions: Questions
    answers: list[Answer]
    ended: str | None

    @property
    def messages(self) -> list[Message]:
        """All that was said, in order."""
        answers = map(message_of, self.answers)
        return [message for turn, answer in zip(self.questions.turns, answers) for message in (*turn, answer)]


def message_of(answer: Answer) -> Message:
    """An answer as a message; one that was cut short says so, for its end is not the target's (`data.template`)."""
    message = Message(role="assistant", content=answer.text)
    return message | {"truncated": True} if answer.truncated else message


def rows_together(batch_size: int, mesh: Mesh) -> int:
    """`batch_size` rounded up to what the data shards of a mesh share evenly."""
    shards = num_data_shards(mesh)
    return -(-batch_size // shards) * shards


def answer_all(
    target: Target,
    setup: DecodeSetup,
    draft_params: dict | None,
    asked: Sequence[Questions],
    mesh: Mesh,
    *,
    temperature: float,
    batch_size: int,
    longest_prompt: int,
    seed: int,
    finished: Sequence[AnsweredBatch] = (),
    keep: Callable[[AnsweredBatch], None] = lambda batch: None,
    progress: Callable[[int, int, str], None] = lambda done, total, figures: None,
) -> tuple[list[Conversation], np.ndarray]:
    """Hold every conversation to its end.

    Args:
      target: from `load_target`.
      setup: how to decode; with a draft, `draft_params` are its parameters.
      asked: from `questions_of` with the same longest_prompt.
      mesh: rows are split over its "data" axis.
      batch_size: from `rows_together`.
      longest_prompt: tokens of a prompt that still has an answer.
      finished: what earlier calls with the same arguments gave to `keep`, in that order; it is not decoded again.
      keep: takes every further batch as soon as it is answered.
      progress: called with answers done, answers in all as far as it is known, and words on the speed.

    Returns:
      The conversations in the order of `asked`, and accept counts (int64[G+1], as in `AnsweredBatch`) over all batches.

    Raises:
      ValueError: `finished` is not what these arguments lead to.
    """
    decode = make_generate(setup, mesh)
    params = prepare_params(place_params(target.params, mesh), None if draft_params is None else replicate(draft_params, mesh))
    answers: list[list[Answer]] = [[] for _ in asked]
    ended: list[str | None] = [None] * len(asked)
    accept_counts = np.zeros(setup.num_draft_tokens + 1, np.int64)
    earlier, started, fresh_tokens = iter(finished), time.monotonic(), 0
    done, total = 0, sum(len(questions.turns) for questions in asked)

    def end(i: int, reason: str) -> int:
        """Ends conversation i; returns how many answers it lacks."""
        ended[i] = reason
        return len(asked[i].turns) - len(answers[i])

    for turn in range(max(len(questions.turns) for questions in asked)):
        prompts = {}
        for i, questions in enumerate(asked):
            if ended[i] is None and turn < len(questions.turns):
                prompt = _prompt(target, questions, answers[i], longest_prompt)
                if isinstance(prompt, str):
                    total -= end(i, prompt)
                else:
                    prompts[i] = prompt
        for rows, width in _batches(prompts, batch_size):
            numbers = [asked[i].number for i in rows]
            batch = next(earlier, None)
            if batch is None:
                inputs = prompt_batch([prompts[i] for i in rows], numbers, batch_size, width, seed, turn)
                out = to_host(decode((params, np.float32(temperature)), shard_rows(inputs, mesh)))
                texts = [_answer(target, tokens[:n], setup) for tokens, n, _ in zip(out.tokens, out.lengths, rows)]
                batch = AnsweredBatch(turn, numbers, texts, out.stats.accept_counts.sum(axis=0).tolist())
                keep(batch)
                fresh_tokens += sum(answer.num_tokens for answer in texts)
            elif (batch.turn, batch.numbers) != (turn, numbers):
                raise ValueError(
                    f"the answers kept by an earlier call do not belong here: turn {batch.turn} of {batch.numbers} instead of "
                    f"turn {turn} of {numbers}; delete them and start anew"
                )
            for i, answer in zip(rows, batch.answers, strict=True):
                answers[i].append(answer)
                if answer.truncated and turn + 1 < len(asked[i].turns):
                    total -= end(i, "truncated")
            accept_counts += batch.accept_counts
            done += len(rows)
            progress(done, total, f"{fresh_tokens / (time.monotonic() - started):,.0f} tokens/s")
    return [Conversation(*each) for each in zip(asked, answers, ended)], accept_counts


def _prompt(target: Target, questions: Questions, answers: Sequence[Answer], longest: int) -> list[int] | str:
    """The prompt of the next turn, or why there is none."""
    try:
        prompt = prompt_of(target.tokenizer, questions.turns, list(map(message_of, answers)), questions.tools)
    except RefusedByTemplate:
        return "refused"
    return prompt if len(prompt) <= longest else "too_long"


def _batches(prompts: dict[int, list[int]], batch_size: int) -> Iterator[tuple[list[int], int]]:
    """(rows, width) of each batch: rows of one width, which no neighbour changes, in their order."""
    widths = {i: bucket_width(len(prompt)) for i, prompt in prompts.items()}
    for width in sorted(set(widths.values())):
        rows = [i for i in widths if widths[i] == width]
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size], width


def _answer(target: Target, tokens: np.ndarray, setup: DecodeSetup) -> Answer:
    truncated = len(tokens) == setup.max_new_tokens and int(tokens[-1]) not in setup.stop_tokens
    text = target.tokenizer.decode(tokens, skip_special_tokens=True)
    # The cut may lie within a character.
    return Answer(text.rstrip("\N{REPLACEMENT CHARACTER}") if truncated else text, len(tokens), truncated)
