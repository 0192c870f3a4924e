"""Prompts as the decoder takes them: rendered by the target's template, checked, and padded to few widths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jsfdd.base.records import Prompt
from jsfdd.data.batches import pad_rows
from jsfdd.data.template import render_prompt
from jsfdd.decoding.generate import PromptBatch
from jsfdd.weights.target import Target

_SHORTEST_BUCKET = 64


def render_turns(target: Target, prompt: Prompt, answers: list[str]) -> list[int]:
    """Token ids of the conversation so far: the turns up to the one after the answers given."""
    messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
    for turn, answer in zip(prompt.turns, answers):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": prompt.turns[len(answers)]})
    return render_prompt(target.tokenizer, messages, prompt.tools)


def check_length(target: Target, prompt: Prompt, length: int, max_new_tokens: int) -> None:
    if length + max_new_tokens > target.config.max_position:
        raise ValueError(
            f"prompt {prompt.id}: {length} tokens and an answer of up to {max_new_tokens} exceed the context of "
            f"{target.config.max_position} tokens of {target.name}; shorten it or lower --max-new-tokens"
        )


def bucket_width(length: int) -> int:
    """The next power of two: few shapes, each compiled once; a prompt is read once, so its padding costs little."""
    return max(_SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def prompt_batch(ids, rows, batch_size, width, seed, turn) -> PromptBatch:
    """`ids` padded to [batch_size, width]. A row's key is its prompt's own, so batching does not change sampled text."""
    fill = batch_size - len(ids)
    tokens = pad_rows([np.asarray(i, np.int32) for i in ids], (batch_size, width))
    lengths = np.array([len(i) for i in ids] + [0] * fill, np.int32)
    base = jax.random.fold_in(jax.random.key(seed), turn)
    keys = jax.vmap(lambda row: jax.random.fold_in(base, row))(jnp.array(list(rows) + [0] * fill))
    return PromptBatch(jnp.asarray(tokens), jnp.asarray(lengths), keys)
