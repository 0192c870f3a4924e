"""Conversations in which the target is the assistant: answered turn by turn, in batches, each after its earlier answers.

`hold` loops over turns and batches for every caller that needs the target's answers; the caller decodes a batch.
`answer_all` does so for `jsfdd respond`. There a prompt's padded width and its sampling key do not depend on other prompts, so
neither does the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
    """A conversation with the target's answers.

    Attributes:
      questions: the messages that the target answers.
      answers: the target's, one for each turn that was reached.
      ended: why the conversation ended early: "truncated", "too_long" or "refused"; None if every turn was answered.
    """

    questions: Questions
    answers: list[Answer]
    ended: str | None

    @property
    def messages(self) -> list[Message]:
        """All messages, in order."""
        answers = map(message_of, self.answers)
        return [message for turn, answer in zip(self.questions.turns, answers) for message in (*turn, answer)]


class Conversations(Sequence[Conversation]):
    """The conversations that `hold` held, each put together when it is asked for: questions may lie on disk.

    Args:
      questions, answers: one of each a conversation.
      ended: why it ended early, by its index.
    """

    def __init__(self, questions: Sequence[Questions], answers: Sequence[list[Answer]], ended: Mapping[int, str]):
        self._questions, self._answers, self._ended = questions, answers, ended

    def __len__(self) -> int:
        return len(self._answers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return Conversation(self._questions[index], self._answers[index], self._ended.get(index))


class PromptGroup(NamedTuple):
    """Prompts that are answered together.

    Attributes:
      turn: from 0.
      rows: indices of the conversations, in the order of `hold`'s questions.
      numbers: the numbers of their questions, from which sampling keys are made.
      prompts: token ids.
    """

    turn: int
    rows: list[int]
    numbers: list[int]
    prompts: list[list[int]]


def hold(
    target: Target,
    questions: Sequence[Questions],
    answer: Callable[[PromptGroup], Sequence[Answer]],
    batches: Batches,
    *,
    max_new_tokens: int,
    longest_prompt: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Conversations:
    """Hold every conversation to its end: all of them turn by turn, the prompts of one turn in batches.

    Args:
      answer: decodes a group of prompts and returns the answers that their conversations continue with.
      batches: decides which prompts of a turn are answered together, such as `by_width`.
      max_new_tokens: the longest answer.
      longest_prompt: if given, a conversation ends early after a truncated answer, which no user would continue from, and
        before a turn whose prompt is longer than this or refused by the template. If None, a conversation continues after
        a truncated answer, and such a prompt is an error.
      progress: called after each batch with the number of answers done, and in all as far as is known.

    Raises:
      ValueError: without `longest_prompt`, a prompt with its answer is longer than the target's context, or the template
        refuses it.
    """
    turns = [len(item.turns) for item in questions]
    answers: list[list[Answer]] = [[] for _ in turns]
    ended: dict[int, str] = {}
    done, total = 0, sum(turns)
    for turn in range(max(turns)):
        lengths: dict[int, int] = {}
        for i in (i for i, count in enumerate(turns) if turn < count and i not in ended):
            prompt = _next_prompt(target, questions[i], answers[i], max_new_tokens, longest_prompt)
            if isinstance(prompt, str):
                ended[i] = prompt
                total -= turns[i] - turn
            else:
                lengths[i] = len(prompt)
        for rows in batches(lengths):
            asked = [questions[i] for i in rows]
            # Made anew: the prompts of all conversations of a turn would fill the memory.
            prompts = [_prompt(target, item, answers[i]) for i, item in zip(rows, asked)]
            group = PromptGroup(turn, rows, [item.number for item in asked], prompts)
            for i, reply in zip(rows, answer(group), strict=True):
                answers[i].append(reply)
                done += 1
                if longest_prompt is not None and reply.truncated and turn + 1 < turns[i]:
                    ended[i] = "truncated"
                    total -= turns[i] - turn - 1
            progress(done, total)
    return Conversations(questions, answers, ended)


def _next_prompt(
    target: Target, questions: Questions, answers: Sequence[Answer], max_new_tokens: int, longest_prompt: int | None
) -> list[int] | str:
    """The next turn's prompt, or the reason why the conversation ends before it."""
    try:
        prompt = _prompt(target, questions, answers)
    except RefusedByTemplate:
        if longest_prompt is None:
            raise
        return "refused"
    if longest_prompt is None:
        check_length(target, questions.id, len(prompt), max_new_tokens)
    elif len(prompt) > longest_prompt:
        return "too_long"
    return prompt


