"""Prepare prompts for the decoder: render them with the target's template, check them, and pad them to a few widths."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jsfdd.base.records import Prompt
from jsfdd.data.batches import SHORTEST, next_power_of_two, pad_rows
from jsfdd.data.messages import Message
from jsfdd.data.questions import Questions, prompt_of
from jsfdd.decoding.state import PromptBatch
from jsfdd.weights.target import Target


def questions_in(prompts: Sequence[Prompt]) -> list[Questions]:
    """Turn prompts into conversations to hold: every turn is a user message, the first after a system message if any."""
    return [Questions(number, prompt.id, prompt.source, _turns(prompt), prompt.tools) for number, prompt in enumerate(prompts)]


def _turns(prompt: Prompt) -> tuple[tuple[Message, ...], ...]:
    first, *later = ((Message(role="user", content=turn),) for turn in prompt.turns)
    system = (Message(role="system", content=prompt.system),) if prompt.system else ()
    return ((*system, *first), *later)


def first_prompts(target: Target, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """Render each prompt's first turn to token ids.

    Raises:
      ValueError: a prompt with its answer is longer than the target's context, or has a token that the model lacks.
    """
    rendered = [prompt_of(target.tokenizer, questions.turns, [], questions.tools) for questions in questions_in(prompts)]
    for prompt, tokens in zip(prompts, rendered, strict=True):
        check_length(target, prompt.id, len(tokens), max_new_tokens)
        if max(tokens) >= target.config.vocab_size:
            raise ValueError(
                f"prompt {prompt.id}: token {target.tokenizer.convert_ids_to_tokens(max(tokens))} ({max(tokens)}), which the "
                f"model of {target.config.vocab_size} rows does not embed; use the model's own tokenizer and template"
            )
    return rendered


def check_length(target: Target, prompt_id: str, length: int, max_new_tokens: int) -> None:
    """Raise ValueError if a prompt of `length` tokens with its answer is longer than the target's context."""
    if length + max_new_tokens > target.config.max_position:
        raise ValueError(
            f"prompt {prompt_id}: {length} tokens and an answer of up to {max_new_tokens} exceed the context of "
            f"{target.config.max_position} tokens of {target.name}; shorten it or lower --max-new-tokens"
        )


def bucket_width(length: int) -> int:
    """Round a length up to a power of two. This gives few shapes to compile; padding is cheap, as a prompt is read once."""
    return max(SHORTEST, next_power_of_two(length))


def prompt_batch(
    prompts: Sequence[Sequence[int]], numbers: Sequence[int], batch_size: int, *, seed: int, turn: int = 0
) -> PromptBatch:
    """Right-pad prompts to [batch_size, width], where `width` is the `bucket_width` of the longest.

    Args:
      numbers: the conversations' numbers. A row's key is made of its number, the seed and the turn, so that sampled text
        does not depend on the batch.
    """
    filler = batch_size - len(prompts)
    width = bucket_width(max(map(len, prompts)))
    tokens = pad_rows([np.asarray(ids, np.int32) for ids in prompts], (batch_size, width))
    lengths = np.array([*map(len, prompts), *[0] * filler], np.int32)
    base = jax.random.fold_in(jax.random.key(seed), turn)
    keys = jax.vmap(lambda number: jax.random.fold_in(base, number))(np.array([*numbers, *[0] * filler], np.int32))
    return PromptBatch(tokens, lengths, keys)
