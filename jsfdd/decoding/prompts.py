"""Prompts as the decoder takes them: rendered by the target's template, checked, and padded to few widths."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jsfdd.base.records import Prompt
from jsfdd.data.batches import SHORTEST, next_power_of_two, pad_rows
from jsfdd.data.messages import Message
from jsfdd.data.questions import Questions, prompt_of
from jsfdd.decoding.state import PromptBatch
from jsfdd.weights.target import Target


def questions_in(prompts: Sequence[Prompt]) -> list[Questions]:
    """Prompts as conversations to be held: every turn is a user's message, the first behind a system's if there is one."""
    return [
        Questions(number, prompt.id, prompt.source, _turns_of(prompt), prompt.tools) for number, prompt in enumerate(prompts)
    ]


def _turns_of(prompt: Prompt) -> tuple[tuple[Message, ...], ...]:
    first, *later = ((Message(role="user", content=turn),) for turn in prompt.turns)
    system = (Message(role="system", content=prompt.system),) if prompt.system else ()
    return ((*system, *first), *later)


def first_prompts(target: Target, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt's first turn.

    Raises ValueError where one with its answer is longer than the target's context.
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
    """Raise ValueError where a prompt of so many tokens with its answer is longer than the target's context."""
    if length + max_new_tokens > target.config.max_position:
        raise ValueError(
            f"prompt {prompt_id}: {length} tokens and an answer of up to {max_new_tokens} exceed the context of "
            f"{target.config.max_position} tokens of {target.name}; shorten it or lower --max-new-tokens"
        )


def bucket_width(length: int) -> int:
    """The next power of two: few shapes, each compiled once; a prompt is read once, so its padding costs little."""
    return max(SHORTEST, next_power_of_two(length))


def prompt_batch(
    prompts: Sequence[Sequence[int]], numbers: Sequence[int], batch_size: int, *, seed: int, turn: int = 0
) -> PromptBatch:
    """Prompts right-padded to [batch_size, width], `width` the power of two that holds the longest.

    Args:
      numbers: of the conversations. A row's key comes from its number, the seed and the turn, so that sampled text does not
        depend on the batch.
    """
    filler = batch_size - len(prompts)
    width = bucket_width(max(map(len, prompts)))
    tokens = pad_rows([np.asarray(ids, np.int32) for ids in prompts], (batch_size, width))
    lengths = np.array([*map(len, prompts), *[0] * filler], np.int32)
    base = jax.random.fold_in(jax.random.key(seed), turn)
    keys = jax.vmap(lambda number: jax.random.fold_in(base, number))(jnp.array([*numbers, *[0] * filler]))
    return PromptBatch(jnp.asarray(tokens), jnp.asarray(lengths), keys)