def _prompt(target: Target, questions: Questions, answers: Sequence[Answer]) -> list[int]:
    return prompt_of(target.tokenizer, questions.turns, list(map(message_of, answers)), questions.tools)


def by_width(batch_size: int) -> Batches:
    """Batch prompts of the same padded width, in their order, so that a prompt's width does not depend on its batch."""

    def batches(lengths: Mapping[int, int]) -> Iterator[list[int]]:
        widths = {i: bucket_width(length) for i, length in lengths.items()}
        for width in sorted(set(widths.values())):
            rows = [i for i in widths if widths[i] == width]
            yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))

    return batches


def message_of(answer: Answer) -> Message:
    """An answer as a message. A truncated one is marked, because its end is not the target's choice (`data.template`)."""
    message = Message(role="assistant", content=answer.text)
    return message | {"truncated": True} if answer.truncated else message


def read_answer(target: Target, tokens: Int[np.ndarray, " n"], max_new_tokens: int) -> Answer:
    """Turn at most `max_new_tokens` generated tokens into an answer."""
    truncated = len(tokens) == max_new_tokens and int(tokens[-1]) not in target.stop_tokens
    text = target.tokenizer.decode(tokens, skip_special_tokens=True)
    # The cut may fall inside a character.
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
    decode: Callable | None = None,
    finished: Sequence[AnsweredBatch] = (),
    keep: Callable[[AnsweredBatch, PromptGroup, Any], None] = lambda batch, group, out: None,
    progress: Callable[[int, int, str], None] = lambda done, total, figures: None,
) -> tuple[Conversations, Int[np.ndarray, " G1"]]:
    """Hold every conversation to its end, decoding each batch once, in this call or in an earlier one.

    Args:
      target: from `load_target`.
      setup: how to decode.
      draft_params: the parameters of the setup's drafts.
      questions: from `questions_of` with the same longest_prompt.
      mesh: rows are split over its "data" axis.
      temperature: 0 is greedy.
      batch_size: rows decoded together; a multiple of the mesh's data shards.
      longest_prompt: the most tokens of a prompt that is answered.
      seed: for sampling.
      decode: compiled; by default `make_generate`'s. `recorded.make_recorded` makes one that returns more.
      finished: the batches that earlier calls with the same arguments passed to `keep`, in order; not decoded again.
      keep: called with every new batch as soon as it is answered, its prompts, and what `decode` returned, on the host.
      progress: called with the number of answers done, and in all as far as is known, and the speed as text.

    Returns:
      The conversations in the order of `questions`, and accept counts (int64[G+1], as in `AnsweredBatch`) over all batches.

    Raises:
      ValueError: `finished` does not come from the same arguments.
    """
    decode, longest = decode or make_generate(setup, mesh), setup.max_new_tokens
    params = prepare_params(target.params, draft_params, mesh)
    accept_counts = np.zeros(setup.num_draft_tokens + 1, np.int64)
    earlier, started, fresh_tokens = iter(finished), time.monotonic(), 0

    def answer(group: PromptGroup) -> list[Answer]:
        nonlocal accept_counts, fresh_tokens
        batch = next(earlier, None)
        if batch is None:
            inputs = prompt_batch(group.prompts, group.numbers, batch_size, seed=seed, turn=group.turn)
            out = to_host(decode(params, shard_rows(inputs, mesh), temperature))
            answers = [read_answer(target, tokens[:n], longest) for tokens, n, _ in zip(out.tokens, out.lengths, group.rows)]
            batch = AnsweredBatch(group.turn, group.numbers, answers, out.stats.accept_counts.sum(axis=0).tolist())
            keep(batch, group, out)
            fresh_tokens += sum(answer.num_tokens for answer in answers)
        elif (batch.turn, batch.numbers) != (group.turn, group.numbers):
            raise ValueError(
                f"the answers kept by an earlier call do not belong here: turn {batch.turn} of {batch.numbers} instead of "
                f"turn {group.turn} of {group.numbers}; delete them and start anew"
            )
        accept_counts += batch.accept_counts
        return batch.answers

    def show(done: int, total: int) -> None:
        progress(done, total, f"{fresh_tokens / (time.monotonic() - started):,.0f} tokens/s")

    limits = {"max_new_tokens": longest, "longest_prompt": longest_prompt}
    conversations = hold(target, questions, answer, by_width(batch_size), progress=show, **limits)
    return conversations, accept_counts
