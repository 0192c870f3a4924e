"""The target in the assistant's place: conversations answered turn by turn, batched, each with its own earlier answers.

`hold` is the loop over turns and batches, for everyone who lets a target answer; how a batch is decoded is up to its caller.
`answer_all` decodes for `jsfdd respond`. There a prompt's shape in the decoder and the key that draws its answer do not depend
on other prompts, so neither does the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jsfdd.base.mesh import shard_rows, to_host
from jsfdd.data.chat import Message
from jsfdd.data.questions import Questions, prompt_of
from jsfdd.data.template import RefusedByTemplate
from jsfdd.decoding.conversation_log import Answer, AnsweredBatch
from jsfdd.decoding.generate import make_generate, prepare_params
from jsfdd.decoding.prompts import bucket_width, check_length, prompt_batch
from jsfdd.decoding.settings import DecodeSetup
from jsfdd.weights.target import Target

# {index of a conversation: tokens of its prompt} -> the indices, batch by batch.
Batches = Callable[[Mapping[int, int]], Iterable[list[int]]]


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


class Asked(NamedTuple):
    """Prompts that are answered together.

    Attributes:
      turn: from 0.
      rows: indices of the conversations, in the order in which `hold` was given them.
      numbers: of their questions, by which answers are drawn.
      prompts: token ids.
    """

    turn: int
    rows: list[int]
    numbers: list[int]
    prompts: list[list[int]]


def hold(
    target: Target,
    questions: Sequence[Questions],
    answer: Callable[[Asked], Sequence[Answer]],
    batches: Batches,
    *,
    max_new_tokens: int,
    longest_prompt: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Conversation]:
    """Hold every conversation to its end: all of them turn by turn, the prompts of one turn in batches.

    Args:
      answer: decodes a batch, and returns the answers that its conversations go on with.
      batches: which prompts of a turn are answered together, such as `by_width`.
      max_new_tokens: the longest answer.
      longest_prompt: where given, a conversation ends early after an answer that was cut short, since nobody would go on from
        there, and before a turn whose prompt is longer than this or refused by the template. Where not, conversations go on,
        and such a turn is an error.
      progress: called after each batch with the answers done, and all that will be, as far as is known.

    Raises:
      ValueError: without `longest_prompt`, a prompt with its answer is longer than the target's context, or the template
        refuses it.
    """
    held = [Conversation(asked, [], None) for asked in questions]
    for turn in range(max(len(asked.turns) for asked in questions)):
        prompts: dict[int, list[int]] = {}
        for i, conversation in enumerate(held):
            if conversation.ended is None and turn < len(conversation.questions.turns):
                prompt = _next_prompt(target, conversation, max_new_tokens, longest_prompt)
                if isinstance(prompt, str):
                    held[i] = conversation._replace(ended=prompt)
                else:
                    prompts[i] = prompt
        for rows in batches({i: len(prompt) for i, prompt in prompts.items()}):
            asked = Asked(turn, rows, [held[i].questions.number for i in rows], [prompts[i] for i in rows])
            for i, given in zip(rows, answer(asked), strict=True):
                held[i].answers.append(given)
                if longest_prompt is not None and given.truncated and turn + 1 < len(held[i].questions.turns):
                    held[i] = held[i]._replace(ended="truncated")
            total = sum(len(talk.answers) if talk.ended else len(talk.questions.turns) for talk in held)
            progress(sum(len(talk.answers) for talk in held), total)
    return held


def _next_prompt(
    target: Target, conversation: Conversation, max_new_tokens: int, longest_prompt: int | None
) -> list[int] | str:
    """The next turn's prompt, or why the conversation ends before it."""
    questions, answers = conversation.questions, [message_of(answer) for answer in conversation.answers]
    try:
        prompt = prompt_of(target.tokenizer, questions.turns, answers, questions.tools)
    except RefusedByTemplate:
        if longest_prompt is None:
            raise
        return "refused"
    if longest_prompt is None:
        check_length(target, questions.id, len(prompt), max_new_tokens)
    elif len(prompt) > longest_prompt:
        return "too_long"
    return prompt


def by_width(batch_size: int) -> Batches:
    """Batches of prompts of one width in the decoder, in their order: a prompt's shape does not depend on its neighbours."""

    def batches(lengths: Mapping[int, int]) -> Iterator[list[int]]:
        widths = {i: bucket_width(length) for i, length in lengths.items()}
        for width in sorted(set(widths.values())):
            rows = [i for i in widths if widths[i] == width]
            yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))

    return batches


def message_of(answer: Answer) -> Message:
    """An answer as a message; one that was cut short says so, for its end is not the target's (`data.template`)."""
    message = Message(role="assistant", content=answer.text)
    return message | {"truncated": True} if answer.truncated else message


def read_answer(target: Target, tokens: Int[np.ndarray, " n"], max_new_tokens: int) -> Answer:
    """Generated tokens as an answer of at most `max_new_tokens`."""
    truncated = len(tokens) == max_new_tokens and int(tokens[-1]) not in target.stop_tokens
    text = target.tokenizer.decode(tokens, skip_special_tokens=True)
    # The cut may lie within a character.
    return Answer(text.rstrip("\N{REPLACEMENT CHARACTER}") if truncated else text, len(tokens), truncated)


def answer_all(
    target: Target,
    setup: DecodeSetup,
    draft_params: Sequence[dict],
    questions: Sequence[Questions],
    mesh: Mesh,
    *,
    temperature: float,
    batch_size: int,
    longest_prompt: int,
    seed: int,
    finished: Sequence[AnsweredBatch] = (),
    keep: Callable[[AnsweredBatch], None] = lambda batch: None,
    progress: Callable[[int, int, str], None] = lambda done, total, figures: None,
) -> tuple[list[Conversation], Int[np.ndarray, " G1"]]:
    """Hold every conversation to its end, decoding each batch once, in this call or in an earlier one.

    Args:
      target: from `load_target`.
      setup: how to decode; `draft_params` are the parameters of its drafts.
      questions: from `questions_of` with the same longest_prompt.
      mesh: rows are split over its "data" axis.
      batch_size: rows decoded together; the mesh's data shards divide it.
      longest_prompt: tokens of a prompt that still has an answer.
      finished: what earlier calls with the same arguments gave to `keep`, in that order; it is not decoded again.
      keep: takes every further batch as soon as it is answered.
      progress: called with answers done, answers in all as far as it is known, and words on the speed.

    Returns:
      The conversations in the order of `questions`, and accept counts (int64[G+1], as in `AnsweredBatch`) over all batches.

    Raises:
      ValueError: `finished` is not what these arguments lead to.
    """
    decode, longest = make_generate(setup, mesh), setup.max_new_tokens
    params = prepare_params(target.params, draft_params, mesh)
    accept_counts = np.zeros(setup.num_draft_tokens + 1, np.int64)
    earlier, started, fresh_tokens = iter(finished), time.monotonic(), 0

    def answer(asked: Asked) -> list[Answer]:
        nonlocal accept_counts, fresh_tokens
        batch = next(earlier, None)
        if batch is None:
            inputs = prompt_batch(asked.prompts, asked.numbers, batch_size, seed=seed, turn=asked.turn)
            out = to_host(decode(params, shard_rows(inputs, mesh), temperature))
            answers = [read_answer(target, tokens[:n], longest) for tokens, n, _ in zip(out.tokens, out.lengths, asked.rows)]
            batch = AnsweredBatch(asked.turn, asked.numbers, answers, out.stats.accept_counts.sum(axis=0).tolist())
            keep(batch)
            fresh_tokens += sum(answer.num_tokens for answer in answers)
        elif (batch.turn, batch.numbers) != (asked.turn, asked.numbers):
            raise ValueError(
                f"the answers kept by an earlier call do not belong here: turn {batch.turn} of {batch.numbers} instead of "
                f"turn {asked.turn} of {asked.numbers}; delete them and start anew"
            )
        accept_counts += batch.accept_counts
        return batch.answers

    def show(done: int, total: int) -> None:
        progress(done, total, f"{fresh_tokens / (time.monotonic() - started):,.0f} tokens/s")

    limits = {"max_new_tokens": longest, "longest_prompt": longest_prompt}
    conversations = hold(target, questions, answer, by_width(batch_size), progress=show, **limits)
    return conversations, accept_counts
